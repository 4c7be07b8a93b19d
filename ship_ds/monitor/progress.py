"""How far something is that takes minutes: a bar on a terminal, else a line every ten
seconds at most. A log of the caller's own is told of each part as it begins instead: it may show
it, or end the work by raising.

    with ProgressLine("report", 400) as progress:
        progress.begin("deduction, seen")
        ...
        progress.done(120)      # ship-ds: report: deduction, seen: 120 of 400 tasks, 31 s

Rank 0 alone writes.
"""

import os
import sys
import time
from types import TracebackType

from tqdm import tqdm

from ship_ds.console import Log, current_rank, no_log
from ship_ds.console import log as console_log

_SECONDS_BETWEEN_LINES = 10


class ProgressLine:
    """Of `total` tasks, or other units, part by part."""

    def __init__(
        self,
        title: str,
        total: int,
        unit: str = "task",
        log: Log = console_log,
        *,
        quiet_seconds: float = 0,
    ) -> None:
        """Begin to count.

        Args:
            title: what is done.
            total: how many units of it there are.
            unit: the word for one of them.
            log: see the module.
            quiet_seconds: what ends before is not spoken of.
        """
        self.quiet_seconds = quiet_seconds
        self.title, self.total, self.num_done = title, total, 0
        self.unit, self.log = unit, log
        self.part = ""
        self.started = self.last_logged = time.perf_counter()
        self.tells_parts = log not in (console_log, no_log)
        is_terminal = sys.stderr.isatty() and current_rank(os.environ) == 0
        self.bar = None
        if is_terminal and log is console_log:
            self.bar = tqdm(
                total=total, desc=title, unit=unit, dynamic_ncols=True, delay=quiet_seconds
            )

    def __enter__(self) -> "ProgressLine":
        return self

    def begin(self, part: str) -> None:
        """Name the part that is at work."""
        self.part = part
        if self.bar is not None:
            self.bar.set_postfix_str(part)
        if self.tells_parts:
            self.log(part)

    def done(self, num_tasks: int) -> None:
        """The part's tasks are answered."""
        self.num_done += num_tasks
        if self.bar is not None:
            self.bar.update(num_tasks)
        if self.bar is not None or self.tells_parts:
            return
        now = time.perf_counter()
        is_early = now - self.last_logged < _SECONDS_BETWEEN_LINES and self.num_done < self.total
        if is_early or now - self.started < self.quiet_seconds:
            return
        self.last_logged, seconds = now, now - self.started
        done = f"{self.num_done} of {self.total} {self.unit}s"
        self.log(": ".join(filter(None, [self.title, self.part, f"{done}, {seconds:.0f} s"])))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
