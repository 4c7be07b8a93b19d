"""The training loop: what is spent, the schedule, looks at dev, and a loss that is not finite."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ship_ds.evaluation.baselines import fitting
from ship_ds.evaluation.baselines.fitting import DevCurve, fit
from ship_ds.evaluation.budgets import AnsweredExamples, Minutes, Spent, Steps, UntilDevStops


def test_steps_are_counted_and_shared_out() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    asked: list[int] = []

    def losses_at(step: int) -> Iterator[torch.Tensor]:
        asked.append(step)
        yield (parameter - 1).square().sum()

    losses = fit([parameter], losses_at, Steps(10).share(0.7), 0.1, "test")
    assert asked == list(range(7)) and losses == sorted(losses, reverse=True) and losses[0] == 1.0
    assert Steps(3).share(0.01) == Steps(1)


def test_pieces_of_a_step_are_one_step() -> None:
    """Adam sees the sum of their gradients, and the loss is theirs."""
    whole, parted = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    goal = torch.tensor([1.0, -2.0])

    def pieces(step: int) -> Iterator[torch.Tensor]:
        yield (parted - goal).square()[0]
        yield (parted - goal).square()[1]

    losses = fit([whole], lambda step: [(whole - goal).square().sum()], Steps(5), 0.1, "whole")
    assert fit([parted], pieces, Steps(5), 0.1, "parted") == pytest.approx(losses)
    torch.testing.assert_close(whole, parted)


def test_learning_rate_warms_up_and_falls_with_what_is_spent() -> None:
    """Under Adam with a constant gradient every step is the learning rate: 1/20 of lr at first, and
    a cosine over the budget."""
    parameter = nn.Parameter(torch.zeros(1))
    places = []

    def losses_at(step: int) -> Iterator[torch.Tensor]:
        places.append(parameter.item())
        yield parameter.sum()

    fit([parameter], losses_at, Steps(40), 0.1, "test")
    moved = [before - after for before, after in itertools.pairwise(places)]
    for step, by in enumerate(moved):
        assert by == pytest.approx(
            0.1 * min(1, 0.05 + step / 4) * (1 + math.cos(math.pi * step / 40)) / 2, rel=1e-4
        )


def test_minutes_end_by_the_clock_and_examples_by_their_number() -> None:
    budget = Minutes(2).share(0.25)
    assert budget.spent(Spent(10**6, 15.0)) == pytest.approx(0.5)
    assert budget.spent(Spent(0, 30.0)) == 1
    parameter = nn.Parameter(torch.zeros(1))
    losses = fit(
        [parameter],
        lambda step: [(parameter - 1).square().sum()],
        AnsweredExamples(100).share(0.5),
        0.1,
        "test",
        num_examples=8,
    )
    assert len(losses) == 7, "the seventh step passes 50 examples"


def looks_that_say(scores: list[float], num_looks: int = 0) -> DevCurve:
    left = iter(scores)
    return DevCurve(lambda: next(left), num_looks, every=2)


def test_training_goes_on_until_dev_stops_and_keeps_the_best_weights() -> None:
    """A look every second step; the one after step 4 is the best, and two more do not raise it."""
    parameter, places = nn.Parameter(torch.zeros(1)), []
    looks = looks_that_say([0.2, 0.5, 0.5, 0.4])

    def losses_at(step: int) -> Iterator[torch.Tensor]:
        places.append(parameter.item())
        yield parameter.sum()

    losses = fit([parameter], losses_at, UntilDevStops(2, 0), 0.1, "a", dev_curve=looks)
    assert len(losses) == 8 and parameter.item() == places[4] != places[5]
    (curve,) = looks.as_json()
    points = curve["points"]
    assert curve["stage"] == "a" and isinstance(points, list)
    assert [point["dev"] for point in points] == [None, 0.2, None, 0.5, None, 0.5, None, 0.4]
    assert [point["step"] for point in points] == list(range(1, 9))


def test_bounded_training_is_looked_at_evenly_and_keeps_its_last_weights() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    looks = looks_that_say([0.9, 0.1, 0.2, 0.3], num_looks=4)
    fit([parameter], lambda step: [parameter.sum()], Steps(8), 0.1, "a", dev_curve=looks)
    looked = [point.step for point in looks.curves["a"] if point.dev is not None]
    assert looked == [2, 4, 6, 8]
    assert parameter.item() < -0.1, "the best look was the first; the last weights stay"


def test_the_look_at_the_end_is_taken_however_late_the_clock_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every reading takes a tenth of a second, a step a second; the end of the minute falls between
    a step's record and the next question whether it is over."""
    now, parameter = [0.0], nn.Parameter(torch.zeros(1))

    def clock() -> float:
        now[0] += 0.1
        return now[0]

    def losses_at(step: int) -> Iterator[torch.Tensor]:
        now[0] += 1 if step else 0.85  # so that step 54 is recorded at 59.95
        yield parameter.sum()

    monkeypatch.setattr(fitting.time, "perf_counter", clock)
    looks = looks_that_say([0.1, 0.2], num_looks=2)
    fit([parameter], losses_at, Minutes(1), 0.1, "a", dev_curve=looks)
    *before, last = looks.curves["a"]
    assert last.dev == 0.2 and last.minutes >= 1 > before[-1].minutes


def test_looks_at_dev_cost_no_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second, a look an hour; the budget is one minute."""
    now, parameter = [0.0], nn.Parameter(torch.zeros(1))
    monkeypatch.setattr(fitting.time, "perf_counter", lambda: now[0])

    def losses_at(step: int) -> Iterator[torch.Tensor]:
        now[0] += 1
        yield parameter.sum()

    def score() -> float:
        now[0] += 3600
        return 0.5

    looks = DevCurve(score, 4, every=2)
    assert len(fit([parameter], losses_at, Minutes(1), 0.1, "a", dev_curve=looks)) == 60
    assert now[0] == 60 + 4 * 3600


def test_curve_on_disk_has_two_hundred_points_and_every_look() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    looks = looks_that_say([0.1, 0.2, 0.3], num_looks=3)
    fit([parameter], lambda step: [parameter.sum()], Steps(1000), 1e-3, "a", dev_curve=looks)
    points = looks.as_json()[0]["points"]
    assert isinstance(points, list) and 200 <= len(points) <= 203
    assert [point["dev"] for point in points if point["dev"] is not None] == [0.1, 0.2, 0.3]


def test_loss_that_is_not_finite_stops_with_its_step() -> None:
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="one: the loss of step 2 is not finite; lower its lr"):
        fit(
            [parameter],
            lambda step: [parameter.sum() * (math.inf if step == 2 else 1)],
            Steps(5),
            0.1,
            "one",
        )
