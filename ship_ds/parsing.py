"""Texts, JSON and YAML that others wrote: what they hold, or one line that names file and place.

    read_text(path)                     UTF-8, without a byte order mark
    parse_json(text, place)             no key twice, no number or nesting without end
    parse_yaml(text, place)             the same of YAML, by the rules of version 1.2

YAML 1.1, which PyYAML reads, makes numbers of 1:30 (90) and 010 (8), texts of 1e3, and truth
values of `no` and `on`. In 1.2, which people have in mind, 010 is ten, 1e3 a thousand, and the
others are texts.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from ship_ds.errors import LFS_POINTER, UserError, lfs_pointer
from ship_ds.section import first_error

Made = TypeVar("Made")

_MOST_NODES = 1_000_000
"""Of a YAML file, aliases counted as often as they are used: a few lines of them can stand for more
than memory holds."""
_MOST_MERGED = 16
"""Sections that one merges in with `<<`."""
_DEEPEST = 100
"""Levels of lists and sections in YAML; PyYAML needs several frames of Python's for each."""


def as_dataclass(kind: type[Made], values: Mapping[str, Any], place: object, way_out: str) -> Made:
    """What a JSON object says, as a dataclass whose fields it names.

    Args:
        kind: the dataclass.
        values: the object.
        place: where it was read, for messages.
        way_out: what to do about one that is not of this form.

    Raises:
        UserError: a key is unknown, one is missing, or a value is of another type.
    """
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    if unknown := values.keys() - known:
        raise UserError(f"{place}: unknown key {min(unknown)!r}; {way_out}")
    try:
        return TypeAdapter(kind).validate_python(values, strict=False)
    except ValidationError as error:
        raise UserError(f"{place}: {first_error(error).line}; {way_out}") from None


def read_text(path: Path) -> str:
    """What a text file holds, without a byte order mark.

    Raises:
        UserError: it cannot be opened, is not UTF-8, or git-lfs keeps it elsewhere.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; name a file that can be read"
        ) from None
    return decode(content, str(path))


def decode(content: bytes, place: str) -> str:
    """The bytes as text; see `read_text`."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: byte {error.start}: not UTF-8; {other_than_utf8(content)}"
        ) from None
    refuse_pointer(text, place)
    return text


_BEGINNINGS = {
    b"\x1f\x8b": "it is compressed by gzip: unpack it",
    b"BZh": "it is compressed by bzip2: unpack it",
    b"\xfd7zXZ\x00": "it is compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd: unpack it",
    b"PK\x03\x04": "it is a zip archive: unpack it",
}
"""What compressed files begin with, and what to do about them."""


def other_than_utf8(content: bytes) -> str:
    """What to do about a file that is not UTF-8, by its first bytes."""
    known = (advice for first, advice in _BEGINNINGS.items() if content.startswith(first))
    return next(known, "save it as UTF-8")


def refuse_pointer(text: str, place: str) -> None:
    """Raise UserError for what git-lfs puts in a file's place until it is fetched."""
    if text.startswith(LFS_POINTER):
        raise lfs_pointer(place)


def trimmed(text: str) -> str:
    """The text without blank lines before it and white space after it.

    An indented first line stays so, since in code that is part of what it says; a single space
    before it is what was left when somebody cut a longer text.
    """
    text = _BLANK_LINES.sub("", text.rstrip())
    return text if text.startswith(("\t", "  ")) else text.lstrip()


_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")


def unicode_text(text: str, place: str) -> str:
    """The text; JSON, and an argument that was no UTF-8, can hold half of a surrogate pair, which
    no tokenizer takes. Raises UserError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: letter {error.start} is half a surrogate pair, which is no Unicode text"
        ) from None
    return text


def split_lines(text: str) -> list[str]:
    """The lines of a text, as any system ends them. `str.splitlines` would cut at U+2028 and its
    like too, which may stand inside a line of JSON."""
    return re.split(r"\r\n|\n|\r", text)


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises UserError where it cannot be read or is none."""
    return parse_json(read_text(path), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises UserError where it holds another thing."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_json_lines(path: Path) -> list[Any]:
    """What each line of a JSON Lines file holds. A last line that has no end is left out: somebody
    is writing it, or was when the machine went down.

    Raises:
        UserError: It cannot be read, or a line is no JSON; the message has its number.
    """
    *lines, _ = split_lines(read_text(path))
    return [
        parse_json(line, f"{path}:{number}", is_line=True)
        for number, line in enumerate(lines, 1)
        if line
    ]


def parse_json(text: str, place: str, *, is_line: bool = False) -> Any:
    """What a JSON text says.

    Args:
        text: one document.
        place: the file, or file and line, for messages.
        is_line: it is one line, whose number `place` has; messages then name the column alone.

    Raises:
        UserError: it is not JSON, has a key twice, a number of thousands of digits, or lists in
            lists without end.
    """
    try:
        return json.loads(text, object_pairs_hook=_once_each)
    except json.JSONDecodeError as error:
        line, hint = (
            ("", "; expected one JSON object a line") if is_line else (f"line {error.lineno}: ", "")
        )
        raise UserError(
            f"{place}: {line}not JSON: {error.msg} at column {error.colno}{hint}"
        ) from None
    except RecursionError:
        raise UserError(f"{place}: not JSON: nested too deeply") from None
    except _TwiceError as error:
        raise UserError(f"{place}: the key {error.args[0]!r} is there twice; leave one") from None
    except ValueError:  # Python's bound on what it turns into a number
        raise UserError(f"{place}: a number has thousands of digits; give it as a text") from None


class _TwiceError(Exception):
    """A key that an object has twice."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise _TwiceError(key)
            seen.add(key)
    return values


def is_folder_name(text: str) -> bool:
    """Whether a text that others gave may be the name of a folder of ours: of letters, digits, '.',
    '_' and '-', not hidden, not too long, and not what files.py calls half a folder."""
    return (
        re.fullmatch(r"\w[\w.-]*", text) is not None
        and len(text.encode()) <= _LONGEST_NAME
        and not text.endswith((".part", ".replaced"))
    )


_LONGEST_NAME = 200
"""Bytes; file systems take 255, and names get endings."""


def parse_yaml(text: str, place: str) -> Any:
    """What a YAML text says, by the rules of version 1.2.

    Args:
        text: one document.
        place: the file, for messages.

    Raises:
        UserError: it is not YAML, has a key twice, is nested too deeply, or its aliases stand for
            more than a config could hold.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{place}: not YAML: {_on_one_line(error)}") from None
    except RecursionError:
        raise UserError(f"{place}: not YAML: nested too deeply") from None
    # PyYAML lets through what Python's conversions raise: of a value that its own tag does not fit,
    # such as `!!bool maybe` or an empty `!!float`, of thousands of digits, and of an escape beyond
    # Unicode's last letter, such as "\UFFFFFFFF".
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError):
        raise UserError(
            f"{place}: not YAML: a value that cannot be read as what it is tagged to be, a number "
            "of thousands of digits, or an escape that is no letter of Unicode's"
        ) from None
    _bound(value, place)
    return value


def _on_one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    problem = " ".join(str(getattr(error, "problem", error)).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which makes plain values alone."""

    # Each loader has tables of its own: a change of an inherited one would reach all of PyYAML.
    yaml_implicit_resolvers = {}  # noqa: RUF012
    _depth = _num_merged = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.composer.ComposerError(
                None, None, "nested too deeply", self.peek_event().start_mark
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def flatten_mapping(self, node: Any) -> None:
        """PyYAML's own, with an end: what merges what merges doubles with each level."""
        merged = [value for key, value in node.value if key.tag == _MERGE]
        if not merged:
            return super().flatten_mapping(node)  # also of what it calls itself
        sections = [len(one.value) if one.id == "sequence" else 1 for one in merged]
        if sum(sections) <= _MOST_MERGED:
            super().flatten_mapping(node)
            self._num_merged += len(node.value)
            if self._num_merged <= _MOST_NODES:
                return None
        raise yaml.constructor.ConstructorError(
            None, None, "<< merges in too much; write out what you mean", node.start_mark
        )

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are there once each; what `<<` merges in gives way to them."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict | set):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key has to be a text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} is there twice; leave one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_whole_number(self, node: Any) -> int:
        text = self.construct_scalar(node).replace("_", "")
        base = 8 if "0o" in text else 16 if "0x" in text else 2 if "0b" in text else 10
        return int(text, base)


_MERGE, _INT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:int"
_PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (
        r"[-+]?[0-9][0-9_]*|[-+]?0o[0-7_]+|[-+]?0x[0-9a-fA-F_]+|[-+]?0b[01_]+",
        "-+0123456789",
    ),
    "float": (
        r"[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "merge": (r"<<", "<"),
    "null": (r"~|null|Null|NULL|", "~nN\0"),
}
"""What a text without quotes stands for, each with its first letters; the first that fits."""
for _name, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}",
        re.compile(rf"(?:{_pattern})\Z"),
        ["" if letter == "\0" else letter for letter in _first],
    )
_Loader.add_constructor(_INT, _Loader.construct_whole_number)


def _bound(value: Any, place: str) -> None:
    """Raise UserError for a document that holds itself, or too much."""
    for count, _ in enumerate(_nodes(value)):
        if count > _MOST_NODES:
            raise UserError(
                f"{place}: its aliases (&name, *name) stand for more than {_MOST_NODES:,} values; "
                "write out what you mean"
            )


def _nodes(value: Any) -> Iterator[Any]:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        yield one
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple | set):
            waiting += one
