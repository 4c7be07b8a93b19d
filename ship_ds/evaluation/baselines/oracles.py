"""Oracle adapters: a LoRA for each seen task, trained on that task's examples. What generated
adapters are matched to.

Letters: T tasks, R LoRA rank, I inputs of a linear, O outputs of a linear.
"""

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ship_ds.data.task import Example, SplitTask
from ship_ds.evaluation.baselines.fitting import Budget, Steps, fit
from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.evaluation.baselines.static_adapters import StaticLora
from ship_ds.model.adapters.lora import LoraAdapter

_GROUP = 60
"""Tasks trained in one batch."""


class Oracles:
    """rows: task id -> row of `lora`; tasks without an oracle are not in it."""

    def __init__(self, rows: Mapping[str, int], lora: LoraAdapter) -> None:
        self.rows, self.lora = rows, lora
        self.variances = {
            path: (_variance(a_TRI), _variance(b_TOR))
            for path, (a_TRI, b_TOR) in lora.factors.items()
        }

    def of(self, task_ids: Sequence[str]) -> LoraAdapter:
        device = next(iter(self.lora.factors.values()))[0].device
        return self.lora.rows(
            torch.tensor([self.rows[task_id] for task_id in task_ids], device=device)
        )

    def distance(self, made: LoraAdapter, task_ids: Sequence[str]) -> Tensor:
        """Mean squared difference of A and of B in units of their spread over tasks, averaged over
        the sites.

        In those units a site with small weights counts as much as one with large ones, and
        predicting the mean adapter costs 1 (Charakorn et al. 2025 standardise the targets for the
        same reason).
        """
        oracles = self.of(task_ids)
        terms = [
            (factor - target).square().mean() / variance
            for path, pair in made.factors.items()
            for factor, target, variance in zip(
                pair, oracles.factors[path], self.variances[path], strict=True
            )
        ]
        return torch.stack(terms).mean()


def _variance(factor: Tensor) -> Tensor:
    """Over tasks, averaged over entries; never zero, as one task alone would make it."""
    return factor.var(0, correction=0).mean().clamp(min=1e-8)


@dataclass(frozen=True)
class OracleRecipe:
    """How the LoRA of each single task is trained."""

    share: float = 0.4
    """Of the method's budget, at most."""
    steps: int = 40
    """Of 60 seen rules of the quickstart, test inputs: 0.67 after 24 steps (10 s on two cores),
    0.80 after 40 (16 s), 0.88 after 80 (27 s); one run each."""
    lr: float = 1e-2


def train_oracles(
    base: FrozenBase,
    tasks: Sequence[SplitTask],
    budget: Budget,
    recipe: OracleRecipe,
    examples_per_task: int,
    seed: int,
) -> Oracles:
    """A group of tasks batched at a time, in random order; each LoRA sees its own task alone.

    No group is begun once the budget is spent: tasks that were not reached have no oracle, since a
    half-trained one would teach a wrong adapter. The first group is always trained.
    """
    order = random.Random(f"{seed} oracles").sample(tasks, len(tasks))
    num_groups = math.ceil(len(order) / _GROUP)
    whole, started = _fresh(base, len(order)), time.perf_counter()
    num_trained = 0
    for number in range(num_groups):
        if number and budget.spent(number * recipe.steps, time.perf_counter() - started) >= 1:
            break
        group = order[number * _GROUP : (number + 1) * _GROUP]
        loras, rows = _fresh(base, len(group)), slice(num_trained, num_trained + len(group))
        loras.load_state_dict({name: weight[rows] for name, weight in whole.state_dict().items()})

        def loss_at(
            step: int, loras: StaticLora = loras, group: Sequence[SplitTask] = group
        ) -> Tensor:
            drawn = [
                example
                for task in group
                for example in draw(task, examples_per_task, f"{seed} oracle {step} {task.id}")
            ]
            batch = base.batch(
                [base.prompts.task_prompt(e.input) for e in drawn], [e.target for e in drawn]
            )
            return base.loss_per_task(loras(), batch, len(group))

        title = f"oracles, group {number + 1} of {num_groups}"
        fit(loras.parameters(), loss_at, Steps(recipe.steps), recipe.lr, title, clip=math.inf)
        with torch.no_grad():
            for weight, trained in zip(whole.parameters(), loras.parameters(), strict=True):
                weight[rows] = trained
        num_trained += len(group)
    whole.requires_grad_(False)
    trained_rows = whole().rows(torch.arange(num_trained, device=base.device))
    return Oracles({task.id: t for t, task in enumerate(order[:num_trained])}, trained_rows)


def _fresh(base: FrozenBase, num_tasks: int) -> StaticLora:
    return StaticLora(base.sites, base.lora, num_tasks).to(base.device)


def draw(task: SplitTask, count: int, key: str) -> list[Example]:
    """`count` training examples, all different where there are enough; a function of `key`
    alone."""
    rng = random.Random(key)
    return (
        rng.sample(task.train, count)
        if count <= len(task.train)
        else rng.choices(task.train, k=count)
    )
