"""Our own JSONL, one task a line:

    {"id": "t1", "instruction": "...", "examples": [
        {"input": "...", "target": "...", "references": ["..."]}],
     "paraphrases": ["..."], "family": "..."}

`references` (every right answer beside the target), `paraphrases` and `family` may be left out; any
other key is an error.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from ship_ds.data.readers.checks import distinct, example, expect, field, load_lines, texts
from ship_ds.data.task import Example, Task, read_error

_TASK_KEYS, _EXAMPLE_KEYS = (
    {"id", "instruction", "examples", "paraphrases", "family"},
    {"input", "target", "references"},
)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() and path.suffix == ".jsonl" else sorted(path.glob("*.jsonl"))


def matches(path: Path) -> bool:
    """Whether there is a .jsonl file here."""
    return bool(_files(path))


def read(path: Path, counts: Counter[str]) -> list[Task]:
    """The tasks of every .jsonl file, one for each line."""
    return [_read_row(row, file, where) for file in _files(path) for where, row in load_lines(file)]


def _read_row(row: dict[str, Any], path: Path, where: str) -> Task:
    _no_other_keys(row, _TASK_KEYS, path, where)
    paraphrases = texts(row, "paraphrases", path, where) if row.get("paraphrases") else ()
    instruction, *others = distinct((field(row, "instruction", str, path, where), *paraphrases))
    rows = field(row, "examples", list, path, where)
    return Task(
        field(row, "id", str, path, where),
        instruction,
        tuple(_read_example(item, path, f"{where}.examples[{i}]") for i, item in enumerate(rows)),
        tuple(others),
        source=f"{path}:{where.removeprefix('line ')}",
        family=expect(row.get("family", ""), str, path, f"{where}.family"),
    )


def _read_example(row: object, path: Path, where: str) -> Example:
    item = expect(row, dict, path, where)
    _no_other_keys(item, _EXAMPLE_KEYS, path, where)
    answers = (field(item, "target", str, path, where),)
    answers += texts(item, "references", path, where) if item.get("references") else ()
    return example(field(item, "input", str, path, where), answers)


def _no_other_keys(row: dict[str, Any], known: set[str], path: Path, where: str) -> None:
    for key in row:
        if key not in known:
            raise read_error(
                path, where, f"unknown key {key!r}; the keys are {', '.join(sorted(known))}"
            )
