"""Started by tests/test_cli.py: every verb with bad input, in one process that never had torch.

    python -m tests.bad_input CASES.json

prints, for each list of arguments, the exit code, both streams and whether torch was imported.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

from ship_ds import cli


def outcome(arguments: list[str]) -> dict[str, object]:
    """What a user would see."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    return {
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "torch": "torch" in sys.modules,
    }


if __name__ == "__main__":
    sys.stdin = io.StringIO("")
    print(json.dumps([outcome(case) for case in json.loads(Path(sys.argv[1]).read_text())]))
