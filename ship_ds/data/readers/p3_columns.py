"""P3's own columns (Sanh et al. 2022) through `datasets`: `inputs_pretokenized` and `targets_pretokenized`.

A folder of parquet, arrow or JSONL files, or of folders of them; each folder with files is one prompt's task, as on the hub. The
instruction is what all inputs of a task share at their start and end, since P3 stores the filled-in prompt alone; a task whose
prompt has text between its fields keeps that in its inputs.
"""

import os
from pathlib import Path
from typing import Any

from ship_ds.data.readers.checks import example
from ship_ds.data.task import DataError, Example, Task, read_error

_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json"}
_INPUTS, _TARGETS = "inputs_pretokenized", "targets_pretokenized"
_NUM_COMPARED = 200


def _folders(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix in _SUFFIXES else []
    return sorted({file.parent for file in path.rglob("*") if file.suffix in _SUFFIXES})


def _files(folder: Path) -> list[Path]:
    return [folder] if folder.is_file() else sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)


def matches(path: Path) -> bool:
    folders = _folders(path)
    if not folders:
        return False
    file = _files(folders[0])[0]
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8", errors="replace") as lines:
            return f'"{_INPUTS}"' in lines.readline()
    return _INPUTS in _table([file]).column_names


def _table(files: list[Path]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    kind = _SUFFIXES[files[0].suffix]
    same = [str(file) for file in files if _SUFFIXES[file.suffix] == kind]
    try:
        return datasets.load_dataset(kind, data_files=same, split="train")
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(f"{files[0]}: cannot be read as {kind}: {str(error).splitlines()[0]}") from None


def read(path: Path) -> list[Task]:
    return [_read_folder(folder, path) for folder in _folders(path)]


def _read_folder(folder: Path, root: Path) -> Task:
    table = _table(_files(folder))
    for column in (_INPUTS, _TARGETS):
        if column not in table.column_names:
            raise read_error(folder, "columns", f"has no {column!r}; it has {', '.join(table.column_names)}")
    rows = []
    for i, row in enumerate(table):
        for column in (_INPUTS, _TARGETS):
            if not isinstance(row[column], str):
                raise read_error(folder, f"row {i}.{column}", f"expected a text, got {type(row[column]).__name__}")
        rows.append((row[_INPUTS], row[_TARGETS]))
    if len(rows) < 2:
        raise read_error(folder, "rows", f"expected at least two, to tell instruction and input apart, got {len(rows)}")
    before, after = _shared([text for text, _ in rows[:_NUM_COMPARED]])
    instruction = " ".join(f"{before} {after}".split())
    name = str(folder.relative_to(root)) if folder != root else folder.stem
    if not instruction:
        raise read_error(folder, "rows", "the inputs share no text at their start or end, so there is no instruction to read")
    examples = tuple(_example(text, target, before, after) for text, target in rows)
    return Task(name, instruction, examples, source=str(folder))


def _shared(texts: list[str]) -> tuple[str, str]:
    """The common start and end of all texts, cut back to whole words."""
    before = os.path.commonprefix(texts)
    before = before[: before.rfind(" ") + 1] if not before.endswith(("\n", " ")) else before
    rest = [text[len(before) :] for text in texts]
    after = os.path.commonprefix([text[::-1] for text in rest])[::-1]
    start = next((i for i, letter in enumerate(after) if letter.isspace()), len(after))
    return before, after[start:]


def _example(text: str, target: str, before: str, after: str) -> Example:
    text = text.removeprefix(before)
    return example(text.removesuffix(after) if after else text, (target,))
