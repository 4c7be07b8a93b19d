"""Plain text, for pre-training a hypernetwork without instructions (HINT, Ivison et al. 2023, arXiv
2212.10315, section 3.3): the beginning of a passage conditions what is predicted of its end.

    instruction    the first words of a passage
    input          the words after them
    target         the rest

.txt files, whose paragraphs are parted by empty lines, or a column `text` of JSONL, parquet or
arrow. Letters of scripts without spaces are words. A longer paragraph is several passages. Where a
passage is cut is drawn from its own text, so that it is cut alike in every run. Each passage is a
task of one example, called by its file and number.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from ship_ds.data.readers.checks import expect, field, load_lines
from ship_ds.data.readers.files import (
    OTHER_SUFFIXES,
    files_and_dead_links,
    files_of,
    kind_of,
    read_whole,
)
from ship_ds.data.readers.rows import first_row
from ship_ds.data.readers.tables import table
from ship_ds.data.task import DataError, Example, Task
from ship_ds.data.words import parted

MIN_EXAMPLES_PER_TASK = 1
"""Tasks of one example are what this format is for."""
_KINDS = (".txt", ".jsonl", ".parquet", ".arrow")
_TEXT = "text"
_LONGEST, _SHORTEST = 96, 24
"""Words of a passage."""
_FIRST = (1 / 3, 2 / 3)
"""Share of a passage's words that is its instruction, drawn between these."""
_TARGET = (4, 24)
"""Words of the target, drawn between these, of at most half of what is left."""


def files(path: Path) -> list[Path]:
    """The file, or the files of the folder."""
    return files_of(path, _KINDS)


def matches(path: Path) -> bool:
    """Whether there are .txt files and no others, or rows of nothing but a text. What has other
    columns is read by name alone: it may be labelled. So is a .txt beside tables or archives, which
    may be the data that it describes."""
    paths = files(path)
    if {kind_of(file) for file in paths} == {".txt"}:
        return not files_and_dead_links(path, OTHER_SUFFIXES)
    paths = [file for file in paths if kind_of(file) != ".txt"]
    if not paths:
        return False
    if kind_of(paths[0]) == ".jsonl":
        row = first_row(paths[0])
        return row is not None and row.keys() == {_TEXT}
    return list(table(paths[0]).column_names) == [_TEXT]


def read(path: Path, counts: Counter[str]) -> list[Task]:
    """The tasks, one for each passage."""
    tasks: dict[tuple[str, str, str], Task] = {}
    for file in files(path):
        passages = (one for text in _paragraphs(file) for one in _passages(parted(text), counts))
        for number, words in enumerate(passages, 1):
            instruction, text, target = _cut(words)
            key = (instruction, text, target)
            if key in tasks:
                counts["passages: met before"] += 1
                continue
            example = Example(text, target)
            tasks[key] = Task(f"{file.name}:{number}", instruction, (example,), source=str(file))
    if not tasks:
        raise DataError(
            f"{path}: holds no passage of {_SHORTEST} words or more: give longer texts, or a file "
            "in a format of tasks"
        )
    return list(tasks.values())


def _paragraphs(file: Path) -> Iterator[str]:
    if kind_of(file) == ".txt":
        yield from re.split(r"\n\s*\n", read_whole(file))
        return
    rows = (
        load_lines(file)
        if kind_of(file) == ".jsonl"
        else ((f"row {i}", row) for i, row in enumerate(table(file, [_TEXT])))
    )
    for where, row in rows:
        yield from re.split(
            r"\n\s*\n", expect(field(row, _TEXT, str, file, where), str, file, where)
        )


def _passages(words: Sequence[str], counts: Counter[str]) -> Iterator[Sequence[str]]:
    """Of equal lengths, so that no short end is left over where the whole is long enough."""
    if not words:
        return
    if len(words) < _SHORTEST:
        counts[f"passages: fewer than {_SHORTEST} words"] += 1
        return
    number = -(-len(words) // _LONGEST)
    ends = [len(words) * i // number for i in range(number + 1)]
    for start, end in pairwise(ends):
        yield words[start:end]


def _cut(words: Sequence[str]) -> tuple[str, str, str]:
    """Instruction, input and target of a passage."""
    draw = random.Random("".join(words).rstrip())
    first = round(len(words) * draw.uniform(*_FIRST))
    left = len(words) - first
    last = draw.randint(_TARGET[0], max(_TARGET[0], min(_TARGET[1], left // 2)))
    parts = words[:first], words[first : len(words) - last], words[len(words) - last :]
    instruction, text, target = ("".join(part).rstrip() for part in parts)
    return instruction, text, target
