"""What every section of a config is: frozen and strict. Imports no torch."""

import os
import re
from typing import Annotated, Any

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
    if "\0" in path or len(path) > _LONGEST_PATH:
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
    def _booleans_are_no_numbers(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            if (
                isinstance(value, bool)
                and name in cls.model_fields
                and cls.model_fields[name].annotation is not bool
            ):
                raise ValueError(f"{name}: true and false are no value of it")
        return values
