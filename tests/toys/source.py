"""A task source from outside the package: several sources in one run.

    SHIP_DS_PLUGINS=tests.toys.source ship-ds train --config quickstart-smoke \
        'data={kind: toy_joined, parts: [{kind: rules}, {kind: files, path: tasks.jsonl}]}'
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ship_ds.config import DataConfig
from ship_ds.data.source import TaskSource, TextLengths, source_of
from ship_ds.data.task import Splits, SplitTask
from ship_ds.kinds import SOURCES
from ship_ds.section import Section


class JoinedConfig(Section):
    """The tasks of several sources together, each split by itself."""

    kind: Literal["toy_joined"] = "toy_joined"
    parts: tuple[DataConfig, ...] = Field(min_length=1)
    """Sections as `data` takes them."""


class Joined(TaskSource):
    """See `JoinedConfig`; a task is called by the position of its part: "0/reverse"."""

    config: JoinedConfig

    def __init__(self, config: JoinedConfig) -> None:
        super().__init__(config)
        self.sources = [source_of(part) for part in config.parts]

    def read(self, tokenizer: Any, log: Callable[[str], None]) -> Splits:
        parts = [source.read(tokenizer, log) for source in self.sources]
        return Splits(
            seen=_renamed([part.seen for part in parts]),
            dev=_renamed([part.dev for part in parts]),
            unseen=_renamed([part.unseen for part in parts]),
        )

    def lengths(self) -> TextLengths:
        lengths = [source.lengths() for source in self.sources]
        return TextLengths(*map(max, zip(*lengths, strict=True)))

    def check(self) -> None:
        for source in self.sources:
            source.check()

    def conflict(self, bases: Sequence[str]) -> str | None:
        return next(filter(None, (source.conflict(bases) for source in self.sources)), None)

    def token_cache(self, run_folder: Path) -> Path | None:
        return next(filter(None, (source.token_cache(run_folder) for source in self.sources)), None)


def _renamed(parts: Sequence[Sequence[SplitTask]]) -> tuple[SplitTask, ...]:
    return tuple(
        replace(task, task=replace(task.task, id=f"{index}/{task.id}"))
        for index, tasks in enumerate(parts)
        for task in tasks
    )


SOURCES.register(JoinedConfig, Joined)
