"""A process that cannot run its own threads is named by the one beside it, and ended in time."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ship_ds.runtime import sign_of_life
from tests.conftest import REPOSITORY, environment

pytestmark = pytest.mark.slow

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


CALLS: dict[str, tuple[str, float | None]] = {
    "waits": ("wait_for_a_mutex()", 2),
    "is stopped": ("stop()", 2),
    "is stopped as soon as it knows": ("time.sleep(0.5); life.limit = 2; stop()", None),
    "returns, without a limit": ("library.sleep(3); time.sleep(2)", None),
    "returns": ("library.sleep(3); time.sleep(2)", 3),
    "works": ("time.sleep(2.5)", 2),
    "forks": ("if os.fork() == 0: time.sleep(4); os._exit(0)", 2),
}
"""What a program does, and its limit in seconds. They sleep most of their time."""


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[str], subprocess.CompletedProcess[str]]]:
    """What became of a program; none waits for the end of the one before."""
    programs = {}
    for name, (call, limit) in CALLS.items():
        programs[name] = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(call=call, limit=limit)],
            cwd=REPOSITORY,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        time.sleep(0.4)  # to start takes the processor, which the watchers of the others need

    def result(name: str) -> subprocess.CompletedProcess[str]:
        stdout, stderr = programs[name].communicate(timeout=60)
        return subprocess.CompletedProcess(name, programs[name].returncode, stdout, stderr)

    yield result
    for program in programs.values():
        program.kill()
        program.communicate()


Run = Callable[[str], subprocess.CompletedProcess[str]]


def test_a_call_that_holds_the_interpreter_is_named_with_its_stack(run: Run) -> None:
    done = run("waits")
    assert done.returncode == -signal.SIGKILL
    first, *stacks, last = done.stderr.splitlines()
    assert first.startswith("ship-ds: rank 3: no sign of life for ") and first.endswith(
        "is in a call that holds the interpreter; its stacks follow"
    )
    assert any("in wait_for_a_mutex" in line for line in stacks)
    assert "(training.hang_minutes): process " in last and last.endswith("is killed")


@pytest.mark.parametrize("name", ["is stopped", "is stopped as soon as it knows"])
def test_a_process_that_a_signal_stopped_is_named(run: Run, name: str) -> None:
    """And killed, though its thread has not run since it knew its limit."""
    done = run(name)
    assert done.returncode == -signal.SIGKILL
    named, killed = done.stderr.splitlines()
    assert "was stopped by a signal: `kill -CONT " in named and killed.endswith("is killed")


@pytest.mark.parametrize("name", ["returns, without a limit", "returns"])
def test_a_call_that_returns_is_forgotten(run: Run, name: str) -> None:
    """Without a limit it may take as long as it likes."""
    done = run(name)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert (
        done.stderr.count("no sign of life") == done.stderr.count("ship-ds: rank 3: goes on") == 1
    )


def test_a_process_that_works_is_not_named(run: Run) -> None:
    """The pipe is the only thing that holds the other process: `run` waits for it, too."""
    done = run("works")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_process_that_has_ended_is_not_named_for_what_it_forked(run: Run) -> None:
    done = run("forks")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


class Heard:
    """What a watcher did, in order, while so many seconds at a time went by without a sign of
    life; of its limits of 30 and 10 + 20 s."""

    def __init__(
        self, seconds: list[float], monkeypatch: pytest.MonkeyPatch, full: bool = False
    ) -> None:
        self.done: list[str] = []
        clock, left = [0.0], iter(seconds)

        def select(*_: object) -> tuple[list[int], ...]:
            passed = next(left, None)
            clock[0] += passed or 0
            return ([0] if passed is None else []), [], []

        def write(text: str) -> None:
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            if text.strip():
                self.done.append(text)

        calls = SimpleNamespace(
            getppid=lambda: 7,
            read=lambda *_: b"",
            kill=lambda process, number: self.done.append(f"{number.name} to {process}"),
        )
        monkeypatch.setattr(sign_of_life, "os", calls)
        monkeypatch.setattr(sign_of_life, "select", SimpleNamespace(select=select))
        monkeypatch.setattr(sign_of_life, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        monkeypatch.setattr(sign_of_life, "is_stopped", lambda _: False)
        monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=write, flush=lambda: None))
        watcher = sign_of_life.Watcher(7, 3, 30, 20)
        watcher.limit = 10
        watcher.watch(0)
        monkeypatch.undo()


def test_the_time_in_which_the_watcher_was_stopped_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `scontrol suspend` stops both."""
    assert Heard([*[1.0] * 20, 5000.0, *[1.0] * 8], monkeypatch).done == []
    assert len(Heard([1.0] * 31, monkeypatch).done) == 4


@pytest.mark.parametrize("full", [False, True])
def test_the_end_comes_before_the_line_and_without_it(
    full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Heard([1.0] * 40, monkeypatch, full).done
    assert [text for text in done if " to 7" in text] == ["SIGUSR2 to 7", "SIGKILL to 7"]
    assert full or done[-1].endswith("process 7 is killed")


def test_what_is_sent_to_all_of_a_job_does_not_end_the_watcher() -> None:
    command = [sys.executable, "-I", "-S", sign_of_life.__file__, str(os.getpid()), "0", "30", "20"]
    wanted = ("HUP", "INT", "QUIT", "USR1", "USR2", "TERM")
    with subprocess.Popen(command, stdin=subprocess.PIPE) as watcher:
        deadline = time.monotonic() + 20
        missing = wanted
        while missing and time.monotonic() < deadline:
            time.sleep(0.02)
            (line,) = (
                line
                for line in Path(f"/proc/{watcher.pid}/status").read_text().splitlines()
                if line.startswith("SigIgn:")
            )
            mask = int(line.split()[1], 16)
            missing = tuple(
                name for name in wanted if not mask >> (signal.Signals[f"SIG{name}"] - 1) & 1
            )
        watcher.kill()
    assert missing == ()
