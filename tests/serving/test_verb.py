"""`ship-ds serve` as a process: what it refuses at once, and how it ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from ship_ds import cli
from tests.conftest import REPOSITORY, environment


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["serve", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ship-ds: ") and said.count("\n") == 1
    return said


def test_another_host_needs_a_key(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHIP_DS_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        assert "SHIP_DS_API_KEY" in refusal(capsys, "--run", str(bundle), "--host", host)
    assert "is empty" in refusal(capsys, "--run", str(bundle), "--api-key", " ")
    for key in ("söme key", "some\x7fkey", "some\nkey"):
        assert "printable ASCII" in refusal(capsys, "--run", str(bundle), "--api-key", key)


def test_a_port_in_use_is_one_line(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refusal(capsys, "--run", str(bundle), "--port", port)
    assert f"127.0.0.1:{port}" in said and "--port" in said


def test_numbers_have_bounds(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (
        ("--port", "65536"),
        ("--port", "-1"),
        ("--max-rows", "0"),
        ("--max-wait", "nan"),
        ("--max-waiting", "0"),
        ("--max-connections", "0"),
        ("--device", "tpu"),
    ):
        refusal(capsys, "--run", str(bundle), option, value)


def test_a_missing_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path) in refusal(capsys, "--run", str(tmp_path))


def test_a_missing_extra_is_one_line(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if name.startswith("ship_ds.serving")]:
        monkeypatch.delitem(sys.modules, name)
    assert "pip install 'ship-ds[serve]'" in refusal(capsys, "--run", str(bundle))


@pytest.mark.slow
def test_nothing_of_it_is_imported_by_other_verbs() -> None:
    program = (
        "import sys, ship_ds.cli; ship_ds.cli.main(['recipes']);"
        "assert not {'fastapi', 'uvicorn', 'ship_ds.serving', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def begun(arguments: Sequence[str]) -> tuple[subprocess.Popen[str], str]:
    """The process and the address that it prints when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ship_ds.cli", "serve", *arguments],
        cwd=REPOSITORY,
        env={**environment(), "SHIP_DS_API_KEY": "a key"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(process.communicate()[1][-4000:])
    return process, line.split(": ")[0]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_it_while_it_answers(bundle: Path, number: int, code: int) -> None:
    process, url = begun(["--run", str(bundle), "--port", "0", "--name", "base"])
    try:
        headers = {"Authorization": "Bearer a key"}
        assert httpx.get(f"{url}/models").status_code == 401
        asked = {"model": "ship:add 2", "prompt": "3 7", "stream": True}
        with httpx.stream(
            "POST", f"{url}/completions", json=asked, headers=headers, timeout=60
        ) as told:
            assert told.status_code == 200
            process.send_signal(number)
        since = time.monotonic()
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said
        assert time.monotonic() - since < 30
        assert "Traceback" not in said
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
