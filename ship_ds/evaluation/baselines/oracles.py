"""Oracle adapters: a LoRA for each seen task, trained on that task's examples. What generated adapters are matched to.

Letters: T tasks, R rank, I in, O out.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ship_ds.data.task import Example, SplitTask
from ship_ds.evaluation.baselines.fitting import Budget, fit
from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.evaluation.baselines.static_adapters import StaticLora
from ship_ds.model.adapters import LoraAdapter

_GROUP = 60
"""Tasks trained in one batch."""


@dataclass(frozen=True)
class Oracles:
    """lora: row t is the LoRA of the task `ids[t]`."""

    ids: dict[str, int]
    lora: LoraAdapter

    def of(self, task_ids: Sequence[str], device: torch.device) -> LoraAdapter:
        return self.lora.rows(torch.tensor([self.ids[task_id] for task_id in task_ids], device=device))

    def distance(self, made: LoraAdapter, task_ids: Sequence[str]) -> Tensor:
        """Mean squared difference of A and of B in units of their spread over tasks, averaged over the sites.

        In those units a site with small weights counts as much as one with large ones, and predicting the mean adapter
        costs 1 (Charakorn et al. 2025 standardise the targets for the same reason).
        """
        device = next(iter(made.factors.values()))[0].device
        wanted = self.of(task_ids, device)
        terms = [
            (mine - target).square().mean() / variance
            for path, pair in made.factors.items()
            for mine, target, variance in zip(pair, wanted.factors[path], self._variances()[path], strict=True)
        ]
        return torch.stack(terms).mean()

    def _variances(self) -> dict[str, tuple[Tensor, Tensor]]:
        if not hasattr(self, "_cached"):
            object.__setattr__(self, "_cached", {
                path: (_variance(a_TRI), _variance(b_TOR)) for path, (a_TRI, b_TOR) in self.lora.factors.items()
            })
        return self._cached  # type: ignore[attr-defined]


def _variance(factor: Tensor) -> Tensor:
    """Over tasks, averaged over entries; never zero, as one task alone would make it."""
    return factor.var(0, correction=0).mean().clamp(min=1e-8)


def train_oracles(
    base: FrozenBase, tasks: Sequence[SplitTask], budget: Budget, examples_per_task: int, lr: float, seed: int
) -> Oracles:
    """All tasks get equal shares of the budget, a group of tasks batched at a time; each LoRA sees its own task alone."""
    lora = StaticLora(base.sites, base.lora, len(tasks)).to(base.device)
    groups = [range(start, min(start + _GROUP, len(tasks))) for start in range(0, len(tasks), _GROUP)]
    for number, group in enumerate(groups):
        own = StaticLora(base.sites, base.lora, len(group)).to(base.device)
        rows = slice(group.start, group.stop)
        own.load_state_dict({name: weight[rows] for name, weight in lora.state_dict().items()})
        chosen = [tasks[t] for t in group]

        def loss_at(step: int, own: StaticLora = own, chosen: Sequence[SplitTask] = chosen) -> Tensor:
            drawn = [example for task in chosen for example in draw(task, examples_per_task, f"{seed} oracle {step} {task.id}")]
            batch = base.batch([base.prompts.task_prompt(e.input) for e in drawn], [e.target for e in drawn])
            return base.loss_per_task(own(), batch, len(chosen))

        title = f"oracles, group {number + 1} of {len(groups)}"
        fit(own.parameters(), loss_at, budget.share(len(group) / len(tasks)), lr, title, clip=math.inf)
        with torch.no_grad():
            for whole, part in zip(lora.parameters(), own.parameters(), strict=True):
                whole[rows] = part
    lora.requires_grad_(False)
    return Oracles({task.id: t for t, task in enumerate(tasks)}, lora())


def draw(task: SplitTask, count: int, key: str) -> list[Example]:
    """`count` training examples, all different where there are enough; a function of `key` alone."""
    rng = random.Random(key)
    return rng.sample(task.train, count) if count <= len(task.train) else rng.choices(task.train, k=count)
