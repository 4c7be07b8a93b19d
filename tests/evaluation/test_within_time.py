"""As many tasks of several cells as a given time allows."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ship_ds.data.task import Example, SplitTask, Task
from ship_ds.evaluation import within_time
from ship_ds.evaluation.measure import Outcome, joined
from ship_ds.evaluation.within_time import Group, TimedCell, evenly, measure_within
from ship_ds.monitor.progress import ProgressLine

Make = Callable[..., TimedCell]


def some_tasks(count: int) -> list[SplitTask]:
    example = Example("1", "2")
    return [
        SplitTask(Task(f"task {i}", "add 1", (example, example)), (example,), (example,))
        for i in range(count)
    ]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which goes on only when somebody measures."""
    now = [100.0]
    monkeypatch.setattr(within_time.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def make(clock: list[float]) -> Make:
    """make("a", 20, 0.5): a cell of 20 tasks that take half a second each."""

    def cell(title: str, count: int, seconds: float) -> TimedCell:
        def measure(tasks: Sequence[SplitTask]) -> Outcome:
            clock[0] += seconds * len(tasks)
            rows: list[dict[str, Any]] = [{"task": task.id, "exact_match": [1.0]} for task in tasks]
            return Outcome(["exact_match"], rows)

        return TimedCell(title, some_tasks(count), measure)

    return cell


def measured(groups: Sequence[Group], seconds: float | None, least: int) -> list[int]:
    measure_within(groups, seconds, least, ProgressLine("report", 1))
    return [cell.num_measured for group in groups for cell in group.cells]


def test_every_beginning_of_the_order_is_spread_evenly() -> None:
    numbers = [int(task.id.split()[1]) for task in evenly(some_tasks(12))]
    assert sorted(numbers) == list(range(12))
    assert numbers[:3] == [0, 8, 4]
    for count in range(2, 13):
        first = sorted(numbers[:count])
        gaps = [b - a for a, b in zip(first, [*first[1:], 12], strict=True)]
        assert max(gaps) <= 16 / count + 4, (count, first)


def test_without_a_limit_everything_is_measured_at_once(make: Make) -> None:
    cells = [make("a", 20, 1.0), make("b", 7, 1.0), make("none", 0, 1.0)]
    assert measured([Group(0.5, cells)], None, 2) == [20, 7, 0]
    assert [len(cell.outcomes) for cell in cells] == [1, 1, 0]
    assert len(cells[0].outcome.rows) == 20 and cells[2].outcome.rows == []


def test_it_ends_in_time_and_the_cells_of_a_group_share_their_tasks(
    make: Make, clock: list[float]
) -> None:
    """20 s, of which the least numbers take 2 x 2 x 0.5 s and 2 x 1 s: 16 are left, half of them
    for the first group, 8 s at a second a pair, and half of the rest for the second. A block fits
    where four fifths of what is left hold it: 4 and 3 pairs, then 3 and 1."""
    first = [make("a", 50, 0.5), make("b", 50, 0.5)]
    groups = [Group(0.5, first), Group(0.5, [make("c", 50, 1.0)])]
    counts = measured(groups, 20, 2)
    assert counts == [9, 9, 6]
    assert clock[0] - 100 <= 20
    assert [row["task"] for row in first[0].outcome.rows] == [
        row["task"] for row in first[1].outcome.rows
    ]


def test_ranks_measure_by_the_watch_of_the_first(
    make: Make, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has timed the training itself, and its clock runs as it likes; by limits and clocks of
    their own they would wait for each other for ever."""
    alone = measured([Group(1.0, [make("a", 20, 0.5)])], 4.0, 2)
    assert 2 < alone[0] <= 8
    first_rank = itertools.chain(
        [4.0], itertools.repeat(None)
    )  # its limit, then whatever its clock says
    start, hours = clock[0], itertools.count(0, 3600.0)

    def gather(of_this_rank: float) -> list[float]:
        limit = next(first_rank)
        return [clock[0] - start if limit is None else limit, of_this_rank]

    monkeypatch.setattr(within_time.ranks, "gather_objects", gather)
    # On this rank every look at the clock is an hour after the last one.
    monkeypatch.setattr(within_time.time, "perf_counter", lambda: next(hours))
    assert measured([Group(1.0, [make("a", 20, 0.5)])], 1000.0, 2) == alone


def test_the_least_number_is_measured_whatever_it_takes(make: Make, clock: list[float]) -> None:
    groups = [Group(0.5, [make("a", 50, 9.0)]), Group(1.0, [make("b", 3, 9.0)])]
    assert measured(groups, 1, 4) == [4, 3]


def test_no_rank_is_idle_in_the_first_tasks(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks answer three tasks in the time of one."""
    monkeypatch.setattr(within_time.ranks, "world_size", lambda: 3)
    monkeypatch.setattr(within_time.ranks, "gather_objects", lambda of_this_rank: [of_this_rank])
    assert measured([Group(1.0, [make("a", 50, 9.0)])], 1, 1) == [3]


def test_time_that_a_group_has_no_use_for_goes_to_the_next(make: Make) -> None:
    groups = [Group(0.9, [make("a", 4, 1.0)]), Group(1.0, [make("b", 50, 1.0)])]
    assert measured(groups, 24, 4) == [4, 19]


def test_a_metric_of_some_tasks_alone_is_empty_for_the_others() -> None:
    one = Outcome(["exact_match"], [{"task": "a", "exact_match": [1.0]}])
    two = Outcome(
        ["exact_match", "label_accuracy"],
        [{"task": "b", "exact_match": [0.0], "label_accuracy": [1.0]}],
    )
    both = joined([one, two])
    assert both.metrics == ["exact_match", "label_accuracy"]
    assert both.values("label_accuracy") == [[], [1.0]]
    assert both.values("exact_match") == [[1.0], [0.0]]
