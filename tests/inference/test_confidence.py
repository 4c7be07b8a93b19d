"""Agreement of the posterior's samples: what it is, what it is worth, what it says of a run."""

import json
import math
from dataclasses import replace

import pytest
import torch

from ship_ds.api import Ship
from ship_ds.data.task import Example, SplitTask, Task
from ship_ds.inference.confidence import (
    Calibration,
    Confidence,
    agreement,
    auc,
    best_parting,
    calibrate_confidence,
    confidence_threshold,
    share_right,
)
from ship_ds.inference.deduction import answer_latents
from ship_ds.model.encoder import Posterior

pytestmark = pytest.mark.slow

TEXTS = ["add 3", "remove every 5", "take the first 2"]
INPUTS = [["3 4 9", "1 2"], ["5 5"], ["7 1 2", "4", "9 9 1"]]


def _agreement(ship: Ship, log_variance: float, rows: list[int]) -> list[list[float]]:
    texts, inputs = [TEXTS[row] for row in rows], [INPUTS[row] for row in rows]
    mean_TZ = ship.model.encode(texts)
    posterior = Posterior(mean_TZ, torch.full_like(mean_TZ, log_variance))
    answers = answer_latents(ship.model, mean_TZ, texts, inputs, 8)
    return agreement(ship.model, posterior, texts, inputs, answers, 8)


def test_samples_that_are_the_mean_all_agree(ship: Ship) -> None:
    assert _agreement(ship, -40, [0, 1, 2]) == [[1.0, 1.0], [1.0], [1.0, 1.0, 1.0]]


def test_samples_far_around_the_mean_do_not(ship: Ship) -> None:
    """A draw depends on its instruction alone, not on what else is asked with it."""
    together = _agreement(ship, 7, [0, 1, 2])
    values = [value for row in together for value in row]
    assert min(values) < 1 and all(value * 8 == round(value * 8) for value in values)
    assert together == [_agreement(ship, 7, [row])[0] for row in range(3)]


def test_auc_by_hand() -> None:
    """Of four pairs two are in order and one is equal."""
    assert auc([0.9, 0.2, 0.5, 0.2], [True, True, False, False]) == (1 + 1 + 0 + 0.5) / 4
    assert math.isnan(auc([0.1, 0.2], [True, True]))


def test_the_threshold_parts_what_is_done_from_what_is_not() -> None:
    agreed = [1.0, 0.9, 0.8, 0.7, 0.65, 0.6, 0.3, 0.2]
    done = [True, True, True, False, True, False, False, False]
    # From 0.65 on: all four that are done, and one of the others.
    assert confidence_threshold(agreed, done) == Calibration(0.65, 15 / 16, 8)
    # Two that are not done are too few.
    assert confidence_threshold(agreed[:6], done[:6]) == Calibration(None, None, 6)


def test_of_values_that_part_alike_the_lowest_is_taken() -> None:
    # From 0.4 on and from 0.8 on: half more of the first.
    assert best_parting([0.8, 0.4], [0.4, 0.1]) == (0.4, 0.5)
    assert best_parting([0.1], [0.9]) == (0.1, 0.0)


def test_answers_are_right_as_everywhere_else() -> None:
    """By exact match: lists of integers as lists, and spaces around an answer do not count."""
    examples = Example("1", "[1, 2]"), Example("2", "cat", ("cat", "dog")), Example("3", "x")
    task = SplitTask(Task("t", "k", examples), (), examples)
    assert share_right(["[1,2]", "dog ", None], task) == 2 / 3


def test_a_run_says_what_its_dev_tasks_say(ship: Ship, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ship.confidence("add 3", ["1 2", "3 4 9"])
    assert len(found.by_input) == 2 and 0 <= found.agreement <= 1
    assert ship.confidence("add 3", ["1 2"]).by_input == found.by_input[:1]
    assert len(ship.confidence("add 3").by_input) == len(ship.probes)
    assert calibrate_confidence(ship.model, [], 8) == Calibration(None, None, 0)
    monkeypatch.setattr(ship, "_calibration", None)
    said: list[str] = []
    measured = ship.calibrate(said.append)
    # An untrained run does none of its dev tasks, so that there is nothing to tell apart.
    assert measured is not None and measured.threshold is None and measured.num_tasks > 0
    assert len(said) == 1 and "once on the run's dev tasks" in said[0]
    # Once: that there is nothing to tell apart is kept as well.
    assert ship.calibrate(said.append) == measured and len(said) == 1
    assert ship._derived is not None and ship._derived.calibration() == measured
    assert not ship.confidence("add 3", ["1 2"]).is_low


def test_low_confidence_is_one_line() -> None:
    calibration = Calibration(0.7, 0.85, 55)
    low = Confidence((0.25, 0.5), calibration)
    assert low.is_low and low.agreement == 0.375
    warning = low.warning
    assert warning is not None and "agree on 38 % of the answers" in warning
    assert "below 70 %" in warning and "\n" not in warning
    unknown = Calibration(None, None, 4)
    for other in (
        replace(low, calibration=None),
        replace(low, calibration=unknown),
        replace(low, by_input=(0.7,)),
    ):
        assert not other.is_low and other.warning is None


def test_what_was_measured_is_kept_with_the_bundle(ship: Ship) -> None:
    derived, measured = ship._derived, Calibration(0.5, 0.75, 20)
    assert derived is not None
    derived.keep_calibration(measured)
    assert derived.calibration() == measured
    assert replace(derived, digest="another").calibration() is None
    path = derived.bundle / "derived" / "confidence_exact_match.json"
    path.write_text(json.dumps({"made_of": derived._made_of, "cut": 0.5}))
    assert derived.calibration() is None
    path.unlink()
