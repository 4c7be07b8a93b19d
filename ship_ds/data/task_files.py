"""Tasks of a file or a folder: read, filtered, cut to length and split. Each step says what it left
out.

    data: {kind: files, path: data/natural-instructions}

docs/data.md shows every format, filter and way of splitting. Imports no torch.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ship_ds.data.filters import FilterConfig, apply_filters
from ship_ds.data.readers import Format, read_tasks
from ship_ds.data.source import TaskSource, TextLengths
from ship_ds.data.splits import SplitConfig, split_tasks
from ship_ds.data.task import Splits
from ship_ds.data.truncation import TruncationConfig, truncate_tasks
from ship_ds.errors import UserError
from ship_ds.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FilesConfig(Section):
    """Tasks of a file or folder in any format of data/readers."""

    kind: Literal["files"] = "files"
    path: str
    """A file, or a folder that is read whole."""
    format: Format = "auto"
    """Which reader takes it; auto: the first of them that it looks like."""
    filters: FilterConfig = FilterConfig()
    """Which tasks and examples are left out."""
    truncation: TruncationConfig = TruncationConfig()
    """How long texts may be, in tokens."""
    split: SplitConfig = SplitConfig()
    """Which tasks and examples are kept from training."""
    cache: str | None = None
    """Folder of the token cache; None: below the run's folder."""


_UNCUT = TextLengths(256, 512, 128)
"""Tokens that the planner counts with where `truncation` sets no limit: an assumption."""
_FILES_TO_OPEN = 100
"""A folder may hold many thousands; so many stand for all."""


class FilesSource(TaskSource):
    """See `FilesConfig`."""

    config: FilesConfig

    def read(self, tokenizer: "PreTrainedTokenizerBase", log: Callable[[str], None]) -> Splits:
        """See `TaskSource.read`."""
        config = self.config
        tasks = read_tasks(Path(config.path), config.format)
        num_examples = sum(len(task.examples) for task in tasks)
        log(f"{config.path}: {len(tasks)} tasks, {num_examples} examples")
        tasks, filtered = apply_filters(tasks, config.filters)
        tasks, cut = truncate_tasks(tasks, tokenizer, config.truncation)
        # Cutting can leave a task with too few examples, or make two of them equal; the second
        # pass says so.
        tasks, emptied = apply_filters(
            tasks, FilterConfig(min_examples_per_task=config.filters.min_examples_per_task)
        )
        for step, counts in (
            ("left out", filtered),
            ("cut to length", cut),
            ("left out after cutting", emptied),
        ):
            for reason, count in counts.items():
                log(f"{step}: {reason}: {count}")
        splits = split_tasks(tasks, config.split)
        log(f"{len(splits.seen)} seen, {len(splits.dev)} dev and {len(splits.unseen)} unseen tasks")
        return splits

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
        path = Path(self.config.path)
        try:
            files = (
                [path / name for name in sorted(os.listdir(path))[:_FILES_TO_OPEN]]
                if path.is_dir()
                else [path]
            )
            for file in files:
                if file.is_file() or file == path:
                    file.open("rb").close()
        except OSError as error:
            raise UserError(
                f"data.path: {error.filename}: {error.strerror}; give a readable file or "
                "folder of tasks"
            ) from None
        if not files:
            raise UserError(
                f"data.path: {path}: the folder is empty; give a file or folder of tasks"
            )

    def token_cache(self, run_folder: Path) -> Path | None:
        """`data.cache`, or a folder below the run's own."""
        return Path(self.config.cache or run_folder / "tokens")
