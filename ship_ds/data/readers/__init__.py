"""Readers: every format becomes the same `Task`. A format is one module with `files(path)`,
`matches(path)` and `read(path, counts)`.

Nothing is dropped in silence: a row that is not as its format says raises DataError with file,
place and reason, and what a reader leaves out of rows that are right goes into `counts`.
"""

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from ship_ds.data.readers import (
    alpaca,
    instruction_induction,
    jsonl,
    list_functions,
    messages,
    natural_instructions,
    p3_columns,
    p3_sample,
    plain_text,
)
from ship_ds.data.readers.checks import load_json
from ship_ds.data.readers.files import (
    FILE_SUFFIXES,
    OTHER_SUFFIXES,
    check_there,
    files_and_dead_links,
    files_of,
    kind_of,
)
from ship_ds.data.readers.rows import first_row
from ship_ds.data.task import DataError, Task
from ship_ds.errors import UserError

FORMATS: dict[str, ModuleType] = {
    "natural-instructions": natural_instructions,
    "instruction-induction": instruction_induction,
    "list-functions": list_functions,
    "p3-sample": p3_sample,
    "p3": p3_columns,
    "alpaca": alpaca,
    "messages": messages,
    "plain-text": plain_text,
    "jsonl": jsonl,
}
"""Every reader by the name that `data.format` calls it; "auto" takes the first that matches."""

if TYPE_CHECKING:
    Format = str
else:
    Format = Literal["auto", *FORMATS]
    """What `data.format` may say: a checker of types cannot read it off a table, pydantic can."""


def detect_format(path: Path) -> str:
    """The format of a file or folder; raises DataError when it is none that we read."""
    check_there(path)
    for name, reader in FORMATS.items():
        if reader.matches(path):
            return name
    raise DataError(
        f"{path}: not a format that is read here; the formats are {', '.join(FORMATS)}"
        f"{_why_none(path)}"
    )


def _why_none(path: Path) -> str:
    """What can be said of a file or folder that no reader takes: "; ..." or nothing. Raises
    UserError where its JSON is broken, which says more than that."""
    files = files_of(path, (*FILE_SUFFIXES, *OTHER_SUFFIXES)) or ([path] if path.is_file() else [])
    if not files:
        inside = files_of(path, FILE_SUFFIXES, below=True)
        if inside:
            return f"; its files are in folders of it, such as {inside[0].relative_to(path)}"
        return (
            f"; the folder has no file that ends in {', '.join(FILE_SUFFIXES)}, compressed or not"
        )
    file = files[0]
    others = [one for one in files if kind_of(one) in OTHER_SUFFIXES]
    if others and {kind_of(one) for one in files if one not in others} == {".txt"}:
        return (
            f"; {others[0].name} is not read, and a .txt beside it only where it is named, by "
            "format: plain-text"
        )
    if kind_of(file) not in FILE_SUFFIXES:
        return f"; {file.name} is no {' or '.join(FILE_SUFFIXES)}, plain or as .gz, .bz2 or .xz"
    if kind_of(file) != ".json":
        return ""
    if not load_json(file):
        return f"; {file.name} is empty"
    keys = ", ".join(map(repr, first_row(file) or ()))
    return f"; {file.name} begins with an object of {keys:.200}" if keys else ""


def usual_min_examples(path: Path, format: str = "auto") -> int:
    """Examples that a task of this format has at least, where no filter says another number: two,
    one to train and one to test on, but in formats that are made for pre-training."""
    reader = FORMATS[detect_format(path) if format == "auto" else format]
    return getattr(reader, "MIN_EXAMPLES_PER_TASK", 2)


def read_tasks(path: Path, format: str = "auto", counts: Counter[str] | None = None) -> list[Task]:
    """Every task below `path`, in a fixed order, with ids that no two share and no empty
    instruction.

    Args:
        path: a file or folder.
        format: of `FORMATS`; "auto" finds it out.
        counts: takes by reason how often something of a row is left out; None: nobody asks.

    Raises:
        DataError: what is there is not as its format says.
    """
    name = detect_format(path) if format == "auto" else format
    if name not in FORMATS:
        raise DataError(f"{name}: no such format; the formats are {', '.join(FORMATS)}")
    check_there(path)
    counts = Counter() if counts is None else counts
    try:
        tasks: list[Task] = FORMATS[name].read(path, counts)
    except UserError as error:  # also of a text that is no JSON
        # Else nobody knows why a row should have what it is said to lack.
        guessed = f" (taken for {name}, since no format is named)" if format == "auto" else ""
        raise DataError(f"{error}{guessed}") from None
    _count_unread(path, name, counts)
    if num_inputs := sum(len(task.inputs) for task in tasks):
        counts["inputs without a target, which `ship-ds supply answers` makes"] += num_inputs
    if not tasks:
        raise DataError(f"{path}: holds no task in the format {name}")
    ids_are_in_rows = getattr(FORMATS[name], "IDS_ARE_IN_ROWS", False)
    sources: dict[str, str] = {}
    for task in tasks:
        if not task.id.strip():
            raise DataError(f"{task.source}: the task id is empty; give every task its own")
        if task.id in sources:
            raise DataError(
                f"{task.source}: the task id {task.id!r} is also that of "
                f"{sources[task.id]}; "
                + (
                    "give every task its own"
                    if ids_are_in_rows
                    else "it is made of the file's name: rename or remove one of the two files"
                )
            )
        if not all((task.instruction, *task.paraphrases)):
            raise DataError(
                f"{task.source}: task {task.id!r} has an empty instruction; fill it in or remove it"
            )
        sources[task.id] = task.source
    return tasks


def _count_unread(path: Path, format: str, counts: Counter[str]) -> None:
    """Put what lies in the folder and is of another format into the counts, so that nobody takes it
    for read."""
    if not path.is_dir():
        return
    files = files_and_dead_links(path, (*FILE_SUFFIXES, *OTHER_SUFFIXES), below=True)
    unread = sorted({*files}.difference(FORMATS[format].files(path)))
    if unread:
        counts[f"files that {format} does not read, such as {unread[0].relative_to(path)}"] += len(
            unread
        )
