"""A cell of the evaluation: one method, one direction, one part of the rules. It is stored as soon
as it is measured.

A stored cell carries the fingerprint of everything that it depends on; under another fingerprint it
is measured again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ship_ds.evaluation.config import Direction, Part
from ship_ds.evaluation.method import Deduces, Induces, Method, Reasons, Reconstructs
from ship_ds.files import write_json
from ship_ds.parsing import read_json_object

PROTOCOLS: dict[Direction, type] = {
    "deduction": Deduces,
    "induction": Induces,
    "reasoning": Reasons,
    "reconstruction": Reconstructs,
}
SHOWS_EXAMPLES: tuple[Direction, ...] = ("induction", "reasoning")
TaskRow = dict[str, Any]
"""One task of a cell: its id, kind and instruction, what the method answered (`said`), and a list
of values for each metric; where answers never ended, how many (`cut_off`); where an induced text
may be right by other wordings, all of them (`WORDINGS`)."""
WORDINGS = "wordings"
"""Rows that were stored before 2026-11-28 have none."""


@dataclass(frozen=True)
class Cell:
    """num_shown: examples that the method sees; None in a direction that shows none."""

    method: str
    direction: Direction
    part: Part
    num_shown: int | None

    @property
    def name(self) -> str:
        shown = "" if self.num_shown is None else f".{self.num_shown}_shown"
        return f"{self.method}.{self.direction}.{self.part}{shown}"


@dataclass(frozen=True)
class Measured:
    """A cell's rows with what they cost. prepare_seconds: training or loading the method, before
    any of its cells."""

    fingerprint: Mapping[str, Any]
    metrics: Sequence[str]
    rows: Sequence[TaskRow]
    seconds: float
    prepare_seconds: float
    num_ranks: int


def cells_of(
    method: type[Method], parts: Sequence[Part], num_shown: Sequence[int]
) -> Iterator[Cell]:
    """The cells of each direction whose protocol the method fulfils.

    Args:
        method: to be measured.
        parts: of the data.
        num_shown: numbers of examples in directions that show some.
    """
    for direction, protocol in PROTOCOLS.items():
        if issubclass(method, protocol):
            for number in num_shown if direction in SHOWS_EXAMPLES else [None]:
                for part in parts:
                    # examples are the same whatever the wording
                    if part != "unseen_paraphrase" or direction == "deduction":
                        yield Cell(method.name, direction, part, number)


class CellStore:
    """The folder of measured cells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def write(self, cell: Cell, measured: Measured) -> None:
        write_json(self.path(cell), vars(measured))

    def read(self, cell: Cell) -> Measured | None:
        """None: not measured yet, under whatever fingerprint."""
        return Measured(**read_json_object(self.path(cell))) if self.path(cell).is_file() else None


def changed(measured: Measured, fingerprint: Mapping[str, Any]) -> list[str]:
    """Keys in which the stored fingerprint is another one; empty: the cell still holds."""
    keys = {**measured.fingerprint, **fingerprint}
    return [key for key in keys if measured.fingerprint.get(key) != fingerprint.get(key)]
