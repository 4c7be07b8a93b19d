"""Oracle adapters: a LoRA for each seen task, trained on that task's examples. What generated
adapters are matched to.

Letters: T tasks, R LoRA rank, I inputs of a linear, O outputs of a linear.
"""

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from ship_ds.data.task import Example, SplitTask, spread
from ship_ds.evaluation.baselines.fitting import fit
from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.evaluation.baselines.static_adapters import TaskLoras
from ship_ds.evaluation.budgets import Budget, Spent, Steps
from ship_ds.model import budget as budgets
from ship_ds.model.adapters.lora import LoraAdapter

_MOST_IN_GROUP = 60
"""Tasks trained in one batch."""
_MOST_SCORED = 32
"""Examples of a task that its oracle is measured on."""
_ROOM_FOR_ORACLES = 2
"""Times what a batch may take (model/budget.py): 2 GiB on a CPU."""
_NOTHING = Spent()


class Oracles:
    """rows: task id -> row of `lora`; tasks without an oracle are not in it. used: by their
    training."""

    def __init__(self, rows: Mapping[str, int], lora: LoraAdapter, used: Spent = _NOTHING) -> None:
        self.rows, self.lora, self.used = rows, lora, used
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
    """Of the method's budget, at most; of as many examples as SHIP's training answered, where the
    method trains until dev stops."""
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
    """Oracles of the tasks: a group of them batched at a time, in random order; each LoRA sees its
    own task alone.

    No group is begun once the budget is spent: tasks that were not reached have no oracle, since a
    half-trained one would teach a wrong adapter. The first group is always trained. Nor has a task
    an oracle for which there is no room (`_most_oracles`).

    Args:
        base: whose Task LLM they adapt.
        tasks: with their training examples.
        budget: of all groups together; not one that dev ends, which is never spent.
        recipe: how long and how fast.
        examples_per_task: of a step.
        seed: of the order of the tasks, and of the examples that a step draws; where the LoRAs
            start is drawn by torch's own generator.

    Raises:
        UserError: a loss is not finite.
    """
    order = random.Random(f"{seed} oracles").sample(tasks, len(tasks))[: _most_oracles(base)]
    first, started, used = TaskLoras(base.sites, base.lora), time.perf_counter(), Spent()
    size, groups = group_size(base, [task.train for task in order], examples_per_task), []
    for start in range(0, len(order), size):
        used = used.after(0, 0, time.perf_counter() - started)
        # Between groups alone, and never before the first one.
        if start and budget.spent(used) >= 1:
            break
        group = order[start : start + size]
        title = f"oracles, group {start // size + 1} of {math.ceil(len(order) / size)}"
        examples = {task.id: task.train for task in group}
        groups.append(train_group(base, first, examples, recipe, examples_per_task, seed, title))
        num_examples = recipe.steps * examples_per_task * len(group)
        used = used.after(recipe.steps, num_examples, time.perf_counter() - started)
    lora = _joined(groups)
    return Oracles({task.id: t for t, task in enumerate(order[: lora.num_tasks])}, lora, used)


def train_group(
    base: FrozenBase,
    first: TaskLoras,
    examples: Mapping[str, Sequence[Example]],
    recipe: OracleRecipe,
    examples_per_task: int,
    seed: int,
    title: str,
) -> LoraAdapter:
    """A LoRA for each task, trained on its own examples alone; all in one batch.

    Args:
        base: whose Task LLM they adapt.
        first: where each of them starts.
        examples: of each task, by its id.
        recipe: how long and how fast.
        examples_per_task: of a step.
        seed: of the examples that a step draws.
        title: of the progress bar.
    """
    loras = TaskLoras(base.sites, base.lora, len(examples))
    loras.load_state_dict(
        {
            name: weight.expand_as(parameter)
            for (name, parameter), weight in zip(
                loras.state_dict().items(), first.state_dict().values(), strict=True
            )
        }
    )
    loras.to(base.device)

    def losses_at(step: int) -> Iterator[Tensor]:
        drawn = [
            draw(row, examples_per_task, f"{seed} oracle {step} {name}")
            for name, row in examples.items()
        ]
        return base.losses_per_task(
            lambda tasks: loras().rows(torch.tensor(tasks, device=base.device)),
            [[base.prompts.task_prompt(example.input) for example in row] for row in drawn],
            [[example.target for example in row] for row in drawn],
        )

    # Not clipped: the norm is of all LoRAs together, and one task's would scale the others.
    fit(loras.parameters(), losses_at, Steps(recipe.steps), recipe.lr, title, clip=math.inf)
    return loras.requires_grad_(False)()


def nats_a_token(base: FrozenBase, lora: LoraAdapter, examples: Sequence[Example]) -> float:
    """The mean loss of a task's targets under a LoRA of one task; of many examples of a few, evenly
    spaced.

    Args:
        base: whose Task LLM it adapts.
        lora: of one task.
        examples: of the task, at least one.

    Returns:
        Nats a token, ends of sequence among the tokens.
    """
    some = spread(examples, _MOST_SCORED)
    targets = [example.target for example in some]
    prompts = [base.prompts.task_prompt(example.input) for example in some]
    num_tokens = sum(len(base.prompts.target(text)) for text in targets)
    return float(-base.log_likelihoods(lora, prompts, targets).sum() / num_tokens)


def group_size(
    base: FrozenBase, examples: Sequence[Sequence[Example]], examples_per_task: int
) -> int:
    """Tasks trained side by side: their LoRAs, gradients and Adam's two moments have to fit, and a
    step is one batch at most, or a small budget would be spent on the first group.

    Args:
        base: whose Task LLM they adapt.
        examples: of each task; the first ones say how long a row is.
        examples_per_task: of a step.
    """
    free, form = budgets.bytes_free(base.device), base.prompts
    labels = [len(form.target(row[0].target)) for row in examples]
    asked = [len(form.task_prompt(row[0].input)) for row in examples]
    num_labels = math.ceil(fmean(labels))
    costs = base.task_llm.language_model.costs
    row = costs.trained_row(math.ceil(fmean(asked)) + num_labels, num_labels)
    in_a_step = free // (row * examples_per_task)
    return max(1, min(_MOST_IN_GROUP, free // (2 * base.adapter_bytes), in_a_step))


def _most_oracles(base: FrozenBase) -> int:
    """As many as may lie in memory while the hypernetwork learns from them."""
    return max(1, 2 * _ROOM_FOR_ORACLES * budgets.bytes_free(base.device) // base.adapter_bytes)


def _joined(groups: list[LoraAdapter]) -> LoraAdapter:
    """The LoRAs of all groups as one."""
    joined = {}
    for path in groups[0].factors:
        halves = zip(*(group.factors[path] for group in groups), strict=True)
        a_TRI, b_TOR = (torch.cat(half) for half in halves)
        joined[path] = a_TRI, b_TOR
    return replace(groups[0], factors=joined)


def draw(examples: Sequence[Example], count: int, key: str) -> list[Example]:
    """`count` of a task's examples, all different where there are enough; a function of `key`
    alone.

    Args:
        examples: of the task, at least one.
        count: how many; where the task has fewer, some come more than once.
        key: a text that tells this draw from others.

    Returns:
        The examples in random order.
    """
    rng = random.Random(key)
    if count <= len(examples):
        return rng.sample(examples, count)
    return rng.choices(examples, k=count)
