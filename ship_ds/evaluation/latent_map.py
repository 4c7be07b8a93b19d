"""Latents for two t-SNE figures: of a few tasks by where they are from (arXiv 2502.02315, section
4), and of all tasks by their category.

encoded: each wording's posterior mean. trained: found by gradient on a draw of the task's examples,
from the prior's mean. re-encoded: what the decoder makes of a trained latent, encoded again.

Letters: C candidates, T tasks, Z latent size.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ship_ds.api import Ship
from ship_ds.data.task import Splits, SplitTask, spread
from ship_ds.evaluation.questions import ask
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.gradient import Schedule, descend_on_latent

NUM_TASKS = 8
_NUM_DRAWS = 4
_NUM_SHOWN = 5


def latent_map(ship: Ship, splits: Splits, seed: int = 0) -> dict[str, Any]:
    """`points`: instruction, kind and latent of each. `tasks`: category, part and latent of every
    task's own instruction, where its format has categories.

    Args:
        ship: the run.
        splits: its tasks.
        seed: of the draws.
    """
    tasks = [
        *spread(splits.seen, NUM_TASKS // 2),
        *spread(splits.unseen, NUM_TASKS - NUM_TASKS // 2),
    ]
    draws = [(task, draw) for task in tasks for draw in range(_NUM_DRAWS)]
    trained_CZ = _trained(ship, draws, seed)
    owners = [task for task, _ in draws]
    wordings = [
        (task, text) for task in tasks for text in (*task.wordings, *task.held_out_paraphrases)
    ]
    points = _points(
        "encoded",
        [task for task, _ in wordings],
        ship.model.encode([text for _, text in wordings]),
    )
    points += _points("trained", owners, trained_CZ)
    if ship.model.decodes:
        texts = ship.model.decode(trained_CZ, ship.config.evaluation.max_instruction_tokens)
        points += _points("re-encoded", owners, ship.model.encode(texts))
    return {"bundle": ship.digest, "seed": seed, "points": points, "tasks": _tasks(ship, splits)}


def _tasks(ship: Ship, splits: Splits) -> list[dict[str, Any]]:
    parts = {"seen": splits.seen, "dev": splits.dev, "unseen": splits.unseen}
    tasks = [(part, task.task) for part, some in parts.items() for task in some if task.task.family]
    latent_TZ = ship.model.encode([task.instruction for _, task in tasks])
    return [
        {"category": task.family, "part": part, "latent": _rounded(latent_Z)}
        for (part, task), latent_Z in zip(tasks, latent_TZ.tolist(), strict=True)
    ]


def _trained(ship: Ship, draws: Sequence[tuple[SplitTask, int]], seed: int) -> Tensor:
    """One latent a draw; tasks with fewer examples than asked for repeat theirs, since all rows
    want equally many."""
    config = InductionConfig(method="direct")
    shown = [ask(task, _NUM_SHOWN, seed + draw).shown for task, draw in draws]
    # as many of each: a shorter list is repeated
    equal = [[examples[i % len(examples)] for i in range(_NUM_SHOWN)] for examples in shown]
    start_CZ = ship.model.prior.mean(len(draws))
    return descend_on_latent(
        ship.model,
        start_CZ,
        [""] * len(draws),
        equal,
        Schedule(config.steps, config.direct_lr, config.prior),
    ).latent_CZ


def _points(kind: str, tasks: Sequence[SplitTask], latent_CZ: Tensor) -> list[dict[str, Any]]:
    return [
        {
            "instruction": task.task.instruction,
            "kind": kind,
            "latent": _rounded(latent_Z),
        }
        for task, latent_Z in zip(tasks, latent_CZ.tolist(), strict=True)
    ]


def _rounded(latent_Z: Sequence[float]) -> list[float]:
    return [round(value, 5) for value in latent_Z]
