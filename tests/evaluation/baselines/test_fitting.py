"""The training loop: what is spent, the schedule, and a loss that is not finite."""

import itertools
import math

import pytest
import torch
from torch import nn

from ship_ds.evaluation.baselines.fitting import Minutes, Steps, fit


def test_steps_are_counted_and_shared_out() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    asked: list[int] = []

    def loss_at(step: int) -> torch.Tensor:
        asked.append(step)
        return (parameter - 1).square().sum()

    losses = fit([parameter], loss_at, Steps(10).share(0.7), 0.1, "test")
    assert asked == list(range(7)) and losses == sorted(losses, reverse=True) and losses[0] == 1.0
    assert Steps(3).share(0.01) == Steps(1)


def test_learning_rate_warms_up_and_falls_with_what_is_spent() -> None:
    """Under Adam with a constant gradient every step is the learning rate: 1/20 of lr at first, and
    a cosine over the budget."""
    parameter = nn.Parameter(torch.zeros(1))
    places = []

    def loss_at(step: int) -> torch.Tensor:
        places.append(parameter.item())
        return parameter.sum()

    fit([parameter], loss_at, Steps(40), 0.1, "test")
    moved = [before - after for before, after in itertools.pairwise(places)]
    for step, by in enumerate(moved):
        assert by == pytest.approx(
            0.1 * min(1, 0.05 + step / 4) * (1 + math.cos(math.pi * step / 40)) / 2, rel=1e-4
        )


def test_minutes_end_by_the_clock() -> None:
    budget = Minutes(2).share(0.25)
    assert budget.spent(10**6, 15.0) == pytest.approx(0.5) and budget.spent(0, 30.0) == 1


def test_loss_that_is_not_finite_stops_with_its_step() -> None:
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="one: the loss of step 2 is not finite; lower its lr"):
        fit(
            [parameter],
            lambda step: parameter.sum() * (math.inf if step == 2 else 1),
            Steps(5),
            0.1,
            "one",
        )
