"""What the harness shows of a task and what it asks: the same for every method, whatever else is
measured beside it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ship_ds.data.task import Example, SplitTask

MIN_CHECKED = 10
"""Held-out inputs that an induced instruction is executed on, at least, where the task has as
many."""


@dataclass(frozen=True)
class Question:
    """A task with the examples that a method is shown, drawn from its training examples.

    asked: its test examples. checked: these and, where they are fewer than ten, training examples
    that were not shown.
    """

    task: SplitTask
    shown: tuple[Example, ...]
    asked: tuple[Example, ...]
    checked: tuple[Example, ...]

    @property
    def wordings(self) -> tuple[str, ...]:
        """Every right instruction text, those that training never shows included."""
        return (*self.task.wordings, *self.task.held_out_paraphrases)

    @property
    def inputs(self) -> list[str]:
        return [example.input for example in self.asked]


def ask(task: SplitTask, num_shown: int, seed: int) -> Question:
    """Keyed by (seed, task id) alone; the examples of a smaller `num_shown` are among those of a
    larger one."""
    order = random.Random(f"{seed} {task.id}").sample(task.train, len(task.train))
    shown = tuple(order[:num_shown])
    known = {example.input for example in (*shown, *task.test)}
    spare = [example for example in order[num_shown:] if example.input not in known]
    return Question(
        task, shown, task.test, (*task.test, *spare[: max(0, MIN_CHECKED - len(task.test))])
    )


def spread(tasks: Sequence[SplitTask], count: int) -> Sequence[SplitTask]:
    """At most `count` tasks, evenly spaced, so that every family stays."""
    if count >= len(tasks):
        return tasks
    return [tasks[i * len(tasks) // count] for i in range(count)]
