"""What every reader yields and everything downstream consumes: a task is an instruction with
examples of it.

Plain frozen values without tensors, so readers, splits and the generator can be tested without
torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from ship_ds.errors import UserError


class DataError(UserError):
    """A row or file that cannot be read; the message is one line: file, line or key, what was
    expected, what to do."""


Item = TypeVar("Item")
PaperMetric = Literal["", "exact", "set", "contains", "f1"]
"""How the paper of a format scores a task's answers (evaluation/metrics.py); "": not in a way of
its own."""


class CutOff(str):
    """What was written of an answer that met its limit before its end: never the right one, but
    words that can be scored."""


@dataclass(frozen=True)
class Example:
    """One input with its target. `references` lists every right answer, the target first; empty
    means the target alone."""

    input: str
    target: str
    references: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        return self.references or (self.target,)


@dataclass(frozen=True)
class Reading:
    """What the encoder reads of a task: its instruction, examples, or both.

    instruction: None: it is to be guessed from the examples. examples: none, or some.
    states_targets: False: the encoder sees their inputs alone.
    """

    instruction: str | None
    examples: tuple[Example, ...] = ()
    states_targets: bool = True


SMALLEST_WEIGHT = 1e-6
"""That a file or a source may give a task: the sampler counts epochs of smaller ones beyond all
numbers."""


@dataclass(frozen=True)
class Task:
    """An instruction, examples that follow it, and other wordings of it.

    `source` says where it was read (a file, or "rules"); `family` groups tasks for macro-averages
    and is the task's own category where the format has one (SNI `Categories`, the generator's rule
    family), else empty. `dataset` names the data set that its examples were made of, where the
    format says so (SNI `Source`). `paper_metric` changes no training, so it is in no fingerprint;
    neither is `dataset`, by which a split may keep tasks together. `weight` is how often the file
    wants it drawn beside a task of weight 1. `inputs` have no target yet, so nothing is trained or
    tested on them (`ship-ds supply answers`).
    """

    id: str
    instruction: str
    examples: tuple[Example, ...]
    paraphrases: tuple[str, ...] = ()
    source: str = ""
    family: str = ""
    paper_metric: PaperMetric = field(default="", repr=False)
    dataset: str = field(default="", repr=False)
    weight: float = field(default=1.0, repr=False)
    inputs: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class SplitTask:
    """A task with its examples parted into train and test, and the paraphrases that training never
    shows.

    `kind` says of an unseen task why it is unseen ("parameter", "composition", "family"; "" where
    that is not known). `weight` is how often a seen task is drawn beside one of weight 1; a source
    with other weights has them in its own fingerprint. Without test examples a task is trained on
    and never tested.
    """

    task: Task
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    held_out_paraphrases: tuple[str, ...] = ()
    kind: str = ""
    weight: float = field(default=1.0, repr=False)

    @property
    def id(self) -> str:
        return self.task.id

    @property
    def wordings(self) -> tuple[str, ...]:
        """Every instruction text that training may show: the instruction first, then its
        paraphrases."""
        return (self.task.instruction, *self.task.paraphrases)


@dataclass(frozen=True)
class Splits:
    """Rules parted three ways: seen (trained on), dev (every tuning decision), unseen (the final
    evaluation alone)."""

    seen: tuple[SplitTask, ...]
    dev: tuple[SplitTask, ...]
    unseen: tuple[SplitTask, ...]

    @property
    def tasks(self) -> tuple[SplitTask, ...]:
        """All of them."""
        return (*self.seen, *self.dev, *self.unseen)


def read_error(path: Path | str, where: str, problem: str) -> DataError:
    """The one-line form every reader uses, e.g. `tasks/a.json: Instances[3].output: expected a
    list, got a whole number`.

    Args:
        path: of the file or folder, or a name of what else was read.
        where: the place in it, such as "line 3".
        problem: what was expected there and what was found, or another fault and what to do.

    Returns:
        The error, which the caller raises.
    """
    return DataError(f"{path}: {where}: {problem}")


def spread(items: Sequence[Item], count: int) -> Sequence[Item]:
    """At most `count` of them, evenly spaced: of tasks, so that every family stays."""
    if count >= len(items):
        return items
    return [items[i * len(items) // count] for i in range(count)]
