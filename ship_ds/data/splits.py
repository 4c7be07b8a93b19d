"""Seen, dev and unseen tasks, parted by rule and not by task; train and test examples parted within a task.

Two tasks are one rule when they state the same instruction (list functions repeat some) or when the token sets of their
instructions have a Jaccard index of 0.8 or more (Super-NaturalInstructions has many near copies).
"""

import random
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from ship_ds.data.task import DataError, Example, Splits, SplitTask, Task

SAME_RULE_JACCARD = 0.8


class SplitConfig(BaseModel):
    """The shares are of rule groups."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    unseen_share: float = Field(0.1, gt=0, lt=1)
    dev_share: float = Field(0.05, gt=0, lt=1)
    test_examples: PositiveInt = 5
    """The last ones of each task; a task with fewer than twice as many keeps half of its examples for training."""


def split_tasks(tasks: Sequence[Task], config: SplitConfig) -> Splits:
    """A pure function of tasks and config. Raises DataError with fewer than three rules, or when seen would be empty."""
    groups = rule_groups(tasks)
    num_unseen, num_dev = (max(1, round(share * len(groups))) for share in (config.unseen_share, config.dev_share))
    if len(groups) <= num_unseen + num_dev:
        raise DataError(
            f"data: {len(tasks)} tasks are {len(groups)} distinct rules, too few for a seen, a dev and an unseen part; "
            "give more tasks or lower data.split.unseen_share and dev_share"
        )
    random.Random(f"split {config.seed}").shuffle(groups)
    parts = groups[num_unseen + num_dev :], groups[num_unseen : num_unseen + num_dev], groups[:num_unseen]
    seen, dev, unseen = (
        tuple(_split_examples(tasks[i], config.test_examples) for i in sorted(i for group in part for i in group))
        for part in parts
    )
    return Splits(seen, dev, unseen)


def _split_examples(task: Task, num_test: int) -> SplitTask:
    """Examples with equal inputs stay on one side, so that no test input was trained on."""
    by_input: dict[str, list[Example]] = {}
    for example in task.examples:
        by_input.setdefault(example.input, []).append(example)
    inputs = list(by_input)
    if len(inputs) < 2:
        raise DataError(f"{task.source}: task {task.id!r} has {len(inputs)} distinct input(s); two are needed to train and test")
    first_test = max(len(inputs) - num_test, (len(inputs) + 1) // 2)
    train, test = (
        tuple(example for text in part for example in by_input[text]) for part in (inputs[:first_test], inputs[first_test:])
    )
    return SplitTask(task, train, test[:num_test])


def rule_groups(tasks: Sequence[Task]) -> list[list[int]]:
    """Indices of the tasks, grouped into rules, in order of their first task."""
    words = [frozenset(task.instruction.lower().split()) for task in tasks]
    parent = list(range(len(tasks)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    holders: dict[str, list[int]] = {}
    for i, own in enumerate(words):
        shared = Counter(j for word in own for j in holders.get(word, ()))
        for j, common in shared.items():
            if common >= SAME_RULE_JACCARD * (len(own) + len(words[j]) - common):
                parent[root(i)] = root(j)
        for word in own:
            holders.setdefault(word, []).append(i)
    groups: dict[int, list[int]] = {}
    for i in range(len(tasks)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())
