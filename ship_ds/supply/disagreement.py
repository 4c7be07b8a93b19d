"""Weights of tasks by how much their answers change when words of the instruction are dropped.

Prompt uncertainty of Active Instruction Tuning (Kung et al. 2023, arXiv 2311.00288): tasks on which
a model is sensitive to the wording are those that it learns most from. Theirs is the change of the
answer's likelihood; ours the share of answers that change, under the run's adapters.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ship_ds.api import Ship
from ship_ds.console import Log
from ship_ds.data.readers.jsonl import row_of
from ship_ds.data.task import SMALLEST_WEIGHT, Task
from ship_ds.inference.deduction import answer_read
from ship_ds.monitor.progress import ProgressLine
from ship_ds.supply.config import DisagreementConfig
from ship_ds.supply.journal import Journal, SupplyPart
from ship_ds.supply.known import is_readable, readable_inputs


def shortened(text: str, count: int, share: float, seed: int) -> list[str]:
    """The text with words left out at random, `count` times; a text of one word has no such.

    Args:
        text: an instruction.
        count: of shortened ones.
        share: of the words that is left out on average; one at least goes, and one stays.
        seed: of the draws, which depend on the text as well.
    """
    words = text.split()
    if len(words) < 2:
        return []
    rng, texts = random.Random(f"drop {seed} {text}"), []
    for _ in range(count):
        dropped = {i for i in range(len(words)) if rng.random() < share}
        dropped = dropped or {rng.randrange(len(words))}
        if len(dropped) == len(words):
            dropped.remove(rng.choice(sorted(dropped)))
        texts.append(" ".join(word for i, word in enumerate(words) if i not in dropped))
    return texts


def change(answers: Sequence[str | None], others: Sequence[Sequence[str | None]]) -> float:
    """Of the answers under other wordings, the share that are not those under the own one."""
    changed = [a != b for row in others for a, b in zip(answers, row, strict=True)]
    return sum(changed) / len(changed) if changed else 0.0


def weights_of(disagreements: Sequence[float], floor: float) -> list[float]:
    """Weights in proportion to disagreement plus `floor`, with a mean of 1."""
    if not disagreements:
        return []
    raised = [value + floor for value in disagreements]
    mean = sum(raised) / len(raised)
    return [max(SMALLEST_WEIGHT, round(value / mean, 4)) for value in raised]


def measure_disagreement(
    ship: Ship,
    tasks: Sequence[Task],
    config: DisagreementConfig,
    seed: int,
    journal: Journal,
    log: Log,
) -> None:
    """Add to the journal each task with its disagreement, in parts.

    A task that the run cannot read, or that has no words to drop, is counted and has none: its
    weight is 1.

    Args:
        ship: answers.
        tasks: that are looked at.
        config: how many shortened instructions a task has, and how many of its inputs are answered.
        seed: of the draws of words.
        journal: that is gone on with.
        log: takes lines of progress.
    """
    size = config.num_at_once
    with ProgressLine("supply", len(tasks), log=log) as progress:
        progress.done(min(len(tasks), size * len(journal.parts)))
        for start in range(size * len(journal.parts), len(tasks), size):
            progress.begin("disagreement")
            journal.add(_part(ship, tasks[start : start + size], config, seed))
            progress.done(len(tasks[start : start + size]))


def _part(ship: Ship, tasks: Sequence[Task], config: DisagreementConfig, seed: int) -> SupplyPart:
    counts: dict[str, int] = {}
    read: list[tuple[Task, list[str], list[str]]] = []
    for task in tasks:
        others = shortened(task.instruction, config.num_dropped, config.drop_share, seed)
        others = [text for text in others if is_readable(ship, text)]
        end = "measured"
        if not is_readable(ship, task.instruction):
            end = "unreadable"
        elif not others or not (inputs := readable_inputs(ship, task, config.num_inputs)):
            end = "nothing to compare"
        else:
            read.append((task, others, inputs))
        counts[end] = counts.get(end, 0) + 1
    # All wordings of all tasks at once: they share batches.
    wordings = [text for task, others, _ in read for text in (task.instruction, *others)]
    rows_of_inputs = [inputs for _, others, inputs in read for _ in range(1 + len(others))]
    length = ship.config.evaluation.max_new_tokens
    answers = iter(answer_read(ship.model, wordings, wordings, rows_of_inputs, length))
    disagreements: dict[int, float] = {}
    for task, others, _ in read:
        whole, *rest = (next(answers) for _ in range(1 + len(others)))
        disagreements[id(task)] = round(change(whole, rest), 4)
    rows = [
        row_of(
            replace(task, weight=1.0),
            {
                "how": "disagreement",
                "disagreement": disagreements.get(id(task)),
                "run": ship.digest[:12],
            },
        )
        for task in tasks
    ]
    return SupplyPart(counts, rows)


def weighted_by_disagreement(rows: Sequence[dict[str, Any]], floor: float) -> list[dict[str, Any]]:
    """The lines with their weights: 1 where nothing was measured."""
    disagreements = [row["origin"]["disagreement"] for row in rows]
    measured = iter(weights_of([one for one in disagreements if one is not None], floor))
    weights = [1.0 if one is None else next(measured) for one in disagreements]
    return [
        {**{k: v for k, v in row.items() if k != "origin"}, "weight": w, "origin": row["origin"]}
        for row, w in zip(rows, weights, strict=True)
    ]
