"""Files of rows that are each an instruction, an input and a target: what alpaca.py and messages.py
share.

A file is a JSON array or JSONL, whatever its name says; a folder is all its .json and .jsonl files.
Rows whose instruction is the same, white space around it aside, are the examples of one task, over
all files. The task is called by the place of its first row: "alpaca:17" is row 17 of alpaca.json.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ship_ds.data.readers.checks import expect, load_json, load_lines
from ship_ds.data.task import Example, Task, read_error

_SUFFIXES = (".json", ".jsonl")
_FIRST_BYTES = 1 << 20
"""Of a file that are looked at for its first row."""


class Triple(NamedTuple):
    """One row."""

    instruction: str
    input: str
    target: str


def files_of(path: Path) -> list[Path]:
    """The file, or the files of the folder, in the order of their names."""
    if path.is_file():
        return [path] if path.suffix in _SUFFIXES else []
    return sorted(file for file in path.glob("*") if file.suffix in _SUFFIXES and file.is_file())


def first_row(path: Path) -> dict[str, Any] | None:
    """The first row of the first file; None where there is none, or it is not an object."""
    files = files_of(path)
    if not files:
        return None
    with files[0].open("rb") as file:
        text = file.read(_FIRST_BYTES).decode("utf-8-sig", errors="replace").lstrip()
    if text.startswith("["):
        text = text[1:].lstrip()
    try:
        row, _ = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def rows_of(files: Sequence[Path]) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Every row with its file and its place in it.

    Raises:
        DataError: a file cannot be read, or a row is no object.
    """
    for file in files:
        for where, row in _rows(file):
            yield file, where, row


def tasks_of(triples: Iterable[tuple[Path, str, Triple]]) -> list[Task]:
    """The tasks of these rows, each with its file and place, in the order of their first rows.

    Raises:
        DataError: a row has no instruction.
    """
    examples: dict[str, list[Example]] = {}
    first: dict[str, tuple[Path, str]] = {}
    for file, where, triple in triples:
        if not triple.instruction:
            raise read_error(file, where, "the instruction is empty; fill it in or remove it")
        first.setdefault(triple.instruction, (file, where))
        examples.setdefault(triple.instruction, []).append(Example(triple.input, triple.target))
    return [
        Task(
            f"{file.stem}:{where.split()[-1]}",
            instruction,
            tuple(examples[instruction]),
            source=f"{file}: {where}",
        )
        for instruction, (file, where) in first.items()
    ]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("row 3", its object) of an array, counted from 1 as lines are; ("line 3", ...) of JSONL."""
    with path.open("rb") as file:
        is_array = file.read(64).decode("utf-8-sig", errors="replace").lstrip().startswith("[")
    if not is_array:
        yield from load_lines(path)
        return
    for i, row in enumerate(expect(load_json(path), list, path, "the file"), 1):
        yield f"row {i}", expect(row, dict, path, f"row {i}")
