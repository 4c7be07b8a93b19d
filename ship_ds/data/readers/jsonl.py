"""Our own format, one task a line of JSONL, or a JSON array of them:

    {"id": "t1", "instruction": "...", "examples": [
        {"input": "...", "target": "...", "references": ["..."]}],
     "paraphrases": ["..."], "family": "...", "dataset": "...", "weight": 1, "origin": {...}}
    {"id": "t2", "instruction": "...", "inputs": ["...", "..."]}

`references` (every right answer beside the target), `paraphrases`, `family`, `dataset` (what its
examples were made of), `weight` (how often it is drawn beside a task of weight 1) and `origin` (how
it was made; not read) may be left out, and `examples` where there are `inputs`, which have no
target yet (none, of an instruction alone); any other key is an error.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ship_ds.data.readers.checks import distinct, example, expect, field, texts
from ship_ds.data.readers.files import files_of, kind_of
from ship_ds.data.readers.rows import first_row, rows_of
from ship_ds.data.task import SMALLEST_WEIGHT, Example, Task, read_error
from ship_ds.parsing import trimmed

IDS_ARE_IN_ROWS = True
"""A file's name has no part in them."""
_TASK_KEYS, _EXAMPLE_KEYS = (
    {
        *("id", "instruction", "examples", "inputs", "paraphrases", "family", "dataset"),
        *("weight", "origin"),
    },
    {"input", "target", "references"},
)

_LARGEST_WEIGHT = 1_000


def files(path: Path) -> list[Path]:
    """The file, or the files of the folder: .jsonl whatever they hold, and JSON arrays of tasks."""
    return [
        file
        for file in files_of(path, (".json", ".jsonl"))
        if kind_of(file) == ".jsonl" or _is_ours(file)
    ]


def _is_ours(file: Path) -> bool:
    row = first_row(file)
    return row is not None and "instruction" in row and bool(row.keys() & {"examples", "inputs"})


def matches(path: Path) -> bool:
    """Whether there is a .jsonl file here, or a JSON array of such tasks."""
    return bool(files(path))


def read(path: Path, counts: Counter[str]) -> list[Task]:
    """The tasks of every file, one for each row."""
    return [_read_row(row, file, where) for file, where, row in rows_of(files(path))]


def _read_row(row: dict[str, Any], path: Path, where: str) -> Task:
    _no_other_keys(row, _TASK_KEYS, path, where)
    if not {"id", "instruction"} <= row.keys() or not row.keys() & {"examples", "inputs"}:
        raise read_error(
            path,
            where,
            f"has {', '.join(map(repr, row)) or 'nothing'}; a task has 'id', 'instruction' and "
            "'examples' or 'inputs': add what is missing",
        )
    paraphrases = texts(row, "paraphrases", path, where) if row.get("paraphrases") else ()
    instruction, *others = distinct((field(row, "instruction", str, path, where), *paraphrases))
    row = {"examples": [], "inputs": [], **row}
    rows = field(row, "examples", list, path, where)
    inputs = field(row, "inputs", list, path, where)
    return Task(
        field(row, "id", str, path, where),
        instruction,
        tuple(_read_example(item, path, f"{where}.examples[{i}]") for i, item in enumerate(rows)),
        tuple(others),
        source=f"{path}:{where.split()[-1]}",
        family=expect(row.get("family", ""), str, path, f"{where}.family"),
        dataset=expect(row.get("dataset", ""), str, path, f"{where}.dataset"),
        weight=_weight(row.get("weight", 1), path, f"{where}.weight"),
        inputs=tuple(
            trimmed(expect(text, str, path, f"{where}.inputs[{i}]"))
            for i, text in enumerate(inputs)
        ),
    )


def row_of(task: Task, origin: Mapping[str, Any]) -> dict[str, Any]:
    """The task as a line of our format.

    Args:
        task: what `read` gives back, but for its source.
        origin: how it was made.
    """
    row: dict[str, Any] = {"id": task.id, "instruction": task.instruction}
    if task.paraphrases:
        row["paraphrases"] = list(task.paraphrases)
    if task.family:
        row["family"] = task.family
    if task.dataset:
        row["dataset"] = task.dataset
    if task.weight != 1:
        row["weight"] = task.weight
    row["examples"] = [
        {"input": example.input, "target": example.target}
        | ({"references": list(example.references)} if example.references else {})
        for example in task.examples
    ]
    if task.inputs:
        row["inputs"] = list(task.inputs)
    return row | {"origin": dict(origin)}


def _weight(value: object, path: Path, where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and SMALLEST_WEIGHT <= value <= _LARGEST_WEIGHT):  # type: ignore[operator]
        raise read_error(
            path,
            where,
            f"expected a number from {SMALLEST_WEIGHT:g} to {_LARGEST_WEIGHT}, got {value!r:.40}",
        )
    return float(value)  # type: ignore[arg-type]


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
