"""The tasks that a supply starts from."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ship_ds.api import Ship
from ship_ds.console import no_log
from ship_ds.data.readers import read_tasks
from ship_ds.data.source import source_of
from ship_ds.data.task import Task
from ship_ds.errors import UserError
from ship_ds.inference import checks


def known_tasks(ship: Ship, path: Path | None) -> list[Task]:
    """Tasks of a file or folder, or those that the run trains on, with training examples alone.

    Raises:
        UserError: the run's data are not where they were.
    """
    if path is not None:
        return read_tasks(path, "auto", Counter())
    try:
        seen = source_of(ship.config.data).read(ship.model.prompts.tokenizer, no_log).seen
    except (UserError, OSError) as error:
        raise UserError(f"--data: the run's own cannot be read ({error}); give a file") from None
    return [
        Task(one.id, one.task.instruction, one.train, one.task.paraphrases, family=one.task.family)
        for one in seen
    ]


def inputs_of(task: Task, count: int, order: Sequence[int] | None = None) -> list[str]:
    """Up to `count` distinct inputs, in the order of the examples or in another one."""
    picked = task.examples if order is None else [task.examples[i] for i in order]
    return list(dict.fromkeys(example.input for example in picked))[:count]


def is_readable(ship: Ship, instruction: str) -> bool:
    """Whether the run's encoder can read the instruction."""
    try:
        checks.check_instruction(ship.model, instruction)
    except UserError:
        return False
    return True
