"""What the harness shows of a task and what it asks: the same for every method, whatever else is
measured beside it."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from ship_ds.console import Log
from ship_ds.data.task import Example, Splits, SplitTask, spread
from ship_ds.evaluation.config import Part
from ship_ds.prompt import PromptFormat

PARTS: tuple[Part, ...] = get_args(Part)
READ_DRAW = 2
"""Version of the draw of `examples_to_read`, which is in the settings of the methods that use it.
In version 1 the examples of a smaller number were not always among those of a larger one."""
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
        task: that is asked.
        num_shown: examples that are shown, 0 for none.
        seed: of the draw of these.
        num_asked: test examples that are asked, the first ones; None for all.
        part: where the task is asked; "unseen_paraphrase" words it as training never did.
    """
    order = _in_random_order(task, seed)
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


def examples_to_read(task: SplitTask, count: int, seed: int) -> tuple[Example, ...]:
    """Training examples of a task that a method is given beside its instruction; fewer where the
    task has fewer.

    The first of those that `ask` shows, so the same for every method, and those of a smaller count
    are among those of a larger one.

    Args:
        task: with its training examples.
        count: at most.
        seed: of their order.
    """
    return tuple(_in_random_order(task, seed)[:count])


def _in_random_order(task: SplitTask, seed: int) -> list[Example]:
    """The training examples; files are often sorted by their answers."""
    return random.Random(f"{seed} {task.id}").sample(task.train, len(task.train))


def another_instruction(task: SplitTask, seen: Sequence[SplitTask], seed: int) -> str:
    """The instruction of a seen task drawn for this one, a function of (seed, task id) alone:
    whichever tasks are measured beside it and on however many ranks.

    Args:
        task: whose own instruction it is not, where there is another.
        seen: the tasks that are drawn from.
        seed: of the draw.
    """
    # With one seen task there is no other: its own instruction is all that can be drawn.
    others = [one for one in seen if one.id != task.id] or seen
    rng = random.Random(f"{seed} shuffled {task.id}")
    drawn, stated = rng.choice(others).task.instruction, task.task.instruction
    if drawn != stated:
        return drawn
    # Another task says the same. Drawn again, so that no other task's draw is another than before.
    different = [text for one in others if (text := one.task.instruction) != stated]
    return rng.choice(different or [stated])


def warn_of_long_targets(
    tasks: Iterable[SplitTask], form: PromptFormat, max_new_tokens: int, log: Log
) -> None:
    """One line about test examples none of whose right answers ends within the limit: whatever a
    model learns, exact match is zero there.

    Args:
        tasks: with their test examples.
        form: of the Task LLM.
        max_new_tokens: of an answer, its end included.
        log: takes the line.
    """
    lengths = {
        task.id: [min(len(form.target(text)) for text in one.answers) for one in task.test]
        for task in tasks
    }
    long = {id: sum(length > max_new_tokens for length in row) for id, row in lengths.items()}
    if not any(long.values()):
        return
    most = max(long, key=long.__getitem__)
    enough = max(map(max, filter(None, lengths.values())))
    log(
        f"evaluation.max_new_tokens: no right answer ends within {max_new_tokens} tokens to "
        f"{sum(long.values())} of {sum(map(len, lengths.values()))} test examples, of "
        f"{sum(map(bool, long.values()))} tasks, most of them of {most}; {enough} is enough for all"
    )


def tasks_of(splits: Splits, part: Part, count: int) -> Sequence[SplitTask]:
    """At most `count` tasks of the part that have something to test on, evenly spaced.

    Args:
        splits: of the run.
        part: seen, dev or unseen; unseen_paraphrase: the seen tasks with paraphrases held out.
        count: at most.
    """
    if part == "unseen_paraphrase":
        return [task for task in tasks_of(splits, "seen", count) if task.held_out_paraphrases]
    return spread([task for task in getattr(splits, part) if task.test], count)
