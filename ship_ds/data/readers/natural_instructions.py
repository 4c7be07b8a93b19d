"""Super-NaturalInstructions task JSON (Wang et al. 2022): a task file, a folder of them, or a
folder with `tasks/`.

`Definition` may be a text or a list (the first is the instruction, others are paraphrases);
`output` is a list of right answers.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from ship_ds.data.readers.checks import distinct, example, expect, field, load_object, texts
from ship_ds.data.readers.files import KEY_BYTES, files_of, head, stem_of
from ship_ds.data.task import Task


def files(path: Path) -> list[Path]:
    """The .json file, or those of the folder, or of its `tasks/`."""
    inner = path / "tasks"
    return files_of(inner if inner.is_dir() else path, (".json",))


def matches(path: Path) -> bool:
    """Whether the first file has the two keys of this format."""
    paths = files(path)
    if not paths:
        return False
    text = head(paths[0], KEY_BYTES)
    return '"Definition"' in text and '"Instances"' in text


def read(path: Path, counts: Counter[str]) -> list[Task]:
    """The tasks, one for each file."""
    return [_read_file(file) for file in files(path)]


def _read_file(path: Path) -> Task:
    content = load_object(path)
    wordings = distinct(texts(content, "Definition", path, "task"))
    examples = []
    for i, row in enumerate(field(content, "Instances", list, path, "task")):
        where = f"Instances[{i}]"
        expect(row, dict, path, where)
        examples.append(
            example(field(row, "input", str, path, where), texts(row, "output", path, where))
        )
    category = texts(content, "Categories", path, "task")[0] if content.get("Categories") else ""
    return Task(
        stem_of(path),
        wordings[0],
        tuple(examples),
        wordings[1:],
        source=str(path),
        family=category,
        dataset=_dataset(content.get("Source")),
    )


_NO_DATASET = frozenset({"synthetic", "missing", "miscellaneous"})


def _dataset(source: Any) -> str:
    """The first name of `Source`; "" where that names no data set. No file is refused for it."""
    first = source[0] if isinstance(source, list) and source else source
    name = first.partition(";")[0].strip() if isinstance(first, str) else ""
    return "" if name.casefold() in _NO_DATASET else name
