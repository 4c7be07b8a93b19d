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

from ship_ds.console import current_rank, log

_SECONDS_BETWEEN_LINES = 10


class Progress:
    """Of `total` tasks, part by part."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.num_done = title, total, 0
        self.part = ""
        self.started = self.told = time.perf_counter()
        is_hidden = not sys.stderr.isatty() or current_rank(os.environ) != 0
        self.bar = None
        if not is_hidden:
            self.bar = tqdm(total=total, desc=title, unit="task", dynamic_ncols=True)

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
        log(f"{self.title}: {self.part}: {self.num_done} of {self.total} tasks, {seconds:.0f} s")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
