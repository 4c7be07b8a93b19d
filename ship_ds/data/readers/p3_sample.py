"""The processed P3 sample: one JSON with `train` and `test` rows of sub_task_id, input, target and knowledge (the instruction).

Each text carries its tag (<input>, <output>, <instruction>), which is taken off.
"""

import re
from pathlib import Path

from ship_ds.data.readers.checks import example, expect, field, load_object
from ship_ds.data.task import Example, Task, read_error

_TAG = re.compile(r"\s*<(input|output|instruction)>(.*)</\1>\s*", re.DOTALL)
_PARTS = ("train", "test")


def _file(path: Path) -> Path | None:
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    return files[0] if len(files) == 1 and files[0].suffix == ".json" else None


def matches(path: Path) -> bool:
    file = _file(path)
    if file is None:
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    return '"sub_task_id"' in text and '"knowledge"' in text


def read(path: Path) -> list[Task]:
    """Train rows come before test rows, so that a split by order keeps the sample's own."""
    file = _file(path)
    if file is None:
        raise read_error(path, "folder", "expected exactly one .json file")
    content = load_object(file)
    examples: dict[int, list[Example]] = {}
    wordings: dict[int, dict[str, None]] = {}
    for part in _PARTS:
        for i, row in enumerate(field(content, part, list, file, "file")):
            where = f"{part}[{i}]"
            expect(row, dict, file, where)
            number = field(row, "sub_task_id", int, file, where)
            text, target, instruction = (
                _untagged(field(row, key, str, file, where), file, f"{where}.{key}") for key in ("input", "target", "knowledge")
            )
            examples.setdefault(number, []).append(example(text, (target,)))
            wordings.setdefault(number, {})[instruction] = None
    return [
        Task(f"p3-{number}", *_first_and_rest(wordings[number], tuple(rows)), source=str(file))
        for number, rows in sorted(examples.items())
    ]


def _first_and_rest(wordings: dict[str, None], rows: tuple[Example, ...]) -> tuple[str, tuple[Example, ...], tuple[str, ...]]:
    first, *rest = wordings
    return first, rows, tuple(rest)


def _untagged(text: str, path: Path, where: str) -> str:
    match = _TAG.fullmatch(text)
    if match is None:
        raise read_error(path, where, f"expected a text between <input>, <output> or <instruction> tags, got {text[:40]!r}")
    return match[2].strip()
