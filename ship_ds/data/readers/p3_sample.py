"""The processed P3 sample: one JSON with `train` and `test` rows of sub_task_id, input, target and
knowledge (the instruction).

Each text carries its tag (<input>, <output>, <instruction>), which is taken off.
"""

import re
from collections import Counter
from pathlib import Path

from ship_ds.data.readers.checks import example, expect, field, load_object
from ship_ds.data.readers.files import KEY_BYTES, files_of, head
from ship_ds.data.splits import hold_out
from ship_ds.data.task import Example, Task, read_error
from ship_ds.parsing import trimmed

_TAG = re.compile(r"\s*<(input|output|instruction)>(.*)</\1>\s*", re.DOTALL)
_PARTS = ("train", "test")


def files(path: Path) -> list[Path]:
    """The .json files; this format has exactly one."""
    return files_of(path, (".json",))


def _file(path: Path) -> Path | None:
    paths = files(path)
    return paths[0] if len(paths) == 1 else None


def matches(path: Path) -> bool:
    """Whether the file has the two keys of this format."""
    file = _file(path)
    if file is None:
        return False
    text = head(file, KEY_BYTES)
    return '"sub_task_id"' in text and '"knowledge"' in text


def read(path: Path, counts: Counter[str]) -> list[Task]:
    """The rows of `test` are held out, so that every split keeps the sample's own."""
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
                _untagged(field(row, key, str, file, where), file, f"{where}.{key}")
                for key in ("input", "target", "knowledge")
            )
            row_example = example(text, (target,))
            examples.setdefault(number, []).append(
                hold_out(row_example) if part == "test" else row_example
            )
            wordings.setdefault(number, {})[instruction] = None
    tasks = []
    for number, rows in sorted(examples.items()):
        instruction, *others = wordings[number]
        tasks.append(
            Task(f"p3-{number}", instruction, tuple(rows), tuple(others), source=str(file))
        )
    return tasks


def _untagged(text: str, path: Path, where: str) -> str:
    match = _TAG.fullmatch(text)
    if match is None:
        raise read_error(
            path,
            where,
            f"expected a text between <input>, <output> or <instruction> tags, got {text[:40]!r}",
        )
    return trimmed(match[2])
