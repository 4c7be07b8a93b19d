"""A process that cannot run its own threads is named by the one beside it, and ended in time."""

import signal
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, environment

PROGRAM = """
import ctypes, os, signal, sys, time
from ship_ds.runtime.sign_of_life import SignOfLife
life = SignOfLife(name_after=1.5, kill_later=1.5)
life.limit = {limit}
life.start(3)
library = ctypes.PyDLL(None)  # its functions keep the interpreter

def wait_for_a_mutex():
    mutex = ctypes.create_string_buffer(128)
    for _ in range(2):
        library.pthread_mutex_lock(mutex)

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

{call}
print("done")
"""


def run(call: str, limit: float | None = 2) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(call=call, limit=limit)],
        cwd=REPOSITORY,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_a_call_that_holds_the_interpreter_is_named_with_its_stack() -> None:
    done = run("wait_for_a_mutex()")
    assert done.returncode == -signal.SIGKILL
    first, *stacks, last = done.stderr.splitlines()
    assert first.startswith("ship-ds: rank 3: no sign of life for ") and first.endswith(
        "is in a call that holds the interpreter; its stacks follow"
    )
    assert any("in wait_for_a_mutex" in line for line in stacks)
    assert "(training.hang_minutes): process " in last and last.endswith("is killed")


def test_a_process_that_a_signal_stopped_is_named() -> None:
    done = run("stop()")
    assert done.returncode == -signal.SIGKILL
    named, killed = done.stderr.splitlines()
    assert "was stopped by a signal: `kill -CONT " in named and killed.endswith("is killed")


@pytest.mark.parametrize("limit", [None, 3])
def test_a_call_that_returns_is_forgotten(limit: float | None) -> None:
    """Without a limit it may take as long as it likes."""
    done = run("library.sleep(3); time.sleep(2)", limit)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert (
        done.stderr.count("no sign of life") == done.stderr.count("ship-ds: rank 3: goes on") == 1
    )


def test_a_process_that_works_is_not_named() -> None:
    """The pipe is the only thing that holds the other process: `run` waits for it, too."""
    done = run("time.sleep(2.5)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_process_that_has_ended_is_not_named_for_what_it_forked() -> None:
    done = run("if os.fork() == 0: time.sleep(4); os._exit(0)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
