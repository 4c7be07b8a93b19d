"""What the harness shows of a task and what it asks: the same for every method, whatever else is
measured beside it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from ship_ds.data.task import Example, Splits, SplitTask
from ship_ds.evaluation.config import Part

PARTS: tuple[Part, ...] = get_args(Part)
MIN_CHECKED = 10
"""Held-out inputs that an induced instruction is executed on, at least, where the task has as
many."""


@dataclass(frozen=True)
class Question:
    """A task, what a method is told of it, and what it is asked.

    wording: the instruction that deduction is given. shown: examples that induction and reasoning
    are given, drawn from the task's training examples. asked: its test examples. checked: these
    and, where they are fewer than ten, training examples that were not shown.
    """

    task: SplitTask
    wording: str
    shown: tuple[Example, ...]
    asked: tuple[Example, ...]
    checked: tuple[Example, ...]

    @property
    def right_texts(self) -> tuple[str, ...]:
        """Every right instruction text, those that training never shows included."""
        return (*self.task.wordings, *self.task.held_out_paraphrases)

    @property
    def inputs(self) -> list[str]:
        return [example.input for example in self.asked]


def ask(
    task: SplitTask,
    num_shown: int,
    seed: int,
    num_asked: int | None = None,
    part: Part = "seen",
) -> Question:
    """The question of a task, a function of (seed, task id) alone.

    The examples of a smaller `num_shown` are among those of a larger one, so that curves over it
    are of the same examples and some more.

    Args:
        num_shown: examples that are shown, 0 for none.
        seed: of the draw of these.
        num_asked: test examples that are asked, the first ones; None for all.
        part: where the task is asked; "unseen_paraphrase" words it as training never did.
    """
    order = random.Random(f"{seed} {task.id}").sample(task.train, len(task.train))
    shown = tuple(order[:num_shown])
    known = {example.input for example in (*shown, *task.test)}
    spare = [example for example in order[num_shown:] if example.input not in known]
    return Question(
        task,
        task.held_out_paraphrases[0] if part == "unseen_paraphrase" else task.task.instruction,
        shown,
        task.test[:num_asked],
        (*task.test, *spare[: max(0, MIN_CHECKED - len(task.test))]),
    )


def tasks_of(splits: Splits, part: Part, count: int) -> Sequence[SplitTask]:
    """At most `count` tasks of the part that have something to test on, evenly spaced."""
    if part == "unseen_paraphrase":
        return [task for task in tasks_of(splits, "seen", count) if task.held_out_paraphrases]
    return spread([task for task in getattr(splits, part) if task.test], count)


def spread(tasks: Sequence[SplitTask], count: int) -> Sequence[SplitTask]:
    """At most `count` tasks, evenly spaced, so that every family stays."""
    if count >= len(tasks):
        return tasks
    return [tasks[i * len(tasks) // count] for i in range(count)]
