"""Several files or folders of tasks in one run, each with its own filters, split and weight.

    data:
      kind: mixture
      sources:
        - {path: data/alpaca.json, weight: 0.5}
        - {path: data/natural-instructions, filters: {preset: published-sni}}

Each source is read and split by itself, so its unseen tasks are those that it has alone under the
same settings: a pre-training on it keeps from training what an in-domain run will be tested on.
Where one rule is in two sources, the part that is tested keeps it. Imports no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ship_ds.data.source import TaskSource, TextLengths, with_weights, without_weights
from ship_ds.data.splits import rule_groups, together_key
from ship_ds.data.task import SMALLEST_WEIGHT, DataError, Splits, SplitTask
from ship_ds.data.task_files import (
    FilesSection,
    check_path,
    describe_files,
    lengths_of,
    read_files,
)
from ship_ds.section import PathText, Section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MixtureSource(FilesSection):
    """One of the files or folders. Its filters, truncation and split are sections like those of
    data, kind: files."""

    name: str = Field("", pattern="^[^/]*$")
    """What the ids of its tasks begin with, NAME/; empty: the last part of its path."""
    weight: float = Field(1.0, ge=SMALLEST_WEIGHT, allow_inf_nan=False)
    """How often each of its seen tasks is drawn, beside a task of a source of weight 1. So a source
    of n seen tasks gets n x weight parts of all draws, and at weight 1 everywhere all tasks are met
    equally often."""

    @property
    def label(self) -> str:
        """Its name, or what stands for it."""
        return self.name or Path(self.path).name


class MixtureConfig(Section):
    """Several files or folders of tasks; each is filtered, cut and split by itself."""

    kind: Literal["mixture"] = "mixture"
    sources: tuple[MixtureSource, ...] = Field(min_length=1)
    """The files or folders. Each also takes the sections filters, truncation and split of data,
    kind: files."""
    cache: PathText | None = None
    """Folder of the token cache; None: below the run's folder."""

    @model_validator(mode="after")
    def _names_differ(self) -> "MixtureConfig":
        labels = [source.label for source in self.sources]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"sources: two are called {label!r}; give one of them a name")
        return self


_PARTS = ("seen", "dev", "unseen")


class MixtureTasks(TaskSource):
    """See `MixtureConfig`; a task is called NAME/ID after its source."""

    config: MixtureConfig

    def read(self, tokenizer: "PreTrainedTokenizerBase", log: Callable[[str], None]) -> Splits:
        """See `TaskSource.read`."""
        read = [_read(source, tokenizer, log) for source in self.config.sources]
        seen, dev, unseen = (
            tuple(task for splits in read for task in getattr(splits, part)) for part in _PARTS
        )
        splits = _without_leaks(Splits(seen, dev, unseen), self.config.sources, log)
        for line in _shares(self.config.sources, splits.seen):
            log(line)
        if not splits.seen:
            raise DataError("data.sources: no task is left to train on; see the counts above")
        return splits

    def lengths(self) -> TextLengths:
        """The longest of all sources."""
        lengths = map(lengths_of, self.config.sources)
        return TextLengths(*map(max, zip(*lengths, strict=True)))

    def check(self) -> None:
        """See `TaskSource.check`."""
        for i, source in enumerate(self.config.sources):
            check_path(source, f"data.sources.{i}.path")

    def describe(self) -> list[dict[str, Any]]:
        """One description a source, with its share of the draws before texts are cut."""
        described = [describe_files(source) for source in self.config.sources]
        draws = [
            source.weight * one["seen_weight"]
            for source, one in zip(self.config.sources, described, strict=True)
        ]
        return [
            one | {"weight": source.weight, "share_of_draws": share / (sum(draws) or 1)}
            for one, source, share in zip(described, self.config.sources, draws, strict=True)
        ]

    def token_cache(self, run_folder: Path) -> Path | None:
        """`data.cache`, or a folder below the run's own."""
        return Path(self.config.cache or run_folder / "tokens")

    def fingerprint(self, splits: Splits) -> str:
        """Of the tasks and of their weights: others draw other tasks."""
        return with_weights(without_weights(splits), splits)


def _read(
    source: MixtureSource, tokenizer: "PreTrainedTokenizerBase", log: Callable[[str], None]
) -> Splits:
    """The tasks of one source under their names and with its weight."""
    try:
        splits = read_files(source, tokenizer, lambda text: log(f"{source.label}: {text}"))
    except DataError as error:
        raise DataError(f"data.sources: {source.label}: {error}") from None
    return Splits(*(_named(getattr(splits, part), source) for part in _PARTS))


def _named(tasks: Sequence[SplitTask], source: MixtureSource) -> tuple[SplitTask, ...]:
    return tuple(
        replace(
            task,
            task=replace(task.task, id=f"{source.label}/{task.id}"),
            weight=source.weight * task.weight,
        )
        for task in tasks
    )


def _without_leaks(
    splits: Splits, configs: Sequence[MixtureSource], log: Callable[[str], None]
) -> Splits:
    """Every rule in one part, and whatever else a source's split keeps together: where sources put
    it into several, unseen keeps it before dev, and dev before seen. Sources may cut one
    instruction to different lengths."""
    split_of = {source.label: source.split for source in configs}
    tasks = [(part, task) for part in reversed(_PARTS) for task in getattr(splits, part)]
    kept: dict[str, list[SplitTask]] = {part: [] for part in _PARTS}
    sources = [task.id.split("/")[0] for _, task in tasks]
    keys = [
        together_key(task.task, split_of[source])
        for (_, task), source in zip(tasks, sources, strict=True)
    ]
    for group in rule_groups([task.task for _, task in tasks], cut_as=sources, together=keys):
        # in the order unseen, dev, seen
        owner = tasks[min(group)][0]
        for i in group:
            part, task = tasks[i]
            if part == owner:
                kept[part].append(task)
    for part in ("seen", "dev"):
        num_left_out = len(getattr(splits, part)) - len(kept[part])
        if num_left_out:
            what = "rule, data set or family" if any(keys) else "rule"
            log(f"left out: {part} tasks with the {what} of a tested one elsewhere: {num_left_out}")
    # As they were: groups have an order of their own.
    ids = {task.id for part in kept.values() for task in part}
    return Splits(
        *(tuple(task for task in getattr(splits, part) if task.id in ids) for part in _PARTS)
    )


def _shares(sources: Sequence[MixtureSource], seen: Sequence[SplitTask]) -> list[str]:
    """A line a source: how much of training it will be."""
    parts = [
        [task for task in seen if task.id.startswith(f"{source.label}/")] for source in sources
    ]
    total = sum(task.weight for task in seen) or 1.0
    return [
        f"{source.label}: weight {source.weight:g}: {len(tasks)} seen tasks, "
        f"{sum(len(task.train) for task in tasks)} examples, "
        f"{sum(task.weight for task in tasks) / total:.1%} of the draws"
        for source, tasks in zip(sources, parts, strict=True)
    ]
