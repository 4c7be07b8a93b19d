"""Every setting is documented, and docs/configuration.md says what the schema says."""

import importlib
import json
import pkgutil
from collections.abc import Iterator

import pytest

import ship_ds
from ship_ds import cli
from ship_ds.errors import UserError
from ship_ds.kinds import ADAPTERS, OBJECTIVES, PRIORS, SOURCES
from ship_ds.schema import chosen_groups, groups, type_text
from ship_ds.section import Section
from tools import make_configuration_page


@pytest.fixture(autouse=True)
def own_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the toys that other tests of this process have registered."""
    for table in (ADAPTERS, OBJECTIVES, PRIORS, SOURCES):
        own = {
            name: kind
            for name, kind in table._kinds.items()
            if kind.config_class.__module__.startswith("ship_ds.")
        }
        monkeypatch.setattr(table, "_kinds", own)


def sections(base: type[Section] = Section) -> Iterator[type[Section]]:
    """Every section class of the package, whoever imported it."""
    for section in base.__subclasses__():
        if section.__module__.startswith("ship_ds."):
            yield section
        yield from sections(section)


def test_every_field_of_every_section_is_documented() -> None:
    for module in pkgutil.walk_packages(ship_ds.__path__, "ship_ds."):
        if "config" in module.name or module.name.startswith("ship_ds.data"):
            importlib.import_module(module.name)
    fields = {
        f"{section.__name__}.{name}": field.description
        for section in sections()
        for name, field in section.model_fields.items()
        if name != "kind"  # what a kind is, its class says
    }
    assert len(fields) > 120
    assert [name for name, text in fields.items() if not text] == []


def test_every_kind_says_what_it_is() -> None:
    kinds = {section for section in sections() if "kind" in section.model_fields}
    assert len(kinds) >= 8
    assert [kind.__name__ for kind in kinds if not kind.__dict__.get("__doc__")] == []


def test_page_is_what_the_tool_writes() -> None:
    assert make_configuration_page.PAGE.read_text() == make_configuration_page.page()


def test_every_key_of_a_config_is_in_one_group() -> None:
    keys = [f"{group.title}.{setting.name}" for group in groups() for setting in group.settings]
    assert len(keys) == len(set(keys))
    for key in ("training.steps", "model.hypernetwork, kind: lora.rank", "data.split.seed"):
        assert key in keys
    assert [group.title for group in groups() if group.key == "data"] == [
        "data, kind: rules",
        "data, kind: files",
        "data, kind: mixture",
    ]


def test_config_shows_a_section_and_those_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "model.encoder", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    keys = ["model.encoder", *2 * ["model.encoder.tuning"], *2 * ["model.encoder.pooling"]]
    assert [group["key"] for group in shown] == keys
    assert cli.main(["config", "training"]) == 0
    text = capsys.readouterr().out
    assert "  tasks_per_step = 24    integer above 0\n    Global: ranks" in text
    assert cli.main(["config", "induce"]) == 0
    assert "num_splices = 160" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("training.steps", {"training.steps"}),
        ("max_gigabytes", {"checkpoint.max_gigabytes"}),
        ("induce.num_splices", {"ship-ds induce.num_splices"}),
        ("tuning.rank", {"model.encoder.tuning.rank", "model.decoder.tuning.rank"}),
    ],
)
def test_config_shows_a_setting_by_its_key_or_the_end_of_it(key: str, shown: set[str]) -> None:
    chosen = chosen_groups(key)
    assert {f"{group.key}.{row.name}" for group in chosen for row in group.settings} == shown


def test_config_shows_a_section_by_the_end_of_its_key() -> None:
    """As a section, with what is in it, though settings may have that name elsewhere."""
    assert {group.key for group in chosen_groups("split")} == {"data.split"}
    assert {group.key for group in chosen_groups("encoder")} == {
        *("model.encoder", "model.encoder.tuning", "model.encoder.pooling")
    }
    with pytest.raises(
        UserError, match=r"no section and no setting 'training\.nope'; the sections"
    ):
        chosen_groups("training.nope")


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer", "exclusiveMinimum": 0}, "integer above 0"),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "number at least 0, below 1"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "string or null"),
        ({"enum": ["a", "b"]}, "a | b"),
        ({"type": "array", "items": {"$ref": "#/$defs/X"}}, "list of: boolean"),
    ],
)
def test_types_are_words(schema: dict[str, object], text: str) -> None:
    assert type_text(schema, {"$defs": {"X": {"type": "boolean"}}}) == text
