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
from ship_ds.data.readers.files import FIRST_BYTES, KEY_BYTES, files_of, head, stem_of
from ship_ds.data.task import Example, Task, read_error

_KINDS = (".json", ".jsonl")


class Triple(NamedTuple):
    """One row."""

    instruction: str
    input: str
    target: str


def files(path: Path) -> list[Path]:
    """The file, or the files of the folder, in the order of their names."""
    return files_of(path, _KINDS)


def first_row(path: Path) -> dict[str, Any] | None:
    """The first row of the first file; None where there is none, or it is not an object."""
    paths = files(path)
    if not paths:
        return None
    row = _first_value(head(paths[0], FIRST_BYTES))
    if row is None:  # it may go on where that ends
        row = _first_value(head(paths[0], KEY_BYTES))
    return row if isinstance(row, dict) else None


def _first_value(text: str) -> object:
    """What the text begins with, or the array that it begins with; None where that is no JSON, as
    far as it goes."""
    text = text.lstrip()
    if text.startswith("["):
        text = text[1:].lstrip()
    try:
        return json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return None


def rows_of(paths: Sequence[Path]) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Every row with its file and its place in it.

    Raises:
        DataError: a file cannot be read, or a row is no object.
    """
    for file in paths:
        for where, row in _rows(file):
            yield file, where, row


def tasks_of_triples(triples: Iterable[tuple[Path, str, Triple]]) -> list[Task]:
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
            f"{stem_of(file)}:{where.split()[-1]}",
            instruction,
            tuple(examples[instruction]),
            source=f"{file}: {where}",
        )
        for instruction, (file, where) in first.items()
    ]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("row 3", its object) of an array, counted from 1 as lines are; ("line 3", ...) of JSONL."""
    if not head(path, FIRST_BYTES).lstrip().startswith("["):
        yield from load_lines(path)
        return
    for i, row in enumerate(expect(load_json(path), list, path, "the file"), 1):
        yield f"row {i}", expect(row, dict, path, f"row {i}")
