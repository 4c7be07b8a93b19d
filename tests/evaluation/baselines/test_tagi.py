"""TAGI's loss is the sum of its three parts, of which tasks without an oracle have the first
alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ship_ds.evaluation.baselines.oracles import Oracles
from ship_ds.evaluation.baselines.tagi import Tagi, kl_divergence
from tests.evaluation.baselines.test_frozen_base import awake_lora


@torch.no_grad()
def test_three_losses(make: Callable[..., Any]) -> None:
    method = make(Tagi)
    draws = method.sampler.draw_step(0)
    known = [draws[0].task_id, draws[2].task_id]
    oracles = Oracles({name: t for t, name in enumerate(known)}, awake_lora(method.base, 2)())
    wordings = [draw.wording for draw in draws]
    labels = method.base.loss(method.generate(wordings), method.answered(draws), 3)
    theirs = [draws[0], draws[2]]
    batch, student = method.answered(theirs), method.generate([draw.wording for draw in theirs])
    wanted, _ = method.base.label_logits(oracles.of(known), batch, 2)
    given, _ = method.base.label_logits(student, batch, 2)
    expected = (
        labels
        + method.recipe.logit_weight * kl_divergence(wanted, given)
        + method.recipe.parameter_weight * oracles.distance(student, known)
    )
    assert float(method.student_loss(oracles, draws)) == pytest.approx(float(expected), rel=1e-4)
    none = Oracles({"another": 0}, awake_lora(method.base, 1)())
    assert float(method.student_loss(none, draws)) == pytest.approx(float(labels), rel=1e-5)


def test_divergence_by_hand() -> None:
    wanted, given = (
        torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(),
        torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log(),
    )
    expected = (0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(0.5 / 0.75).log()) / 2
    assert float(kl_divergence(wanted, given + 3)) == pytest.approx(float(expected), rel=1e-5)
    assert float(kl_divergence(given, given)) == pytest.approx(0, abs=1e-7)
