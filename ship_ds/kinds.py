"""The tables of kinds: each port of SHIP has one, from a config class to what implements it.

    ADAPTERS    model.hypernetwork    what z becomes: a LoRA, a soft prompt, ...
    PRIORS      model.prior           what z is drawn from
    SOURCES     data                  where tasks come from
    OBJECTIVES  loss                  what training minimises

A config names a kind by `kind:` (an objective by its key in `loss`). Nobody outside a port's own
folder asks of what kind a thing is: whoever needs an implementation asks the table for it,

    ADAPTERS.implementation(config.hypernetwork)

A kind of somebody else's is added by `ADAPTERS.register(TheirConfig, TheirHypernetwork)` in a
module that the environment variable SHIP_DS_PLUGINS names (several with commas between), or that
an installed package offers as an entry point of the group `ship_ds.kinds`. Both are imported before
a config is parsed. A config file or a bundle cannot name a module: opening one runs no code of it.

Imports no torch, and built-in implementations are "module:name" strings until they are asked for,
so that a config is checked before torch is loaded.
"""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import ValidationError

from ship_ds.errors import UserError, did_you_mean
from ship_ds.section import FieldError, Section, first_error

FROM_OUTSIDE = "those of modules that SHIP_DS_PLUGINS names"


@dataclass(frozen=True)
class Kind:
    """A config class with its implementation, a class or "module:name"."""

    config_class: type[Section]
    implementation: Any


class Kinds:
    """The kinds of one port by name, and by config class."""

    def __init__(self, key: str, default: Callable[[Mapping[str, Any]], str | None]) -> None:
        """Start an empty table.

        Args:
            key: where a config names the kind, for messages.
            default: the kind of a section that names none, by its other keys; None: it has to.
        """
        self.key, self._default = key, default
        self._kinds: dict[str, Kind] = {}

    def register(
        self, config_class: type[Section], implementation: Any, name: str | None = None
    ) -> None:
        """Add a kind.

        Args:
            config_class: its section of the config.
            implementation: a class, or "module:name" to be imported at the first use.
            name: what a config calls it; None: the default of the class's field `kind`.
        """
        name = name or str(config_class.model_fields["kind"].default)
        known = self._kinds.get(name)
        if known is not None and known.config_class is not config_class:
            raise UserError(
                f"{self.key}: two kinds are called {name!r}: {known.config_class.__module__} and "
                f"{config_class.__module__}; rename one of them"
            )
        self._kinds[name] = Kind(config_class, implementation)

    def names(self) -> tuple[str, ...]:
        """Every kind, in the order of registration."""
        return tuple(self._kinds)

    def config_class(self, name: str) -> type[Section]:
        """The section class of the kind called `name`."""
        return self._kinds[name].config_class

    def implementation(self, config: Section | str) -> Any:
        """What implements the kind of this section, or the kind of this name."""
        name = config if isinstance(config, str) else self.name_of(config)
        chosen = self._kinds[name].implementation
        if isinstance(chosen, str):
            module, _, attribute = chosen.partition(":")
            chosen = getattr(importlib.import_module(module), attribute)
        return chosen

    def name_of(self, config: Section) -> str:
        """What a config calls the kind of this section."""
        return next(n for n, kind in self._kinds.items() if type(config) is kind.config_class)

    def validate(self, values: Any) -> Section:
        """A section of the kind that it names; for pydantic's BeforeValidator.

        Raises FieldError."""
        if isinstance(values, Section):
            return values
        if not isinstance(values, dict):
            raise FieldError((), "value_error", f"expected a section, got {type(values).__name__}")
        name = values.get("kind", self._default(values))
        if not isinstance(name, str) or name not in self._kinds:
            known = ", ".join(self._kinds)
            message = f"there is no {name!r}; there are {known}, and {FROM_OUTSIDE}"
            raise FieldError(("kind",), "value_error", message)
        try:
            return parse_section(self._kinds[name].config_class, values)
        except FieldError as error:
            if not error.is_unknown_key or len(error.location) != 1:
                raise
            hint = self._hint(str(error.location[0]), name)
            raise FieldError(error.location, error.kind, str(error), hint) from None

    def _hint(self, key: str, name: str) -> str:
        """What was perhaps meant by a key that sections of the kind `name` have not."""
        if near := did_you_mean(key, self._kinds[name].config_class.model_fields):
            return near
        others = [one for one in self._kinds if key in self._kinds[one].config_class.model_fields]
        if not others:
            return ""
        return (
            f" of kind {name}; one of kind {' or '.join(others)} has it: give all of the section, "
            f"such as '{{kind: {others[0]}, {key}: ...}}'"
        )


def parse_section(section_class: type[Section], values: Any) -> Section:
    """The section, or FieldError with the place of the first thing that is wrong in it."""
    try:
        return section_class.model_validate(values)
    except ValidationError as error:
        raise first_error(error, prefers_unknown=True) from None


ADAPTERS = Kinds("model.hypernetwork", lambda values: "lora")
PRIORS = Kinds("model.prior", lambda values: "standard_normal")
_SOURCE_BY_KEY = {"path": "files", "sources": "mixture"}
SOURCES = Kinds(
    "data", lambda values: next((k for key, k in _SOURCE_BY_KEY.items() if key in values), "rules")
)
OBJECTIVES = Kinds("loss", lambda values: None)

_GROUP = "ship_ds.kinds"
_VARIABLE = "SHIP_DS_PLUGINS"


@cache
def load_plugins() -> None:
    """Import, once, the modules that register kinds of somebody else's.

    Raises:
        UserError: SHIP_DS_PLUGINS names a module that is not there.
    """
    for entry in importlib.metadata.entry_points(group=_GROUP):
        entry.load()
    names = [*filter(None, map(str.strip, os.environ.get(_VARIABLE, "").split(",")))]
    # A console script has its own folder on the path where `python -m` has the present one.
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"{_VARIABLE}: {name}: {error}; correct it, or unset it") from None
