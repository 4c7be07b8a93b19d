"""A process beside each rank that says when the rank gives no sign of life, and where it stands.

The hang detector (watchdog.py) is a thread of Python: it cannot run while a call in C holds the
interpreter, nor in a process that is stopped. So a thread of the rank writes a line into a pipe
every second, and another process, which loads nothing, reads it. After 30 s without, one line says
which rank it is and whether it is stopped, and the rank's own faulthandler, which is C and needs no
interpreter, writes the stack of every thread. It goes on by itself if the lines come again; after
training.hang_minutes the process is killed, or its node would wait for ever.

Imports nothing of the package: it is that process's program as well.
"""

import contextlib
import faulthandler
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

NAME_AFTER_SECONDS = 30.0
KILL_LATER_SECONDS = 20.0
"""Than training.hang_minutes, so that the other ranks say where they wait, and end, first."""
_PERIOD_SECONDS = 1.0
_NEVER = "never"
_STACKS = signal.SIGUSR2
"""Upon which a rank writes its stacks."""
_OF_THE_RANK = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,
    signal.SIGQUIT,
)


class SignOfLife:
    """This process's: `start` it as early as can be, and it lasts as long as the process.

    Args:
        name_after: seconds without a sign of life after which a line says so.
        kill_later: seconds by which the end comes after `limit`.
    """

    def __init__(
        self, name_after: float = NAME_AFTER_SECONDS, kill_later: float = KILL_LATER_SECONDS
    ) -> None:
        self.seconds = name_after, kill_later
        self._limit: float | None = None
        self._pipe: IO[bytes] | None = None

    @property
    def limit(self) -> float | None:
        """Seconds without a sign of life after which the process is killed; None: never."""
        return self._limit

    @limit.setter
    def limit(self, seconds: float | None) -> None:
        self._limit = seconds
        # At once: a process that is stopped before its thread's next line would never be killed.
        if self._pipe is not None:
            self._write_line()

    def start(self, rank: int) -> None:
        """Start the other process and the thread that writes to it."""
        faulthandler.register(_STACKS, file=sys.stderr, all_threads=True)
        # -I and -S: it starts in a few hundredths of a second, whatever the environment holds.
        command = [sys.executable, "-I", "-S", __file__]
        arguments = map(str, (os.getpid(), rank, *self.seconds))
        watcher = subprocess.Popen(
            [*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        self._pipe = watcher.stdin
        assert self._pipe is not None
        os.set_blocking(self._pipe.fileno(), False)
        # Here, or a process that is stopped before its thread runs would never tell its limit.
        self._write_line()
        threading.Thread(target=self._write, name="sign of life", daemon=True).start()

    def _write(self) -> None:
        while True:
            time.sleep(_PERIOD_SECONDS)
            self._write_line()

    def _write_line(self) -> None:
        assert self._pipe is not None
        line = _NEVER if self.limit is None else f"{self.limit}"
        # A watcher that is gone, or stopped until the pipe is full, is no reason to end a run.
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(self._pipe.fileno(), f"{line}\n".encode())


OF_THIS_PROCESS = SignOfLife()
"""A program starts it; what it runs sets the limit once it knows it."""


class Watcher:
    """The other process: one rank's."""

    def __init__(self, process: int, rank: int, name_after: float, kill_later: float) -> None:
        self.process, self.rank = process, rank
        self.name_after, self.kill_later = name_after, kill_later
        self.limit: float | None = None
        self._silent, self._is_named = 0.0, False

    def watch(self, pipe: int) -> None:
        """Read signs of life until the rank has ended, and closed the pipe by that unless a
        process that it forked still holds it."""
        before = time.monotonic()
        while os.getppid() == self.process:
            text = None
            if select.select([pipe], [], [], _PERIOD_SECONDS)[0]:
                text = os.read(pipe, 4096).decode()
                if not text:
                    return
            now = time.monotonic()
            # No more, or the time in which both processes were stopped would count.
            self._silent += min(now - before, 2 * _PERIOD_SECONDS)
            before = now
            if text is not None:
                self._hear(text)
            if self._silent > self.name_after and not self._is_named:
                self._name()
            if self.limit is not None and self._silent > self.limit + self.kill_later:
                # First, since the line may have nowhere to go.
                os.kill(self.process, signal.SIGKILL)
                self._say(
                    f"no sign of life for {self._silent:.0f} s (training.hang_minutes): process "
                    f"{self.process} is killed"
                )
                return

    def _hear(self, text: str) -> None:
        if self._is_named:
            self._say(f"goes on, after {self._silent:.0f} s")
        self._silent, self._is_named = 0.0, False
        line = text.split()[-1]
        self.limit = None if line == _NEVER else float(line)

    def _name(self) -> None:
        self._is_named = True
        before = f"no sign of life for {self._silent:.0f} s: process {self.process} "
        if is_stopped(self.process):
            self._say(f"{before}was stopped by a signal: `kill -CONT {self.process}`")
            return
        self._say(f"{before}is in a call that holds the interpreter; its stacks follow")
        os.kill(self.process, _STACKS)

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # it may be on a full disk, or its reader gone
            print(f"ship-ds: rank {self.rank}: {text}", file=sys.stderr, flush=True)


def is_stopped(process: int) -> bool:
    """Whether a signal or a debugger has stopped it; False where there is no /proc to ask."""
    try:
        # The name, in brackets, may hold anything.
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def main() -> None:
    """Watch the process whose number, rank and limits are given, through standard input."""
    # Signals to the group are for the rank, whose end is this process's.
    for number in _OF_THE_RANK:
        signal.signal(number, signal.SIG_IGN)
    process, rank, name_after, kill_later = sys.argv[1:]
    Watcher(int(process), int(rank), float(name_after), float(kill_later)).watch(sys.stdin.fileno())


if __name__ == "__main__":
    main()
