"""What every section of a config is: frozen and strict; the first thing that is wrong in one, or in
whatever else pydantic reads. Imports no torch."""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

_VARIABLE = re.compile(r"\$\{?(\w+)\}?")


def _expanded(path: str) -> str:
    """The path with `~` and environment variables put in, as a shell would have done."""
    for name in _VARIABLE.findall(path):
        if name not in os.environ:
            raise ValueError(f"{path}: there is no environment variable {name}; set it")
    path = os.path.expanduser(os.path.expandvars(path))
    if path.startswith("~"):
        raise ValueError(f"{path}: there is no such user's home; write the folder out")
    if "\0" in path or not _is_unicode(path) or len(os.fsencode(path)) > _LONGEST_PATH:
        raise ValueError("no path of a file or folder")
    return path


_LONGEST_PATH = 4096
"""Of Linux."""
PathText = Annotated[str, AfterValidator(_expanded)]
"""The path of a file or folder, as a text; `~` and `$HOME` mean what they mean in a shell."""


class Section(BaseModel):
    """An unknown key is an error; numbers are finite, and `true` is no number.

    The text below a field is its description (schema.py prints them all; a test wants each).
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __hash__(self) -> int:
        """By content, so that a kind from outside may hold lists; pydantic's own hash may not."""
        return hash(self.model_dump_json())

    @model_validator(mode="before")
    @classmethod
    def _each_is_what_json_can_hold(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            if (
                isinstance(value, bool)
                and name in cls.model_fields
                and cls.model_fields[name].annotation is not bool
            ):
                raise FieldError((name,), "value_error", "true and false are no value of it")
            texts = value if isinstance(value, list | tuple) else [value]
            if not all(_is_unicode(text) for text in texts if isinstance(text, str)):
                raise FieldError(
                    (name,),
                    "value_error",
                    "no Unicode text (half a surrogate pair, or bytes that are not UTF-8)",
                )
        return values


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which "\ud800" in YAML and JSON gives
        return False
    return True


class FieldError(ValueError):
    """What is wrong with one field. Raised inside a section whose class a table has chosen, it is
    handed on whole by pydantic.

    Args:
        location: the key below what was read, () for all of it.
        kind: pydantic's type of the error, such as "extra_forbidden".
        message: one line.
        hint: of an unknown key, what to do; "" where nobody knows.
    """

    def __init__(
        self, location: tuple[int | str, ...], kind: str, message: str, hint: str = ""
    ) -> None:
        super().__init__(message)
        self.location, self.kind, self.hint = location, kind, hint

    @property
    def is_unknown_key(self) -> bool:
        """Whether there is no such key, of a section or of a dataclass."""
        return self.kind in ("extra_forbidden", "unexpected_keyword_argument")

    @property
    def text(self) -> str:
        """What is wrong, without its key."""
        return f"unknown key{self.hint}" if self.is_unknown_key else str(self)

    @property
    def line(self) -> str:
        """Key and text."""
        key = ".".join(map(str, self.location))
        return f"{key}: {self.text}" if key else self.text

    def line_beside(self, known: Iterable[str]) -> str:
        """`line`, and of an unknown key at the top what there is: `known`, the keys there."""
        is_at_the_top = self.is_unknown_key and len(self.location) == 1
        return f"{self.line}; there are {', '.join(known)}" if is_at_the_top else self.line


class _Errors(Protocol):
    """Pydantic's ValidationError, and FastAPI's own."""

    def errors(self) -> Sequence[Any]: ...


def first_error(error: _Errors, *, prefers_unknown: bool = False) -> FieldError:
    """The first of pydantic's errors, its place in full where a table chose a section's class.

    Args:
        error: pydantic's.
        prefers_unknown: of a key that is missing, say the unknown one beside it, as which it was
            perhaps written.
    """
    errors = error.errors()
    first = errors[0]
    if prefers_unknown and first["type"] == "missing":
        unknown = (
            one
            for one in errors
            if one["type"] == "extra_forbidden" and one["loc"][:-1] == first["loc"][:-1]
        )
        first = next(unknown, first)
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, FieldError):
        return FieldError((*first["loc"], *inner.location), inner.kind, str(inner), inner.hint)
    return FieldError(first["loc"], first["type"], first["msg"].removeprefix("Value error, "))
