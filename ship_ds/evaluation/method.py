"""What the harness measures: SHIP and every baseline behind one signature.

A method answers in one, two or all three directions; the class says which by the protocols below
that it fulfils. Each is made from a `Setting` alone, so that all of them stand on the same split,
base model and time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from ship_ds.api import Ship
from ship_ds.data.task import Example, Splits, SplitTask


@dataclass(frozen=True)
class Setting:
    """What every method starts from. `folder`: its own, for weights that it trains once and loads
    afterwards."""

    ship: Ship
    splits: Splits
    folder: Path
    minutes: float
    """Training time of a baseline, at most."""
    seed: int


Answers = list[list[str | None]]
"""One row a task, one answer an input; None where no end came in time."""


class Method(Protocol):
    name: ClassVar[str]
    states_instruction: ClassVar[bool]
    """Whether each query's prompt holds the instruction: such a method pays for it again in every
    query."""

    def __init__(self, setting: Setting) -> None: ...

    def prepare(self) -> None:
        """Train, or load what an earlier call trained; called once, on every rank alike, before
        anything is asked."""


@runtime_checkable
class Deduces(Protocol):
    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> Answers:
        """Answer each task's inputs, knowing the wording of it alone."""


@runtime_checkable
class Induces(Protocol):
    def induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        """One instruction for each task's shown examples."""


@runtime_checkable
class Reasons(Protocol):
    def reason(
        self, shown: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]
    ) -> Answers:
        """Answer each task's inputs, knowing its shown examples alone."""


@runtime_checkable
class ReasonsOtherwise(Protocol):
    def reason_otherwise(
        self, shown: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]
    ) -> dict[str, Answers]:
        """The same answered in other ways, each scored as `exact_match_<way>`."""
