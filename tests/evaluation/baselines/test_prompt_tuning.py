"""Prompt tuning from shown examples: each task on its own, though all in one batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ship_ds.data.task import Splits
from ship_ds.evaluation.baselines.prompt_tuning import PromptTuning, PromptTuningRecipe


def test_tasks_tuned_together_are_as_if_tuned_alone(
    make: Callable[..., Any], splits: Splits, monkeypatch: Any
) -> None:
    monkeypatch.setattr(
        PromptTuning,
        "recipe",
        PromptTuningRecipe(num_virtual_tokens=4, reasoning_steps=4, reasoning_lr=1e-3),
    )
    method = make(PromptTuning)
    # Of another number than the next one's, which is no multiple of it.
    shown = [splits.seen[0].train[:2], splits.seen[3].train[:3], splits.seen[1].train[:2]]
    together = method.tune(shown).prompt_TPH
    assert together.shape == (3, 4, 128)
    for task, row in enumerate(shown):
        alone = method.tune([row]).prompt_TPH[0]
        torch.testing.assert_close(together[task], alone, rtol=0, atol=2e-4)
    assert float((together[0] - together[1]).detach().abs().max()) > 4e-4


@pytest.mark.slow
def test_shown_examples_are_learnt(
    make: Callable[..., Any], splits: Splits, monkeypatch: Any
) -> None:
    monkeypatch.setattr(PromptTuning, "recipe", PromptTuningRecipe(reasoning_steps=50))
    method = make(PromptTuning)
    shown = [task.train[:2] for task in (splits.seen[0], splits.seen[3])]
    answers = method.reason(shown, [[e.input for e in row] for row in shown])
    assert answers == [[e.target for e in row] for row in shown]
