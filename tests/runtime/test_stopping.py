"""Signals: flag, second signal, forced exit; agreement over ranks is in test_two_ranks.py."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ship_ds.exit_codes import NOT_SAVED_IN_TIME, PREEMPTED
from ship_ds.runtime.stopping import Preempted, StopRequest
from tests.conftest import REPOSITORY, environment

STUCK = """
import os, signal, sys
import torch.distributed as dist
from ship_ds.runtime.stopping import StopRequest
with StopRequest(grace_seconds=1) as stop:
    {before}
    os.kill(os.getpid(), signal.SIGTERM)
    dist.TCPStore("127.0.0.1", 0, 1, True).wait(["a key that never comes"])
"""


def asked(stop: StopRequest) -> None:
    """The thread that reads the signals is another one: wait until it has."""
    deadline = time.monotonic() + 10
    while not stop._asked.is_set() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_heeded_at_the_next_boundary(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    with StopRequest(grace_seconds=100) as stop:
        stop.raise_if_asked()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        asked(stop)
        with pytest.raises(Preempted):
            stop.raise_if_asked()
    assert capsys.readouterr().err.count("saving at the next step boundary") == 1


def test_the_forced_exit_is_called_off_once_the_request_is_over() -> None:
    """Otherwise it ends whatever the process does next."""
    with StopRequest(grace_seconds=1) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        asked(stop)
    time.sleep(1.5)


def test_the_handlers_before_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest(grace_seconds=1):
        assert signal.getsignal(signal.SIGUSR1) != before
    assert signal.getsignal(signal.SIGUSR1) == before and signal.set_wakeup_fd(-1) == -1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "code"), [("pass", NOT_SAVED_IN_TIME), ("stop.exit_on_signal()", PREEMPTED)]
)
def test_a_process_stuck_in_a_collective_is_forced_out(before: str, code: int) -> None:
    """In C++ the main thread runs no Python handler, as in a hanging collective."""
    command = [sys.executable, "-c", STUCK.format(before=before)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), text=True, capture_output=True, timeout=200
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("ship-ds: rank 0: ")


@pytest.mark.slow
def test_a_log_that_cannot_be_written_keeps_no_process_alive() -> None:
    command = [sys.executable, "-c", STUCK.format(before="pass")]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment(), stderr=full, timeout=200, check=False
        )
    assert done.returncode == NOT_SAVED_IN_TIME
