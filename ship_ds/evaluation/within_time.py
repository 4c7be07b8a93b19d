"""As many tasks of several cells as a given time allows, spread evenly over those that there are.

    order 0 4 2 6 1 5 3 7 of eight tasks: the first few of them lie evenly among all, however few

First every cell gets its least number of tasks, or one a rank, which take no longer than one. Then
each group of cells takes its share of the time that is left, in blocks that double as long as the
last one says that the next will fit.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ship_ds.data.task import SplitTask
from ship_ds.evaluation.measure import Outcome, joined
from ship_ds.monitor.progress import ProgressLine
from ship_ds.runtime import ranks

_MARGIN = 0.8
"""Of the time that is left: a block may hold longer texts than the one before it."""


def evenly(tasks: Sequence[SplitTask]) -> list[SplitTask]:
    """The tasks in an order whose every beginning is spread over them: their numbers with the bits
    reversed."""
    num_bits = max(1, (len(tasks) - 1).bit_length())
    order = sorted(range(len(tasks)), key=lambda i: f"{i:0{num_bits}b}"[::-1])
    return [tasks[i] for i in order]


@dataclass(eq=False)
class TimedCell:
    """A cell of a report, and how far it is.

    title: for the progress bar. tasks: all that it could be measured on, in the order in which they
    are (`evenly`). measure: asks some of them, the same on every rank.
    """

    title: str
    tasks: Sequence[SplitTask]
    measure: Callable[[Sequence[SplitTask]], Outcome]
    num_measured: int = 0
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def outcome(self) -> Outcome:
        """Of all tasks that were measured."""
        return joined(self.outcomes)

    @property
    def num_left(self) -> int:
        """Tasks that were not measured."""
        return len(self.tasks) - self.num_measured

    def advance(self, count: int, progress: ProgressLine) -> None:
        """Measure the next `count` tasks, or as many as are left."""
        some = self.tasks[self.num_measured :][:count]
        if some:
            progress.begin(self.title)
            self.outcomes.append(self.measure(some))
            self.num_measured += len(some)
            progress.done(len(some))


@dataclass(frozen=True)
class Group:
    """Cells that are measured on the same tasks. share: of the time that is left when their turn
    comes."""

    share: float
    cells: Sequence[TimedCell]

    @property
    def num_left(self) -> int:
        """Of the cell that has most."""
        return max((cell.num_left for cell in self.cells), default=0)


def measure_within(
    groups: Sequence[Group], seconds: float | None, least: int, progress: ProgressLine
) -> None:
    """Measure the cells of all groups, the same tasks on every rank.

    Args:
        groups: in the order in which they are measured.
        seconds: that it may take, by rank 0's word; None: all tasks, however long.
        least: tasks of each cell whatever they take, and at least one a rank.
        progress: is told of every block.
    """
    if seconds is not None:
        # Each rank has timed the training by a watch of its own; from here on all of them have to
        # measure the same tasks.
        seconds = ranks.gather_objects(seconds)[0]
    clock, least = _Clock(seconds), max(least, ranks.world_size())
    sizes = []
    for group in groups:
        started, size = clock.now(), least if seconds is not None else group.num_left
        _advance(group, size, progress)
        sizes.append((size, clock.now() - started))
    if seconds is None:
        return
    for group, (size, took) in zip(groups, sizes, strict=True):
        now = clock.now()
        _fill(group, size, took, now + group.share * max(0.0, seconds - now), clock, progress)


def _fill(
    group: Group, size: int, took: float, until: float, clock: "_Clock", progress: ProgressLine
) -> None:
    """Blocks of twice the size of the last one, or as many tasks as will fit before `until`."""
    while group.num_left:
        fits = int(_MARGIN * (until - clock.now()) * size / max(took, 1e-3))
        size = min(2 * size, fits, group.num_left)
        if size < 1:
            return
        started = clock.now()
        _advance(group, size, progress)
        took = clock.now() - started


def _advance(group: Group, size: int, progress: ProgressLine) -> None:
    for cell in group.cells:
        cell.advance(size, progress)


class _Clock:
    """Seconds since it was made, by rank 0's watch on every rank: all have to measure the same."""

    def __init__(self, limit: float | None) -> None:
        self.is_asked = limit is not None
        self.started = time.perf_counter()

    def now(self) -> float:
        """0 where nobody looks at it."""
        if not self.is_asked:
            return 0.0
        agreed: float = ranks.gather_objects(time.perf_counter() - self.started)[0]
        return agreed
