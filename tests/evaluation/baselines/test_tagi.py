"""TAGI's loss is the sum of its three parts, of which tasks without an oracle have the first
alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ship_ds.evaluation.baselines.oracles import Oracles
from ship_ds.evaluation.baselines.tagi import Tagi, kl_divergence
from ship_ds.evaluation.baselines.trained import targets_of
from tests.evaluation.baselines.test_frozen_base import awake_lora


@torch.no_grad()
def test_three_losses(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    method = make(Tagi)
    draws = method.sampler.draw_step(0)
    known = [draws[0].task_id, draws[2].task_id]
    oracles = Oracles({name: t for t, name in enumerate(known)}, awake_lora(method.base, 2)())
    wordings = [draw.wording for draw in draws]
    asked, targets = method.questions(draws), targets_of(draws)
    labels = sum(method.base.losses(method.generate(wordings), asked, targets))
    theirs = [draws[0], draws[2]]
    rows = [example for draw in theirs for example in draw.answered]
    batch = method.base.batch(
        [method.base.prompts.task_prompt(example.input) for example in rows],
        [example.target for example in rows],
    )
    student = method.generate([draw.wording for draw in theirs])
    wanted, _ = method.base.label_logits(oracles.of(known), batch, 2)
    given, _ = method.base.label_logits(student, batch, 2)
    expected = (
        labels
        + method.recipe.logit_weight * kl_divergence(wanted, given)
        + method.recipe.parameter_weight * oracles.distance(student, known)
    )
    none = Oracles({"another": 0}, awake_lora(method.base, 1)())
    for room, num_pieces in ((1 << 30, 1), (1, 6)):
        monkeypatch.setattr("ship_ds.model.budget.bytes_free", lambda device, room=room: room)
        pieces = list(method.student_losses(oracles, draws))
        assert len(pieces) == num_pieces, "three tasks of two examples"
        assert float(sum(pieces)) == pytest.approx(float(expected), rel=1e-4)
        alone = sum(method.student_losses(none, draws))
        assert float(alone) == pytest.approx(float(labels), rel=1e-5)


def test_divergence_by_hand() -> None:
    wanted, given = (
        torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(),
        torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log(),
    )
    expected = (0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(0.5 / 0.75).log()) / 2
    assert float(kl_divergence(wanted, given + 3)) == pytest.approx(float(expected), rel=1e-5)
    assert float(kl_divergence(given, given)) == pytest.approx(0, abs=1e-7)
