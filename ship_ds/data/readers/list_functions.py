"""BIG-bench list_functions (Rule 2020): `cNNN/task.json`; the instruction is the quoted part of
`description`."""

import re
from collections import Counter
from pathlib import Path

from ship_ds.data.readers.checks import example, expect, field, load_object, texts
from ship_ds.data.readers.files import KEY_BYTES, files_of, head, stem_of
from ship_ds.data.task import Task, read_error

_RULE = re.compile(r'"(.*)"', re.DOTALL)


def files(path: Path) -> list[Path]:
    """The task.json, or those of the folder's folders."""
    inner = [] if path.is_file() else sorted(path.glob("*/"))
    return _task_files(path) or [file for folder in inner for file in _task_files(folder)]


def _task_files(path: Path) -> list[Path]:
    return [file for file in files_of(path, (".json",)) if stem_of(file).lower() == "task"]


def matches(path: Path) -> bool:
    """Whether the first task.json has a description, as those of this format do."""
    paths = files(path)
    return bool(paths) and '"description"' in head(paths[0], KEY_BYTES)


def read(path: Path, counts: Counter[str]) -> list[Task]:
    """The tasks, one for each task.json."""
    return [_read_file(file) for file in files(path)]


def _read_file(path: Path) -> Task:
    content = load_object(path)
    rule = _RULE.search(field(content, "description", str, path, "task"))
    if rule is None:
        raise read_error(path, "task.description", "expected the rule in double quotes")
    examples = []
    for i, row in enumerate(field(content, "examples", list, path, "task")):
        where = f"examples[{i}]"
        expect(row, dict, path, where)
        examples.append(
            example(field(row, "input", str, path, where), texts(row, "target", path, where))
        )
    return Task(path.resolve().parent.name, rule[1].strip(), tuple(examples), source=str(path))
