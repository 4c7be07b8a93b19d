"""Oracle LoRAs fit their own task, and distances to them are in units of their spread."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ship_ds.api import Ship
from ship_ds.data.matching import exact_match
from ship_ds.data.task import Splits, SplitTask
from ship_ds.evaluation.baselines import oracles
from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.evaluation.baselines.oracles import (
    OracleRecipe,
    Oracles,
    group_size,
    train_oracles,
)
from ship_ds.evaluation.baselines.tagi import Tagi
from ship_ds.evaluation.budgets import AnsweredExamples, Steps, UntilDevStops
from ship_ds.model.adapters.lora import LoraAdapter

pytestmark = pytest.mark.slow


def right(base: FrozenBase, oracles: Oracles, adapter_of: SplitTask, task: SplitTask) -> int:
    questions = [[base.prompts.task_prompt(e.input) for e in task.train]]
    (answers,) = base.answer(questions, lambda _: oracles.of([adapter_of.id]))
    return sum(
        exact_match(answer, e.answers) for answer, e in zip(answers, task.train, strict=True)
    )


def test_oracle_fits_the_examples_of_its_task_and_not_of_another(
    ship: Ship, splits: Splits
) -> None:
    base, (one, other) = FrozenBase.of_run(ship), (splits.seen[0], splits.seen[3])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        oracles = train_oracles(base, [one, other], Steps(1), OracleRecipe(steps=50, lr=3e-2), 6, 0)
    for task, stranger in ((one, other), (other, one)):
        assert right(base, oracles, task, task) == len(task.train)
        assert right(base, oracles, stranger, task) < len(task.train)


def test_groups_change_nothing_and_none_begins_without_budget(
    ship: Ship, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tasks = FrozenBase.of_run(ship), splits.seen[:2]

    def train(num_steps: int) -> Oracles:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return train_oracles(
                base, tasks, Steps(num_steps), OracleRecipe(steps=3, lr=1e-3), 2, 0
            )

    together = train(3)
    monkeypatch.setattr("ship_ds.evaluation.baselines.oracles._MOST_IN_GROUP", 1)
    apart = train(4)
    assert apart.rows == together.rows and together.rows.keys() == {task.id for task in tasks}
    for path, pair in together.lora.factors.items():
        for mine, alone in zip(pair, apart.lora.factors[path], strict=True):
            assert not torch.equal(mine[0], mine[1])
            # three steps of at most 1.5e-4 moved them
            torch.testing.assert_close(mine, alone, rtol=0, atol=2e-4)
    assert list(train(3).rows) == list(together.rows)[:1]


@pytest.mark.parametrize(("examples", "num_oracles"), [(30, 2), (1000, 6)])
def test_oracles_end_though_no_dev_score_ends_them(
    make: Callable[..., Any], examples: int, num_oracles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the six seen tasks takes three steps of two examples, of 0.4 times what there is."""
    monkeypatch.setattr("ship_ds.evaluation.baselines.oracles._MOST_IN_GROUP", 1)
    method = make(Tagi)
    method.budget = UntilDevStops(patience=2, examples=examples)
    assert len(method.train_oracles(method.recipe.oracles).rows) == num_oracles


def test_distance_is_nought_to_itself_and_one_from_the_mean() -> None:
    torch.manual_seed(0)
    factors = {
        path: (torch.randn(5, 2, 7) * scale, torch.randn(5, 3, 2))
        for path, scale in (("x", 1.0), ("y", 100.0))
    }
    ids = ["a", "b", "c", "d", "e"]
    oracles = Oracles({name: t for t, name in enumerate(ids)}, LoraAdapter(factors, 2.0))
    assert float(oracles.distance(oracles.of(ids), ids)) == 0
    mean = {
        path: tuple(f.mean(0, keepdim=True).expand_as(f) for f in pair)
        for path, pair in factors.items()
    }
    assert float(oracles.distance(LoraAdapter(mean, 2.0), ids)) == pytest.approx(1, abs=1e-5)  # type: ignore[arg-type]
    picked = oracles.of(["d", "a"])
    assert torch.equal(picked.factors["y"][0], factors["y"][0][[3, 0]])


def test_a_group_is_no_larger_than_a_step_that_fits(
    ship: Ship, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a small budget would be spent on the first group."""
    base, examples = FrozenBase.of_run(ship), [task.train for task in splits.seen]
    free = 1000 * base.adapter_bytes
    monkeypatch.setattr(oracles.budgets, "bytes_free", lambda device: free)
    sizes = [group_size(base, examples, per_task) for per_task in (1, 10, 10**6)]
    assert sizes[0] > sizes[1] > sizes[2] == 1
    free = 2 * base.adapter_bytes
    assert group_size(base, examples, 1) == 1, "nor than the memory for its LoRAs"


@pytest.mark.parametrize(("examples", "left"), [(360, 0.9), (60, 0.6)])
def test_what_oracles_do_not_need_is_the_next_stages(
    make: Callable[..., Any], examples: int, left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six tasks take three steps of two examples: 36, of a share of 0.4."""
    method = make(Tagi)
    method.budget = AnsweredExamples(examples)
    budgets: list[Any] = []
    monkeypatch.setattr(Tagi, "fit", lambda self, losses, budget, *rest: budgets.append(budget))
    method.train()
    assert budgets == [AnsweredExamples(round(examples * left))]
