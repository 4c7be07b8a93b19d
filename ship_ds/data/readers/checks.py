"""What the readers share: loading JSON and asking for fields, each failure one line that says
where."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ship_ds.data.readers.files import lines_of, read_whole
from ship_ds.data.task import Example, read_error
from ship_ds.parsing import parse_json, trimmed, unicode_text


def load_json(path: Path) -> Any:
    """What a JSON file holds. Raises DataError, with the line, where it is none."""
    return parse_json(read_whole(path), str(path))


def load_object(path: Path) -> Mapping[str, Any]:
    """The object that a JSON file holds. Raises DataError where it holds another thing."""
    return expect(load_json(path), dict, path, "the file")


def load_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("line 3", its object) for each line of a JSONL file that is not blank."""
    for number, line in lines_of(path):
        where = f"line {number}"
        row = parse_json(line, f"{path}: {where}", is_line=True)
        yield where, expect(row, dict, path, where)


def expect(value: Any, kind: type, path: Path, where: str) -> Any:
    """The value, if it is of this kind and valid Unicode.

    Args:
        value: that was read.
        kind: one of Python's types that JSON has, such as dict.
        path: of the file, for messages.
        where: the value's place in it, for messages, such as "line 3.input".

    Raises:
        DataError: it is of another kind; with its place.
        UserError: it is a text with half a surrogate pair; with its place.
    """
    if not isinstance(value, kind):
        raise read_error(
            path,
            where,
            f"expected {_NAMES[kind]}, got {_NAMES.get(type(value), type(value).__name__)}",
        )
    if isinstance(value, str):
        unicode_text(value, f"{path}: {where}")
    return value


def field(row: Mapping[str, Any], key: str, kind: type, path: Path, where: str) -> Any:
    """row[key], which must be there and of `kind`.

    Args:
        row: an object of the file.
        key: of the field.
        kind: one of Python's types that JSON has, such as dict.
        path: of the file, for messages.
        where: the row's place in it, for messages, such as "line 3".

    Raises:
        DataError: it is not there, or of another kind; with its place.
        UserError: it is a text with half a surrogate pair; with its place.
    """
    if key not in row:
        raise read_error(
            path, where, f"has no {key!r}; it has {', '.join(map(repr, row)) or 'nothing'}"
        )
    return expect(row[key], kind, path, f"{where}.{key}")


def texts(row: Mapping[str, Any], key: str, path: Path, where: str) -> tuple[str, ...]:
    """row[key], which must be one text or a list of at least one.

    Args:
        row: an object of the file.
        key: of the field.
        path: of the file, for messages.
        where: the row's place in it, for messages, such as "line 3".

    Returns:
        The texts in their order: one, or those of the list.

    Raises:
        DataError: it is not there, is neither, or is a list of none; with its place.
        UserError: a text has half a surrogate pair; with its place.
    """
    if isinstance(row.get(key), str):
        return (field(row, key, str, path, where),)
    values = field(row, key, list, path, where)
    if not values:
        raise read_error(path, f"{where}.{key}", "expected at least one text, got an empty list")
    return tuple(expect(text, str, path, f"{where}.{key}[{i}]") for i, text in enumerate(values))


def distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    """Trimmed, without repeats, in order."""
    return tuple(dict.fromkeys(map(trimmed, values)))


def example(text: str, answers: tuple[str, ...]) -> Example:
    """The first answer is the target; more than one are references, without repeats."""
    answers = distinct(answers)
    return Example(trimmed(text), answers[0], answers if len(answers) > 1 else ())


_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
