"""Our own JSONL, one task a line:

    {"id": "t1", "instruction": "...", "examples": [{"input": "...", "target": "...", "references": ["..."]}],
     "paraphrases": ["..."], "family": "..."}

`references` (every right answer beside the target), `paraphrases` and `family` may be left out; any other key is an error.
"""

import json
from pathlib import Path

from ship_ds.data.readers.checks import example, expect, field, texts
from ship_ds.data.task import DataError, Example, Task, read_error

_TASK_KEYS, _EXAMPLE_KEYS = {"id", "instruction", "examples", "paraphrases", "family"}, {"input", "target", "references"}


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() and path.suffix == ".jsonl" else sorted(path.glob("*.jsonl"))


def matches(path: Path) -> bool:
    return bool(_files(path))


def read(path: Path) -> list[Task]:
    tasks = []
    for file in _files(path):
        with file.open(encoding="utf-8") as lines:
            try:
                tasks += [_read_line(line, file, f"line {i}") for i, line in enumerate(lines, 1) if line.strip()]
            except UnicodeDecodeError as error:
                raise DataError(f"{file}: byte {error.start}: not UTF-8") from None
    return tasks


def _read_line(line: str, path: Path, where: str) -> Task:
    try:
        row = expect(json.loads(line), dict, path, where)
    except json.JSONDecodeError as error:
        raise read_error(path, where, f"not JSON: {error.msg} at column {error.colno}") from None
    _no_other_keys(row, _TASK_KEYS, path, where)
    rows = field(row, "examples", list, path, where)
    instruction = field(row, "instruction", str, path, where).strip()
    if not instruction:
        raise read_error(path, f"{where}.instruction", "expected a text, got an empty one")
    return Task(
        field(row, "id", str, path, where), instruction,
        tuple(_read_example(item, path, f"{where}.examples[{i}]") for i, item in enumerate(rows)),
        texts(row, "paraphrases", path, where) if row.get("paraphrases") else (),
        source=f"{path}:{where.removeprefix('line ')}", family=expect(row.get("family", ""), str, path, f"{where}.family"),
    )


def _read_example(row: object, path: Path, where: str) -> Example:
    found = expect(row, dict, path, where)
    _no_other_keys(found, _EXAMPLE_KEYS, path, where)
    answers = (field(found, "target", str, path, where),)
    answers += texts(found, "references", path, where) if found.get("references") else ()
    return example(field(found, "input", str, path, where), answers)


def _no_other_keys(row: dict[str, object], known: set[str], path: Path, where: str) -> None:
    for key in row:
        if key not in known:
            raise read_error(path, where, f"unknown key {key!r}; the keys are {', '.join(sorted(known))}")
