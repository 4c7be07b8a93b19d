"""What is known to be vulnerable among the versions of constraints.txt, by pip-audit.

    python -m tools.audit_constraints --program .build/audit/bin/pip-audit

Exit code 1 and a line each where an advisory is known. Where nothing could be asked, as without a
network or behind an index that does not serve advisories, one line says that it was not run, and
the code is 0: pip-audit itself calls packages that it could not look up free of known ones.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
_SECONDS = 300


def audited(program: str, constraints: Path) -> Mapping[str, Any] | str:
    """The report of pip-audit; in words why there is none."""
    options = ["--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json"]
    try:
        done = subprocess.run(
            [program, "--requirement", str(constraints), *options],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except OSError as error:
        return f"{program}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"{program}: no answer within {_SECONDS} s"
    try:
        report: Mapping[str, Any] = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().splitlines()
        return said[-1][:200] if said else f"{program}: ended with {done.returncode}"
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", default="pip-audit")
    parser.add_argument("--constraints", type=Path, default=CONSTRAINTS)
    options = parser.parse_args(arguments)
    report = audited(options.program, options.constraints)
    if isinstance(report, str):
        print(f"audit: not run: {report}")
        return 0
    packages = report["dependencies"]
    looked_up = [one for one in packages if "vulns" in one]
    if not looked_up:
        print(f"audit: not run: the index knows advisories of none of {len(packages)} packages")
        return 0
    found = [(one, known) for one in looked_up for known in one["vulns"]]
    for one, known in found:
        mended = ", ".join(known["fix_versions"]) or "no version"
        print(f"audit: {one['name']} {one['version']}: {known['id']}, mended in {mended}")
    print(
        f"audit: {len(found)} known vulnerabilities in {len(looked_up)} of {len(packages)} packages"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
