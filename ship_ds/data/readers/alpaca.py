"""Instruction triples (Taori et al. 2023): rows of `instruction`, `input` and `output`, as a JSON
array or as JSONL.

    [{"instruction": "Name its colour.", "input": "sky", "output": "blue"},
     {"instruction": "Name three colours.", "input": "", "output": "Red, green and blue."}]

Rows with one instruction are the examples of one task. Most instructions come once, and their
`input` is often empty or missing. Other keys, such as `text`, are ignored.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from ship_ds.data.readers.checks import expect, field
from ship_ds.data.readers.rows import Triple, files, first_row, rows_of, tasks_of_triples
from ship_ds.data.task import Task
from ship_ds.parsing import trimmed

MIN_EXAMPLES_PER_TASK = 1
"""Tasks of one example are what this format is for."""


def matches(path: Path) -> bool:
    """Whether the first row has an instruction and an output."""
    row = first_row(path)
    return row is not None and {"instruction", "output"} <= row.keys()


def read(path: Path, counts: Counter[str]) -> list[Task]:
    """The tasks, one for each distinct instruction."""
    rows = rows_of(files(path))
    return tasks_of_triples((file, where, _read_row(row, file, where)) for file, where, row in rows)


def _read_row(row: dict[str, Any], path: Path, where: str) -> Triple:
    return Triple(
        trimmed(field(row, "instruction", str, path, where)),
        _input(row, path, where),
        trimmed(field(row, "output", str, path, where)),
    )


def _input(row: dict[str, Any], path: Path, where: str) -> str:
    """Empty where it is missing or null."""
    text = row.get("input")
    return "" if text is None else trimmed(expect(text, str, path, f"{where}.input"))
