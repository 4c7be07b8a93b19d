"""Ending early without losing a step: preemption and time limits.

USR1 (a time limit that nears, by `#SBATCH --signal`) and TERM (preemption) may reach any rank at
any time. The ranks agree on it at the next step boundary, write a checkpoint and leave with
PREEMPTED, upon which slurm/train.sh requeues the job.
"""

import contextlib
import os
import signal
import threading
from types import TracebackType

import torch

from ship_ds.console import log_from_any_rank
from ship_ds.exit_codes import NOT_SAVED_IN_TIME, PREEMPTED
from ship_ds.runtime import ranks

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Preempted(Exception):  # noqa: N818, it is no error
    """Raised on every rank at the same boundary."""


class StopRequest:
    """Whether this run was asked to stop; the signals after the first change nothing.

    Python runs its handlers in the main thread, and not while that waits in a collective. So a
    thread of its own reads the signals from the wake-up pipe and starts the timer of the forced
    exit.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self._asked = threading.Event()
        self._everything_is_saved = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "StopRequest":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        # Written by the C handler at once, though the main thread may be in a collective for long.
        # Non-blocking, or a full pipe would stop the process inside its signal handler.
        self._old_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._old_writer)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writer)
        if self._timer is not None:
            self._timer.cancel()

    def _listen(self) -> None:
        while received := os.read(self._reader, 1):
            if received[0] in _SIGNALS:
                self._handle_signal(signal.Signals(received[0]).name)
        os.close(self._reader)

    def _handle_signal(self, name: str) -> None:
        if self._everything_is_saved:
            self._print_and_exit(PREEMPTED, f"{name}: everything is saved, leaving")
        if self._asked.is_set():
            return
        late = (
            f"no checkpoint within {self.grace_seconds:g} s of {name} (training.grace_seconds): "
            "leaving without"
        )
        self._timer = threading.Timer(
            self.grace_seconds, self._print_and_exit, (NOT_SAVED_IN_TIME, late)
        )
        self._timer.daemon = True
        self._timer.start()
        _print(f"{name}: saving at the next step boundary")
        self._asked.set()

    @staticmethod
    def _print_and_exit(code: int, text: str) -> None:
        _print(text)
        # Not sys.exit: this is no main thread, and the main one may wait in a collective for ever.
        os._exit(code)

    @property
    def is_asked(self) -> bool:
        """Whether this rank is; another may be."""
        return self._asked.is_set()

    def raise_if_asked(self) -> None:
        """Every rank calls it at the same boundaries; Preempted is raised on all of them or on
        none."""
        if ranks.sum_over_ranks(torch.tensor(float(self._asked.is_set()))) > 0:
            raise Preempted

    def exit_on_signal(self) -> None:
        """From here on nothing can be lost, and no boundary follows: a signal ends the process
        where it is."""
        self._everything_is_saved = True
        if self._asked.is_set():
            self._print_and_exit(PREEMPTED, "everything is saved, leaving")


def _print(text: str) -> None:
    # A log that cannot be written, as on a full disk, stops neither the signals nor the exit.
    with contextlib.suppress(OSError):
        log_from_any_rank(f"rank {ranks.rank()}: {text}")
