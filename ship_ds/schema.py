"""Every setting with its type, default and meaning, read from pydantic's schema of the sections.

    model.encoder.base    string    ""    As the Task LLM's; empty: that very one.

`ship-ds config` prints them, and tools/make_configuration_page.py makes docs/configuration.md of
them. Imports no torch.
"""

import inspect
import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Any, get_args, get_origin

from pydantic.fields import FieldInfo

from ship_ds.config import Config
from ship_ds.errors import UserError
from ship_ds.evaluation.config import HarnessConfig
from ship_ds.inference.config import InductionConfig
from ship_ds.kinds import ADAPTERS, OBJECTIVES, PRIORS, SOURCES, load_plugins
from ship_ds.section import Section

_TABLES = {table.key: table for table in (ADAPTERS, PRIORS, SOURCES)}
_BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}


@dataclass(frozen=True)
class SettingRow:
    """One key of a section: its name there, and three texts."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class SettingGroup:
    """A section, or a kind of one; key: where it is in a config, such as "model.encoder"."""

    key: str
    kind: str | None
    about: str
    settings: tuple[SettingRow, ...]

    @property
    def title(self) -> str:
        """ "data, kind: files", or the key alone."""
        return self.key if self.kind is None else f"{self.key}, kind: {self.kind}"


def groups() -> list[SettingGroup]:
    """Every section, from the top down; those of the verbs evaluate and induce come last."""
    load_plugins()
    return [
        *_config_groups(Config, "", ""),
        *_config_groups(HarnessConfig, "ship-ds evaluate", _about(HarnessConfig)),
        *_config_groups(InductionConfig, "ship-ds induce", _about(InductionConfig)),
    ]


def chosen_groups(key: str | None) -> list[SettingGroup]:
    """The groups of a section and below it; of all for None. Of a setting the groups with that one
    alone.

    Args:
        key: whole, such as training.steps, or the last part of several, such as rank.

    Raises:
        UserError: there is neither such a section nor such a setting.
    """
    everything = groups()
    if key is None:
        return everything
    chosen = [group for group in everything if _names(key, group.key)] or [
        replace(group, settings=rows)
        for group in everything
        if (rows := tuple(row for row in group.settings if _names(key, group.key, row.name)))
    ]
    if not chosen:
        sections = dict.fromkeys(group.key for group in everything)
        raise UserError(
            f"config: there is no section and no setting {key!r}; the sections are "
            f"{', '.join(sections)}"
        )
    return chosen


def _names(key: str, *of: str) -> bool:
    """Whether it is the key that these parts make, or some of its parts, one after the other."""
    return f".{key.removeprefix('ship-ds ')}." in f".{'.'.join(of).removeprefix('ship-ds ')}."


def settings_text(chosen: Sequence[SettingGroup]) -> str:
    """The groups for a terminal, as wide as it is:

    training.steps = null    integer above 0 or null
        Optimiser steps of the whole run.
    """
    width = min(shutil.get_terminal_size((100, 1)).columns, 100)
    wrapped = textwrap.TextWrapper(width, initial_indent="    ", subsequent_indent="    ")
    lines: list[str] = []
    for group in chosen:
        lines += ["", group.title, *textwrap.wrap(group.about, width)]
        for setting in group.settings:
            lines += ["", f"  {setting.name} = {setting.default}    {setting.type}"]
            lines += wrapped.wrap(setting.meaning)
    return "\n".join(lines).lstrip("\n")


def _config_groups(section: type[Section], key: str, about: str) -> Iterator[SettingGroup]:
    """The group of one section class, then those of the sections in it."""
    fields = section.model_fields
    inner = {name: _sections(field, _join(key, name)) for name, field in fields.items()}
    schema = section.model_json_schema()
    settings = tuple(
        _setting(name, schema["properties"][name], name in schema.get("required", ()), schema)
        for name in inner
        if not inner[name] and name != "kind"
    )
    kind = fields["kind"].default if "kind" in fields else None
    if settings or kind:
        yield SettingGroup(key, kind, about, settings)
    for name, sections in inner.items():
        meaning = fields[name].description or ""
        for each in sections:
            text = f"{meaning} {_about(each)}" if len(sections) > 1 else meaning or _about(each)
            below = _config_groups(each, _join(key, name), " ".join(text.split()))
            # What is in the items of a list is what is elsewhere, and their own text says where.
            yield from islice(below, 1) if _is_list(fields[name]) else below
    if key == "loss":
        for name in OBJECTIVES.names():
            if name not in fields:  # registered from outside the package
                each = OBJECTIVES.config_class(name)
                yield from _config_groups(each, _join(key, name), _about(each))


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _sections(field: FieldInfo, key: str) -> list[type[Section]]:
    """The section classes that a field takes: one, several by their kind, or none."""
    if key in _TABLES:
        return [_TABLES[key].config_class(name) for name in _TABLES[key].names()]
    inside = field.discriminator or _is_list(field)
    kinds = get_args(field.annotation) if inside else (field.annotation,)
    # What checks an item stands beside its class; a bare `Section` is of any kind.
    kinds = tuple(get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds)
    return [
        kind
        for kind in kinds
        if inspect.isclass(kind) and issubclass(kind, Section) and kind is not Section
    ]


def _is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _about(section: type[Section]) -> str:
    """Its own docstring; that of a class above it is about something else."""
    return " ".join((section.__dict__.get("__doc__") or "").split())


def _setting(
    name: str, schema: Mapping[str, Any], is_required: bool, root: Mapping[str, Any]
) -> SettingRow:
    default = "required" if is_required else json.dumps(schema.get("default"), ensure_ascii=False)
    return SettingRow(
        name, type_text(schema, root), default, " ".join(schema.get("description", "").split())
    )


def type_text(schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """A JSON schema in words: {"type": "integer", "exclusiveMinimum": 0} -> "integer above 0"."""
    if "$ref" in schema:
        return type_text(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return " or ".join(type_text(part, root) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    if "prefixItems" in schema:
        return f"[{', '.join(type_text(part, root) for part in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return f"list of: {type_text(schema['items'], root)}"
    bounds = [f"{word} {schema[bound]:g}" for bound, word in _BOUNDS.items() if bound in schema]
    return f"{schema.get('type', 'any')} {', '.join(bounds)}".strip()
