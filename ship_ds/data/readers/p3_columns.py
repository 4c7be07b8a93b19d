"""P3's own columns (Sanh et al. 2022): `inputs_pretokenized` and `targets_pretokenized`, other
columns are ignored.

A folder of parquet, arrow or JSONL files, or of folders of them. One prompt is one task, as on the
hub: its folder, or the folder above when that is named after a split
(imdb_sentiment/test/0000.parquet). Rows of a file or folder named test, validation or dev, in any
case, are held out. The instruction is what all inputs of a task share at their start and end, since
P3 stores the filled-in prompt alone; a prompt with text between its fields keeps that in its
inputs.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ship_ds.data.readers.checks import example, field, load_lines
from ship_ds.data.readers.files import files_of, kind_of, stem_of
from ship_ds.data.readers.rows import first_row
from ship_ds.data.readers.tables import table
from ship_ds.data.splits import hold_out
from ship_ds.data.task import Task, read_error
from ship_ds.data.words import stands_alone

_KINDS = (".parquet", ".arrow", ".jsonl")
_INPUTS, _TARGETS = "inputs_pretokenized", "targets_pretokenized"
_HELD_OUT = ("test", "validation", "dev")
_SPLITS = ("train", *_HELD_OUT)
# test, test_1, test-00000-of-00001 and test1, but not testimonials
_HELD_OUT_FILE = re.compile(rf"(?:{'|'.join(_HELD_OUT)})(?![^\W\d_])")


def files(path: Path) -> list[Path]:
    """`cache-*` is what `datasets` leaves of a map in a saved folder."""
    paths = files_of(path, _KINDS, below=True)
    return [file for file in paths if not file.name.startswith("cache-")]


def matches(path: Path) -> bool:
    """Whether the first file has P3's column of inputs."""
    paths = files(path)
    if not paths:
        return False
    if kind_of(paths[0]) == ".jsonl":
        row = first_row(paths[0])
        return row is not None and _INPUTS in row
    return _INPUTS in table(paths[0]).column_names


def read(path: Path, counts: Counter[str]) -> list[Task]:
    """The tasks, one for each folder of splits or file."""
    tasks: dict[Path, list[Path]] = {}
    for file in files(path):
        folder = (
            file.parent.parent
            if file.parent.name.lower() in _SPLITS and file.parent != path
            else file.parent
        )
        tasks.setdefault(file if path.is_file() else folder, []).append(file)
    return [_read_task(folder, parts, path) for folder, parts in sorted(tasks.items())]


def _read_task(folder: Path, parts: list[Path], root: Path) -> Task:
    rows = [(*row, _is_held_out(file)) for file in parts for row in _rows(file)]
    if len(rows) < 2:
        raise read_error(
            folder,
            "rows",
            f"expected at least two, to tell instruction and input apart, got {len(rows)}",
        )
    before, after = _shared([text for text, _, _ in rows])
    instruction = " ".join(f"{before} {after}".split())
    if not instruction:
        raise read_error(
            folder,
            "rows",
            "the inputs share no text at their start or end, so there is no instruction to read: "
            "leave this prompt out, "
            'or write it as JSONL of {"id", "instruction", "examples"}',
        )
    examples = []
    for text, target, is_held_out in rows:
        one = example(text[len(before) : len(text) - len(after)], (target,))
        examples.append(hold_out(one) if is_held_out else one)
    name = folder.relative_to(root).as_posix() if folder != root else stem_of(folder.resolve())
    return Task(name, instruction, tuple(examples), source=str(folder))


def _is_held_out(file: Path) -> bool:
    is_named_so = _HELD_OUT_FILE.match(stem_of(file).lower()) is not None
    return is_named_so or file.parent.name.lower() in _HELD_OUT


def _rows(file: Path) -> Iterator[tuple[str, str]]:
    rows = (
        # By hand: `datasets` does not name the line of a bad row.
        load_lines(file)
        if kind_of(file) == ".jsonl"
        else ((f"row {i}", row) for i, row in enumerate(table(file, [_INPUTS, _TARGETS])))
    )
    for where, row in rows:
        yield field(row, _INPUTS, str, file, where), field(row, _TARGETS, str, file, where)


def _shared(texts: list[str]) -> tuple[str, str]:
    """The common start and end of all texts, cut back to whole words; of scripts without spaces
    every letter and mark is one."""
    before = os.path.commonprefix(texts)
    while before and before[-1] not in "\n " and not stands_alone(before[-1]):
        before = before[:-1]
    endings = [text[len(before) :] for text in texts]
    after = os.path.commonprefix([text[::-1] for text in endings])[::-1]
    start = next(
        (i for i, letter in enumerate(after) if letter.isspace() or stands_alone(letter)),
        len(after),
    )
    return before, after[start:]
