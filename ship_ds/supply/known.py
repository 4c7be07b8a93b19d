"""The tasks that a supply starts from, and those that it must not give away."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from ship_ds.api import Ship
from ship_ds.console import Log, no_log
from ship_ds.data.readers import read_tasks
from ship_ds.data.source import source_of
from ship_ds.data.splits import is_near_copy, not_held_out
from ship_ds.data.task import Example, Splits, SplitTask, Task
from ship_ds.errors import UserError
from ship_ds.inference import checks


@dataclass(frozen=True)
class Known:
    """What a supply knows.

    Args:
        tasks: to start from, without those of held-out rules.
        wordings: of these and of the run's seen tasks, those that training never shows among them.
        held_out: the run's dev and unseen tasks.
        run_tasks: its seen tasks, with training examples alone; none where its data cannot be read.
        left_out: how many tasks of the file were held-out rules.
    """

    tasks: tuple[Task, ...]
    wordings: tuple[str, ...]
    held_out: tuple[SplitTask, ...] = ()
    run_tasks: tuple[Task, ...] = ()
    left_out: int = 0

    @property
    def fingerprint(self) -> str:
        """Of all that is known, but not of where it was read."""
        # Weight and inputs beside the task: its repr leaves both out.
        tasks = [(replace(task, source=""), task.weight, task.inputs) for task in self.tasks]
        others = [_wordings(one) for one in self.held_out]
        return hashlib.sha256(repr((tasks, self.wordings, others)).encode()).hexdigest()

    def lenders(self, ship: Ship) -> dict[str, Task]:
        """By their instruction: tasks whose inputs an instruction without any may take, those to
        start from and the run's own."""
        # The last one of an instruction stays: the file's, before the run's own.
        return {
            one.instruction: one
            for one in (*self.run_tasks, *self.tasks)
            if is_readable(ship, one.instruction) and readable_inputs(ship, one, 1)
        }

    def give_away(self, tasks: Sequence[Task]) -> list[bool]:
        """Of each task whether it is a rule that the run holds out."""
        return is_near_copy(tasks, self.held_out)

    @property
    def held_out_wordings(self) -> list[str]:
        """Of dev and unseen tasks."""
        return [text for one in self.held_out for text in _wordings(one)]


def known_tasks(ship: Ship, path: Path | None, log: Log) -> Known:
    """Tasks of a file or folder, or those that the run trains on, with training examples alone.

    Args:
        ship: the run, whose dev and unseen rules are left out of the file's tasks.
        path: of the file or folder; None: the run's own tasks.
        log: is told where the run's own tasks cannot be read.

    Raises:
        UserError: there is no path and the run's data are not where they were, or every task of the
            file is a held-out rule.
    """
    try:
        parts = parts_of(ship)
    except (UserError, OSError) as error:
        if path is None:
            raise UserError(
                f"--data: the run's own cannot be read ({error}); give a file"
            ) from None
        log(f"the run's own data cannot be read ({error}): its dev and unseen rules stay in")
        parts = Splits((), (), ())
    held_out = (*parts.dev, *parts.unseen)
    run_wordings = [text for one in parts.seen for text in _wordings(one)]
    run_tasks = tuple(replace(one.task, examples=one.train, id=one.id) for one in parts.seen)
    if path is None:
        return Known(run_tasks, tuple(run_wordings), held_out, run_tasks)
    whole = read_tasks(path, "auto", Counter())
    read = [replace(task, examples=not_held_out(task)) for task in whole]
    num_tests = sum(len(task.examples) for task in whole) - sum(len(x.examples) for x in read)
    if num_tests:
        log(f"--data {path}: {num_tests} test examples of its format are left out")
    secret = is_near_copy(read, held_out)
    tasks = tuple(task for task, is_secret in zip(read, secret, strict=True) if not is_secret)
    if not tasks:
        raise UserError(
            f"--data {path}: every task is a dev or unseen rule of the run; give others"
        )
    wordings = [text for task in tasks for text in (task.instruction, *task.paraphrases)]
    wordings = list(dict.fromkeys([*wordings, *run_wordings]))
    return Known(tasks, tuple(wordings), held_out, run_tasks, len(read) - len(tasks))


def parts_of(ship: Ship) -> Splits:
    """The run's own tasks."""
    return source_of(ship.config.data).read(ship.model.prompts.tokenizer, no_log)


def _wordings(one: SplitTask) -> tuple[str, ...]:
    return (one.task.instruction, *one.task.paraphrases, *one.held_out_paraphrases)


def inputs_of(task: Task, count: int, order: Sequence[int] | None = None) -> list[str]:
    """Up to `count` distinct inputs, in the order of the examples or in another one, and then those
    without a label.

    Args:
        task: whose inputs they are.
        count: at most.
        order: places of the examples that are taken, in this order; None: all, as they stand.
    """
    picked = task.examples if order is None else [task.examples[i] for i in order]
    return list(dict.fromkeys([*(example.input for example in picked), *task.inputs]))[:count]


def readable_inputs(
    ship: Ship,
    task: Task,
    count: int,
    order: Sequence[int] | None = None,
    instruction: str | None = None,
) -> list[str]:
    """As `inputs_of`, without those that the run cannot read and answer.

    Args:
        ship: the run.
        task: whose inputs they are.
        count: at most.
        order: see `inputs_of`.
        instruction: under whose adapter they are answered; None: the task's own.
    """
    text = task.instruction if instruction is None else instruction
    inputs = inputs_of(task, len(task.examples) + len(task.inputs), order)
    return list(islice((one for one in inputs if can_answer(ship, text, one)), count))


def can_answer(ship: Ship, instruction: str, text: str) -> bool:
    """Whether the run can read an input and answer it under the adapter of an instruction.

    Args:
        ship: the run.
        instruction: that it can read (`is_readable`).
        text: the input.
    """
    try:
        checks.check_inputs(ship.model, [text], ship.config.evaluation.max_new_tokens, instruction)
    except UserError:
        return False
    return True


def readable_examples(ship: Ship, task: Task, count: int) -> list[Example]:
    """The task's first examples that the run's Task LLM can read under the instruction's adapter.

    Args:
        ship: the run.
        task: whose examples they are.
        count: at most.
    """
    examples: list[Example] = []
    for example in task.examples:
        if len(examples) == count:
            break
        with suppress(UserError):
            checks.check_examples(ship.model, [example], task.instruction)
            examples.append(example)
    return examples


def is_readable(ship: Ship, instruction: str) -> bool:
    """Whether the run's encoder can read the instruction."""
    try:
        checks.check_instruction(ship.model, instruction)
    except UserError:
        return False
    return True
