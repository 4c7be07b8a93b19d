"""The schedule, by steps and by time."""

import pytest

from ship_ds.config import OptimiserConfig
from ship_ds.runtime.engine import learning_rate

COSINE = OptimiserConfig(lr=1.0, warmup_steps=4)


def test_warm_up_is_linear_and_the_cosine_ends_at_two_per_cent() -> None:
    assert [learning_rate(step, COSINE, 100) for step in (0, 1)] == [0.25, 0.5]
    assert learning_rate(50, COSINE, 100) == pytest.approx(0.51)
    assert learning_rate(100, COSINE, 100) == pytest.approx(0.02)


def test_the_schedule_ends_with_the_time_where_steps_would_take_longer() -> None:
    assert learning_rate(50, COSINE, 100, spent=1.0) == pytest.approx(0.02)
    assert learning_rate(50, COSINE, 100, spent=0.3) == learning_rate(50, COSINE, 100)
    constant = OptimiserConfig(lr=1.0, warmup_steps=4, schedule="constant")
    assert learning_rate(50, constant, 100, spent=1.0) == 1.0
