"""How far something is that takes minutes: a bar on a terminal, else a line every ten
seconds at most.

    with Progress("report", 400) as progress:
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

from ship_ds.console import Log, current_rank, log, no_log

_SECONDS_BETWEEN_LINES = 10


class Progress:
    """Of `total` tasks, or other units, part by part."""

    def __init__(self, title: str, total: int, unit: str = "task", log: Log = log) -> None:
        self.title, self.total, self.num_done = title, total, 0
        self.unit, self.log = unit, log
        self.part = ""
        self.started = self.told = time.perf_counter()
        is_hidden = not sys.stderr.isatty() or current_rank(os.environ) != 0 or log is no_log
        self.bar = None
        if not is_hidden:
            self.bar = tqdm(total=total, desc=title, unit=unit, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def begin(self, part: str) -> None:
        """Name the part that is at work."""
        self.part = part
        if self.bar is not None:
            self.bar.set_postfix_str(part)

    def done(self, num_tasks: int) -> None:
        """The part's tasks are answered."""
        self.num_done += num_tasks
        if self.bar is not None:
            self.bar.update(num_tasks)
            return
        now = time.perf_counter()
        if now - self.told < _SECONDS_BETWEEN_LINES and self.num_done < self.total:
            return
        self.told, seconds = now, now - self.started
        done = f"{self.num_done} of {self.total} {self.unit}s"
        self.log(f"{self.title}: {self.part}: {done}, {seconds:.0f} s")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
