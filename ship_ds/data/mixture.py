"""Several sources of tasks in one run, of files or of any kind, each split by itself and drawn by a
weight.

    data:
      kind: mixture
      sources:
        - {path: data/alpaca.json, weight: 0.5}
        - {path: data/natural-instructions, filters: {preset: published-sni}}
        - {kind: rules, more_compositions: 4, name: world}

Each source is read and split by itself, so its unseen tasks are those that it has alone under the
same settings: a pre-training on it keeps from training what an in-domain run will be tested on.
Where one rule is in two sources, the part that is tested keeps it. Imports no torch.
"""

import itertools
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from ship_ds.data.describe import nothing_before_reading
from ship_ds.data.source import (
    TaskSource,
    TextLengths,
    source_of,
    splits_without_weights,
    with_weights,
)
from ship_ds.data.splits import (
    alike,
    rule_groups,
    trains_on_tested,
    without_tested_inputs,
)
from ship_ds.data.task import SMALLEST_WEIGHT, DataError, Splits, SplitTask
from ship_ds.data.task_files import FilesSection, FilesTasks
from ship_ds.data.words import plain_words
from ship_ds.errors import UserError
from ship_ds.kinds import SOURCES, parse_section
from ship_ds.section import FieldError, PathText, Section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NamedSource(Section):
    """What a mixture wants to know of each source, of whatever kind it is."""

    name: str = Field("", pattern="^[^/]*$")
    """What the ids of its tasks begin with, NAME/; empty: the last part of its path, or its
    kind."""
    weight: float = Field(1.0, ge=SMALLEST_WEIGHT, allow_inf_nan=False)
    """How often each of its seen tasks is drawn, beside a task of a source of weight 1. So a source
    of n seen tasks gets n x weight parts of all draws, and at weight 1 everywhere all tasks are met
    equally often."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Its name, or what stands for it."""

    @abstractmethod
    def tasks(self) -> TaskSource:
        """What reads it."""


class MixtureSource(NamedSource, FilesSection):
    """A file or folder. Its filters, truncation and split are sections like those of data, kind:
    files."""

    @property
    def label(self) -> str:
        """See `NamedSource.label`."""
        return self.name or Path(self.path).name

    def tasks(self) -> TaskSource:
        """See `NamedSource.tasks`."""
        return FilesTasks(self)


class SourceOfKind(NamedSource):
    """A source of any other kind; written, and dumped, with the settings of its kind beside name
    and weight."""

    of: SerializeAsAny[Section]
    """The section of its kind."""

    @property
    def label(self) -> str:
        """See `NamedSource.label`."""
        return self.name or SOURCES.name_of(self.of)

    def tasks(self) -> TaskSource:
        """See `NamedSource.tasks`."""
        return source_of(self.of)

    @model_serializer(mode="wrap")
    def _as_written(self, section: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped = section(self)
        return {**dumped.pop("of"), **dumped}


def _validate(values: Any) -> NamedSource:
    """The section of one source: without a kind, or with kind: files, a `MixtureSource`. Raises
    FieldError."""
    if isinstance(values, NamedSource):
        return values
    if not isinstance(values, dict):
        raise FieldError((), "value_error", f"expected a section, got {type(values).__name__}")
    kind = values.get("kind", "mixture" if "sources" in values else "files")
    if kind == "files":
        files = {key: value for key, value in values.items() if key != "kind"}
        return cast(NamedSource, parse_section(MixtureSource, files))
    if kind == "mixture":
        message = "a mixture is no source of another one: list its sources beside the others"
        raise FieldError(("kind" if "kind" in values else "sources",), "value_error", message)
    beside = NamedSource.model_fields.keys()
    if kind in SOURCES.names() and (
        keys := beside & SOURCES.config_class(kind).model_fields.keys()
    ):
        message = f"{kind!r} has a {min(keys)} itself, which a mixture gives each source: rename it"
        raise FieldError(("kind",), "value_error", message)
    of = SOURCES.validate({key: value for key, value in values.items() if key not in beside})
    named = {key: value for key, value in values.items() if key in beside}
    return cast(NamedSource, parse_section(SourceOfKind, {**named, "of": of}))


class MixtureConfig(Section):
    """Several sources of tasks, each split by itself and drawn by a weight."""

    kind: Literal["mixture"] = "mixture"
    sources: tuple[Annotated[SerializeAsAny[NamedSource], BeforeValidator(_validate)], ...] = Field(
        min_length=1
    )
    """Files or folders, each with its path and the other settings of data, kind: files, but for
    cache; or, with a kind, sources of that kind with its settings, such as kind: rules. Each takes
    these besides."""
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


@dataclass(frozen=True)
class _Member:
    """A source at its place in `data.sources`."""

    place: int
    section: NamedSource
    source: TaskSource

    def in_place(self, text: str) -> str:
        """The source's message, which names keys of `data`, with the keys as the mixture has
        them; one that names none with the name of the source."""
        keys = "|".join(map(re.escape, type(self.source.config).model_fields))
        pattern = rf"^data(?=: )|(?<![\w./-])data(?=\.({keys})\b)"
        placed, count = re.subn(pattern, f"data.sources.{self.place}", text)
        return placed if count else f"data.sources: {self.section.label}: {text}"

    @contextmanager
    def placing_errors(self) -> Iterator[None]:
        """Errors within say which source they are of."""
        try:
            yield
        except UserError as error:
            raise DataError(self.in_place(str(error))) from None

    def read(self, tokenizer: "PreTrainedTokenizerBase", log: Callable[[str], None]) -> Splits:
        """Its tasks under its name and with its weight."""
        label = self.section.label
        with self.placing_errors():
            splits = self.source.read(tokenizer, lambda text: log(f"{label}: {text}"))
        return Splits(*(tuple(map(self._named, getattr(splits, part))) for part in _PARTS))

    def _named(self, task: SplitTask) -> SplitTask:
        return replace(
            task,
            task=replace(task.task, id=f"{self.section.label}/{task.id}"),
            weight=self.section.weight * task.weight,
        )

    def describe(self) -> list[dict[str, Any]]:
        """As its source, with its name and weight."""
        with self.placing_errors():
            described = self.source.describe()
        settings = {"name": self.section.label, "weight": self.section.weight}
        return [one | settings for one in described or [nothing_before_reading(self.section.label)]]


class MixtureTasks(TaskSource):
    """See `MixtureConfig`; a task is called NAME/ID after its source."""

    config: MixtureConfig

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        self._members = [_Member(i, one, one.tasks()) for i, one in enumerate(config.sources)]

    def read(self, tokenizer: "PreTrainedTokenizerBase", log: Callable[[str], None]) -> Splits:
        """See `TaskSource.read`."""
        read = [member.read(tokenizer, log) for member in self._members]
        sources = [member.source for member in self._members]
        read = _without_leaks(read, sources, log)
        read = _without_tested_inputs(read, sources, log)
        for line in _shares(self.config.sources, [splits.seen for splits in read]):
            log(line)
        seen, dev, unseen = (
            tuple(task for splits in read for task in getattr(splits, part)) for part in _PARTS
        )
        if not seen:
            raise DataError("data.sources: no task is left to train on; see the counts above")
        return Splits(seen, dev, unseen)

    def lengths(self) -> TextLengths:
        """The longest of all sources."""
        lengths = [member.source.lengths() for member in self._members]
        return TextLengths(*map(max, zip(*lengths, strict=True)))

    def check(self) -> None:
        """See `TaskSource.check`."""
        for member in self._members:
            with member.placing_errors():
                member.source.check()

    def conflict(self, bases: Sequence[str]) -> str | None:
        """Of the first source that has one, or of the first two that do not go together."""
        for member in self._members:
            if message := member.source.conflict(bases):
                return member.in_place(message)
        for one, other in itertools.combinations(self._members, 2):
            if message := one.source.clash(other.source):
                return other.in_place(message)
        return None

    def describe(self) -> list[dict[str, Any]]:
        """Those of each source, with their shares of the draws before texts are cut, where all
        sources say what is drawn of them."""
        described = [one for member in self._members for one in member.describe()]
        if not all("seen_weight" in one for one in described):
            return described
        draws = [one["weight"] * one["seen_weight"] for one in described]
        return [
            one | {"share_of_draws": share / (sum(draws) or 1)}
            for one, share in zip(described, draws, strict=True)
        ]

    def token_cache(self, run_folder: Path) -> Path | None:
        """`data.cache`, or a folder below the run's own."""
        return Path(self.config.cache or run_folder / "tokens")

    def fingerprint(self, splits: Splits) -> str:
        """Of the tasks and of their weights: others draw other tasks."""
        return with_weights(splits_without_weights(splits), splits)


class _Placed(NamedTuple):
    """A task with its part and the place of its source."""

    part: str
    source: int
    one: SplitTask


def _without_leaks(
    read: Sequence[Splits], sources: Sequence[TaskSource], log: Callable[[str], None]
) -> list[Splits]:
    """Every rule in one part, and whatever else a source's split keeps together: where sources put
    it into several, unseen keeps it before dev, and dev before seen."""
    # In the order unseen, dev, seen: of two tasks the earlier one stays.
    tasks = [
        _Placed(part, place, one)
        for part in reversed(_PARTS)
        for place, splits in enumerate(read)
        for one in getattr(splits, part)
    ]
    keys = [sources[task.source].together(task.one.task) for task in tasks]
    is_by_wording = [sources[task.source].splits_by_wording for task in tasks]
    left_out = _beside_in_rules(tasks, keys, is_by_wording) | _like_tested(tasks, is_by_wording)
    for part in ("seen", "dev"):
        if num_left_out := sum(tasks[i].part == part for i in left_out):
            what = "rule, data set or family" if any(keys) else "rule"
            log(f"left out: {part} tasks with the {what} of a tested one elsewhere: {num_left_out}")
    shown = _of_hidden_wordings([task for i, task in enumerate(tasks) if i not in left_out])
    if shown:
        log(f"left out: seen tasks in a wording that another source never shows: {len(shown)}")
    left_out_ids = {id(tasks[i].one) for i in left_out} | {id(one) for one in shown}
    return [
        Splits(
            *(
                tuple(one for one in getattr(splits, part) if id(one) not in left_out_ids)
                for part in _PARTS
            )
        )
        for splits in read
    ]


def _without_tested_inputs(
    read: Sequence[Splits], sources: Sequence[TaskSource], log: Callable[[str], None]
) -> list[Splits]:
    """No seen task trains on an input that one of its rule, of another source, is tested on; within
    a source its own split has seen to that."""
    seen = [one for splits in read for one in splits.seen]
    if not trains_on_tested(seen):
        return list(read)
    tasks = [_Placed("seen", i, one) for i, splits in enumerate(read) for one in splits.seen]
    is_by_wording = [sources[task.source].splits_by_wording for task in tasks]
    rules = [*_rules(tasks, [""] * len(tasks), is_by_wording), *_like(tasks, is_by_wording)]
    of_several = [rule for rule in rules if len({tasks[i].source for i in rule}) > 1]
    left = iter(without_tested_inputs(seen, of_several, log))
    return [replace(splits, seen=tuple(next(left) for _ in splits.seen)) for splits in read]


def _rules(
    tasks: Sequence[_Placed], keys: Sequence[str], is_by_wording: Sequence[bool]
) -> list[list[int]]:
    """Places of the tasks that are one rule, of the sources that split by wording. Sources may cut
    one instruction to different lengths."""
    chosen = [i for i, is_so in enumerate(is_by_wording) if is_so]
    groups = rule_groups(
        [tasks[i].one.task for i in chosen],
        cut_as=[tasks[i].source for i in chosen],
        together=[keys[i] for i in chosen],
    )
    return [[chosen[i] for i in group] for group in groups]


def _beside_in_rules(
    tasks: Sequence[_Placed], keys: Sequence[str], is_by_wording: Sequence[bool]
) -> set[int]:
    """Of the sources that split by wording: the tasks whose rule has a task of another part before
    them."""
    return {
        i
        for rule in _rules(tasks, keys, is_by_wording)
        for i in rule
        if tasks[i].part != tasks[min(rule)].part
    }


def _like(tasks: Sequence[_Placed], is_by_wording: Sequence[bool]) -> list[tuple[int, int]]:
    """Pairs of tasks of different sources that are like each other, where one or both are of a
    source that does not split by wording. It words rules of its own alike, which a chain of
    likenesses would join, and two such sources are compared by equal words alone."""
    if all(is_by_wording):
        return []
    ones = [task.one for task in tasks]
    pairs = list(alike(ones, is_by_wording)) if any(is_by_wording) else []
    holders: dict[tuple[str, ...], list[int]] = {}
    for i, one in enumerate(ones):
        for text in () if is_by_wording[i] else (*one.wordings, *one.held_out_paraphrases):
            holders.setdefault(tuple(plain_words(text)), []).append(i)
    return pairs + [
        pair
        for same in holders.values()
        for pair in itertools.combinations(same, 2)
        if tasks[pair[0]].source != tasks[pair[1]].source
    ]


def _like_tested(tasks: Sequence[_Placed], is_by_wording: Sequence[bool]) -> set[int]:
    """The tasks that are like one before them of another source and part."""
    pairs = _like(tasks, is_by_wording)
    return {max(pair) for pair in pairs if tasks[pair[0]].part != tasks[pair[1]].part}


def _of_hidden_wordings(tasks: Sequence[_Placed]) -> list[SplitTask]:
    """The seen tasks that say in the same words what another source holds out of its seen tasks'
    wordings, to ask it in an evaluation."""
    seen = [task for task in tasks if task.part == "seen"]
    hidden: dict[tuple[str, ...], set[int]] = {}
    for task in seen:
        for text in task.one.held_out_paraphrases:
            hidden.setdefault(tuple(plain_words(text)), set()).add(task.source)
    if not hidden:
        return []
    return [
        task.one
        for task in seen
        if any(
            hidden.get(tuple(plain_words(text)), set()) - {task.source}
            for text in task.one.wordings
        )
    ]


def _shares(sources: Sequence[NamedSource], seen: Sequence[Sequence[SplitTask]]) -> list[str]:
    """A line a source: how much of training it will be."""
    total = sum(task.weight for tasks in seen for task in tasks) or 1.0
    return [
        f"{source.label}: weight {source.weight:g}: {len(tasks)} seen tasks, "
        f"{sum(len(task.train) for task in tasks)} examples, "
        f"{sum(task.weight for task in tasks) / total:.1%} of the draws"
        for source, tasks in zip(sources, seen, strict=True)
    ]
