"""The port for where tasks come from: what a source offers, and how the source of a run is found.

A source is made from its section of the config, under `data` and by its `kind`:

    source = source_of(config.data)
    source.check()                                  # paths, before torch is loaded
    splits = source.read(tokenizer, log)            # seen, dev and unseen tasks
    source.fingerprint(splits)                      # what a checkpoint compares its data by

`RulesSource` (rules.py) generates tasks and `FilesSource` (task_files.py) reads them. Another one
is a class and a config class in a file of its own, registered by `SOURCES.register` (kinds.py). It
knows nothing of sampling, prompts or the trainer. Imports no torch.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ship_ds.data.task import Splits, Task
from ship_ds.kinds import SOURCES
from ship_ds.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextLengths(NamedTuple):
    """Tokens of the longest instruction, input and target that the planner has to count with."""

    instruction: int
    input: int
    target: int


class TaskSource(ABC):
    """Where the tasks of a run come from.

    Args:
        config: the section of the config that this class is registered for.
    """

    splits_by_wording: ClassVar[bool] = False
    """Whether its tasks whose wordings are alike are one rule and in one part, as `split_tasks` has
    it; else each is a rule of its own, and in a mixture its split stays what it is."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def read(self, tokenizer: "PreTrainedTokenizerBase", log: Callable[[str], None]) -> Splits:
        """Every task with its examples, parted into seen, dev and unseen.

        The same on every rank, and again at every resume: the sampler draws by positions in it.

        Args:
            tokenizer: the Task LLM's, by which texts are cut to a number of tokens.
            log: takes one line for each thing that was read, changed or left out.

        Raises:
            DataError: a row is not as its format says, or there are too few tasks; one line.
        """

    @abstractmethod
    def lengths(self) -> TextLengths:
        """How long texts may be, without reading them: the planner has no data."""

    def check(self) -> None:  # noqa: B027 (a source without paths has nothing to look at)
        """Look at paths in a second or two, before torch is loaded and a job waits for GPUs.

        Raises:
            UserError: something is missing or cannot be read; one line naming the key.
        """

    def describe(self) -> list[dict[str, Any]]:
        """What `ship-ds data` shows, one description (describe.py) for each file, folder or
        generator; none where nothing can be said before tasks are read."""
        return []

    def together(self, task: Task) -> str:
        """What its split does not part the task from, beside its rule; "": nothing."""
        return ""

    def clash(self, other: "TaskSource") -> str | None:
        """Why another source cannot stand beside it in a mixture, in one line; None: it can.

        Args:
            other: that comes later in the mixture.
        """
        return None

    def conflict(self, bases: Sequence[str]) -> str | None:
        """Why these tasks and these base models do not go together, in one line; None: they do.

        Args:
            bases: "embedded" or a model folder, of the Task LLM, encoder and decoder.
        """
        return None

    def token_cache(self, run_folder: Path) -> Path | None:
        """The folder that keeps the texts' token ids; None where they are made anew at each start,
        as for texts that are few or short."""
        return None

    def fingerprint(self, splits: Splits) -> str:
        """64 hexadecimal digits that change with the data: a checkpoint goes on with no others."""
        plain = splits_without_weights(splits)
        is_weighted = any(task.weight != 1 for task in splits.seen)
        return with_weights(plain, splits) if is_weighted else plain


def splits_without_weights(splits: Splits) -> str:
    """The fingerprint of these tasks, however often they are drawn."""
    return hashlib.sha256(repr(splits).encode()).hexdigest()


def with_weights(fingerprint: str, splits: Splits) -> str:
    """The fingerprint of these tasks with their weights: others draw other tasks."""
    weights = [task.weight for task in splits.seen]
    return hashlib.sha256(f"{fingerprint} {weights}".encode()).hexdigest()


def source_of(data: Section) -> TaskSource:
    """The source that a config's section `data` names by its kind."""
    source: TaskSource = SOURCES.implementation(data)(data)
    return source
