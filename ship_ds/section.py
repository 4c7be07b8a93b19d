"""What every section of a config is: frozen and strict. Imports no torch."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


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
