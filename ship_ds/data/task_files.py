"""Tasks of a file or a folder: read, filtered, cut to length and split. Each step says what it left
out.

    data: {kind: files, path: data/natural-instructions}

docs/data.md shows every format, filter and way of splitting. Imports no torch.
"""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ValidationError

from ship_ds.data.describe import describe
from ship_ds.data.filters import FilterConfig, apply_filters
from ship_ds.data.readers import Format, read_tasks, usual_min_examples
from ship_ds.data.readers.files import check_there
from ship_ds.data.source import TaskSource, TextLengths
from ship_ds.data.splits import SplitConfig, split_tasks, together_key
from ship_ds.data.task import DataError, Splits, Task
from ship_ds.data.truncation import TruncationConfig, truncate_tasks
from ship_ds.data.unknown import unknown_texts
from ship_ds.errors import UserError
from ship_ds.parsing import parse_yaml
from ship_ds.section import PathText, Section, first_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FilesSection(Section):
    """A file or folder of tasks in any format of data/readers, and what is done to them."""

    path: PathText
    """A file, or a folder that is read whole."""
    format: Format = "auto"
    """Which reader takes it; auto: the first of them that it looks like."""
    filters: FilterConfig = FilterConfig()
    """Which tasks and examples are left out."""
    truncation: TruncationConfig = TruncationConfig()
    """How long texts may be, in tokens."""
    split: SplitConfig = SplitConfig()
    """Which tasks and examples are kept from training."""


class FilesConfig(FilesSection):
    """Tasks of a file or folder in any format of data/readers."""

    kind: Literal["files"] = "files"
    cache: PathText | None = None
    """Folder of the token cache; None: below the run's folder."""


_UNCUT = TextLengths(256, 512, 128)
"""Tokens that the planner counts with where `truncation` sets no limit: an assumption."""
_FILES_TO_OPEN = 100
"""A folder may hold many thousands; so many stand for all."""


def read_files(
    config: FilesSection, tokenizer: "PreTrainedTokenizerBase", log: Callable[[str], None]
) -> Splits:
    """The tasks of a file or folder, filtered, cut and split; see `TaskSource.read`.

    Args:
        config: names them, and says what is left out, cut and kept from training.
        tokenizer: the Task LLM's, by which texts are cut to a number of tokens.
        log: takes one line for each thing that was read, changed or left out.

    Raises:
        DataError: a row is not as its format says, the tokenizer is a slow one, or there are too
            few tasks; one line.
    """
    path = Path(config.path)
    unread: Counter[str] = Counter()
    tasks = read_tasks(path, config.format, unread)
    num_examples = sum(len(task.examples) for task in tasks)
    log(f"{config.path}: {len(tasks)} tasks, {num_examples} examples")
    usual_min = usual_min_examples(path, config.format)
    tasks, filtered = apply_filters(tasks, config.filters, usual_min)
    tasks, cut = truncate_tasks(tasks, tokenizer, config.truncation)
    # Cutting can leave a task with too few examples, or make two of them equal; the second
    # pass says so.
    again = FilterConfig(min_examples_per_task=config.filters.min_examples_per_task)
    tasks, emptied = apply_filters(tasks, again, usual_min)
    for step, counts in (
        ("left out", {**unread, **filtered}),
        ("cut to length", cut),
        ("left out after cutting", emptied),
        ("read as the tokenizer's unknown token", unknown_texts(tasks, tokenizer)),
    ):
        for reason, count in counts.items():
            log(f"{step}: {reason}: {count}")
    splits = split_tasks(tasks, config.split, log)
    if num_left_out := len(tasks) - len(splits.tasks):
        log(f"left out: tasks of one input where all are to be tested: {num_left_out}")
    log(f"{len(splits.seen)} seen, {len(splits.dev)} dev and {len(splits.unseen)} unseen tasks")
    if num_untested := sum(not task.test for task in splits.seen):
        log(f"of the seen tasks {num_untested} are trained on and never tested: one input each")
    return splits


def parse_benchmark(text: str, place: str) -> FilesConfig:
    """The files of a benchmark, all of whose tasks are to be tested, with their whole path.

    Args:
        text: A path; or, in braces, a section as data, kind: files has it.
        place: Where the text stands, for messages.

    Raises:
        UserError: It is no such section, has a setting that says nothing of a benchmark, or the
            files cannot be opened; one line.
    """
    values = parse_yaml(text, place) if text.lstrip().startswith("{") else {"path": text}
    try:
        config = FilesConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{place}: {first_error(error).line}") from None
    for key in ("unseen_share", "dev_share", "keeps_together"):
        if key in config.split.model_fields_set:
            raise UserError(f"{place}: split.{key}: all of these tasks are tested; leave it out")
    if config.cache is not None:
        raise UserError(f"{place}: cache: nothing of these tasks is kept; leave it out")
    check_path(config, place)
    split = config.split.model_copy(update={"unseen_share": 1.0})
    # Else the same files would be other data from another folder.
    path = str(Path(config.path).resolve())
    return config.model_copy(update={"split": split, "path": path})


def check_path(config: FilesSection, key: str) -> None:
    """Look whether the folder can be listed and its files opened.

    Args:
        config: of the files.
        key: of its path in the run's config, for messages.

    Raises:
        UserError: it cannot, or the folder is empty.
    """
    path = Path(config.path)
    try:
        if path.exists():
            check_there(path)
        files = (
            [path / name for name in sorted(os.listdir(path))[:_FILES_TO_OPEN]]
            if path.is_dir()
            else [path]
        )
        for file in files:
            if file.is_file() or file == path:
                file.open("rb").close()
    except DataError as error:
        raise UserError(f"{key}: {error}") from None
    except OSError as error:
        raise UserError(
            f"{key}: {error.filename}: {error.strerror}; give a readable file or folder of tasks"
        ) from None
    if not files:
        raise UserError(f"{key}: {path}: the folder is empty; give a file or folder of tasks")


class FilesTasks(TaskSource):
    """The tasks of a `FilesSection`; all of them may be unseen, as those of a benchmark in a
    mixture."""

    splits_by_wording: ClassVar[bool] = True
    config: FilesSection

    def read(self, tokenizer: "PreTrainedTokenizerBase", log: Callable[[str], None]) -> Splits:
        """See `TaskSource.read`."""
        return read_files(self.config, tokenizer, log)

    def lengths(self) -> TextLengths:
        """The limits of `truncation`."""
        cuts = self.config.truncation
        return TextLengths(
            cuts.instruction.tokens or _UNCUT.instruction,
            cuts.input.tokens or _UNCUT.input,
            cuts.target.tokens or _UNCUT.target,
        )

    def check(self) -> None:
        """See `TaskSource.check`: the folder can be listed and its files opened."""
        check_path(self.config, "data.path")

    def describe(self) -> list[dict[str, Any]]:
        """One description, before texts are cut."""
        config = self.config
        return [describe(Path(config.path), config.format, config.filters, config.split)]

    def together(self, task: Task) -> str:
        """See `TaskSource.together`: by `split.keeps_together`."""
        return together_key(task, self.config.split)


class FilesSource(FilesTasks):
    """See `FilesConfig`."""

    config: FilesConfig

    def read(self, tokenizer: "PreTrainedTokenizerBase", log: Callable[[str], None]) -> Splits:
        """See `TaskSource.read`."""
        splits = super().read(tokenizer, log)
        if not splits.seen:
            raise DataError(
                "data.split.unseen_share: no task is left to train on; give less than 1, or make "
                "these files a source of a mixture"
            )
        return splits

    def token_cache(self, run_folder: Path) -> Path | None:
        """`data.cache`, or a folder below the run's own."""
        return Path(self.config.cache or run_folder / "tokens")
