"""The data section of a run on files: read, filter, cut to length, split; each step says what it
left out."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ship_ds.data.filters import FilterConfig, apply_filters
from ship_ds.data.readers import Format, read_tasks
from ship_ds.data.splits import SplitConfig, split_tasks
from ship_ds.data.task import Splits
from ship_ds.data.truncation import TruncationConfig, truncate_tasks
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


def read_splits(
    config: FilesConfig, tokenizer: "PreTrainedTokenizerBase", say: Callable[[str], None]
) -> Splits:
    """Raises DataError where the files are not as their format says."""
    tasks = read_tasks(Path(config.path), config.format)
    say(f"{config.path}: {len(tasks)} tasks, {sum(len(task.examples) for task in tasks)} examples")
    tasks, filtered = apply_filters(tasks, config.filters)
    tasks, cut = truncate_tasks(tasks, tokenizer, config.truncation)
    # Cutting can leave a task with too few examples, or make two of them equal; the second pass
    # says so.
    tasks, emptied = apply_filters(
        tasks, FilterConfig(min_examples_per_task=config.filters.min_examples_per_task)
    )
    for step, counts in (
        ("left out", filtered),
        ("cut to length", cut),
        ("left out after cutting", emptied),
    ):
        for reason, count in counts.items():
            say(f"{step}: {reason}: {count}")
    splits = split_tasks(tasks, config.split)
    say(f"{len(splits.seen)} seen, {len(splits.dev)} dev and {len(splits.unseen)} unseen tasks")
    return splits
