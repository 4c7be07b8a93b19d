"""A mixture of sources of any kind: generated rules, files, and one from outside the package."""

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ship_ds import cli
from ship_ds.config import load_config, parse_config
from ship_ds.data.mixture import MixtureConfig, MixtureTasks, _without_leaks
from ship_ds.data.rules import RulesConfig, RulesSource, build_world
from ship_ds.data.source import source_of
from ship_ds.data.task import Splits, SplitTask, Task
from ship_ds.data.task_files import FilesConfig, FilesSource
from ship_ds.errors import UserError
from ship_ds.kinds import SOURCES
from ship_ds.model.loading import load_tokenizer
from tests.conftest import train_and_go_on
from tests.starts import FIRST

pytestmark = pytest.mark.slow

FEW = {"train_examples": 3, "test_examples": 2}
RULES: dict[str, Any] = {"kind": "rules", **FEW}


@pytest.fixture(scope="module")
def world() -> Splits:
    return build_world(RulesConfig(**FEW))


def write(path: Path, wordings: list[str], num_examples: int = 1) -> Path:
    """Tasks of these wordings; of one example each they are all seen."""
    rows = [
        {
            "id": f"t{i}",
            "instruction": wording,
            "weight": 3,
            "examples": [{"input": f"{n} {i}", "target": str(n)} for n in range(num_examples)],
        }
        for i, wording in enumerate(wordings)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def file(path: Path, **settings: Any) -> dict[str, Any]:
    return {"path": str(path), "filters": {"min_examples_per_task": 1}, **settings}


def read(*sources: dict[str, Any]) -> tuple[Splits, list[str]]:
    lines: list[str] = []
    source = MixtureTasks(MixtureConfig.model_validate({"sources": sources}))
    return source.read(load_tokenizer("embedded"), lines.append), lines


def ids(splits: Splits) -> set[str]:
    return {task.id for task in splits.tasks}


def test_generated_rules_stay_what_they_are_alone(tmp_path: Path, world: Splits) -> None:
    """With kinds of unseen tasks, families and held-out wordings. The words of one rule are those
    of another, but for a number: chains of them would leave out most of the seen ones."""
    path = write(tmp_path / "a.jsonl", ["paint it red", "say the colour"])
    splits, lines = read({**RULES, "name": "world", "weight": 2}, file(path, weight=0.5))
    for part in ("seen", "dev", "unseen"):
        own = [task for task in getattr(splits, part) if task.id.startswith("world/")]
        assert own == [
            replace(one, task=replace(one.task, id=f"world/{one.id}"), weight=2.0)
            for one in getattr(world, part)
        ]
    assert {task.kind for task in splits.unseen} == {"parameter", "composition", "family"}
    of_file = [task for task in splits.seen if task.id.startswith("a.jsonl/")]
    assert [task.weight for task in of_file] == [1.5, 1.5], "the file's own weight is 3"
    assert lines[-2:] == [
        "world: weight 2: 834 seen tasks, 2502 examples, 99.8% of the draws",
        "a.jsonl: weight 0.5: 2 seen tasks, 2 examples, 0.2% of the draws",
    ]
    assert not [line for line in lines if "left out" in line]


@pytest.mark.parametrize("part", ["dev", "unseen"])
def test_a_file_does_not_train_on_a_tested_rule(tmp_path: Path, world: Splits, part: str) -> None:
    """Not in a wording that training never shows either."""
    first, second = getattr(world, part)[0], getattr(world, part)[-1]
    wordings = [first.task.instruction, *second.held_out_paraphrases, "paint it red"]
    splits, lines = read(RULES, file(write(tmp_path / "a.jsonl", wordings)))
    assert ids(splits) == {f"rules/{task.id}" for task in world.tasks} | {"a.jsonl/t2"}
    assert "left out: seen tasks with the rule of a tested one elsewhere: 2" in lines


def test_a_rule_that_a_file_tests_is_not_trained_on(tmp_path: Path, world: Splits) -> None:
    """And nothing else, but for those in nearly its words."""
    wordings = ["sort the list", "paint it red", "say the colour"]
    path = write(tmp_path / "a.jsonl", wordings, num_examples=4)
    splits, lines = read(RULES, file(path, split={"unseen_share": 1}))
    assert {task.id for task in splits.unseen if task.id.startswith("a.jsonl/")} == {
        f"a.jsonl/t{i}" for i in range(3)
    }
    gone = {f"rules/{task.id}" for task in world.tasks} - ids(splits)
    assert gone == {"rules/sort_up"}
    assert "left out: seen tasks with the rule of a tested one elsewhere: 1" in lines


def test_a_file_does_not_show_a_wording_that_is_held_out(tmp_path: Path, world: Splits) -> None:
    (wording,) = world.seen[0].held_out_paraphrases
    path = write(tmp_path / "a.jsonl", [wording, world.seen[0].task.instruction])
    splits, lines = read(RULES, file(path))
    assert {task.id for task in splits.seen if task.id.startswith("a.jsonl/")} == {"a.jsonl/t1"}
    assert "left out: seen tasks in a wording that another source never shows: 1" in lines


def test_two_worlds_are_compared_by_equal_words() -> None:
    lists = {"form": "brackets", "name": "lists"}
    splits, lines = read(RULES, {**RULES, **lists})
    assert len(splits.seen) == 2 * 834 and not any("left out" in line for line in lines)
    splits, _ = read(RULES, {**RULES, "seed": 1, "name": "other"})
    seen, tested = (
        {wording for task in tasks for wording in task.wordings}
        for tasks in (splits.seen, (*splits.dev, *splits.unseen))
    )
    assert not seen & tested and len(splits.seen) > 1500


def test_a_config_comes_back_as_it_was_dumped(tmp_path: Path) -> None:
    """And what was written before kinds could be named reads the same."""
    path = write(tmp_path / "a.jsonl", ["paint it red"])
    sources = [{**RULES, "name": "r", "weight": 2}, {"path": str(path)}]
    values = {"run": {"folder": "r"}, "training": {"steps": 1}, "data": {"sources": sources}}
    config = parse_config(values, "here")
    dumped = config.model_dump(mode="json")
    assert parse_config(json.loads(json.dumps(dumped)), "here") == config
    assert hash(parse_config(dumped, "here")) == hash(config)
    assert config.model_dump(mode="json") == parse_config(dumped, "here").model_dump(mode="json")
    rules, files = dumped["data"]["sources"]
    assert rules == {**RulesConfig(**FEW).model_dump(), "name": "r", "weight": 2.0}
    assert list(files) == ["path", "format", "filters", "truncation", "split", "name", "weight"]
    sources[1]["kind"] = "files"
    assert parse_config(values, "here") == config


def test_an_item_of_any_kind_is_overridden_by_its_place() -> None:
    data = "data={sources: [{kind: rules}, {path: a}]}"
    config = load_config("quickstart-smoke", [data, "data.sources.0.num_seen=3"])
    assert config.data.sources[0].of == RulesConfig(num_seen=3)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("kind: nope, name: a", "data.sources.1.kind: there is no 'nope'; there are rules, files"),
        ("kind: [1]", "data.sources.1.kind: there is no [1]; there are rules, files"),
        ("kind: rules, sede: 1", "data.sources.1.sede: unknown key"),
        ("kind: files, paht: x", "data.sources.1.paht: unknown key"),
        ("kind: rules, cache: x", "data.sources.1.cache: unknown key"),
        ("kind: rules, weight: 0", "data.sources.1.weight: Input should be greater"),
        ("kind: rules, num_seen: true", "data.sources.1.num_seen: true and false are no value"),
        ("kind: mixture, sources: [{path: x}]", "data.sources.1.kind: a mixture is no source of"),
        ("sources: [{path: x}]", "data.sources.1.sources: a mixture is no source of another one"),
        ("kind: rules, name: a", "data: sources: two are called 'a'; give one of them a name"),
        ("kind: rules, seed: 1", "data.sources.1.seed=1: the embedded model learnt the seen rules"),
        (
            "kind: rules, form: brackets",
            "data.sources.1.form and data.sources.1.max_value: the embedded model reads",
        ),
        ("kind: files, path: /nowhere", "data.sources.1.path: /nowhere: No such file or directory"),
        ("kind: rules, num_seen: 9999", "data.sources.1.num_seen: 9999 of 834 seen rules: give"),
    ],
)
def test_what_is_wrong_is_one_line(
    source: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"data={{sources: [{{kind: rules, name: a}}, {{{source}}}]}}"
    assert cli.main(["data", "--config", "quickstart-smoke", data]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and line in errors


def test_no_item_is_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "--config", "quickstart-smoke", "data={sources: [rules]}"]) == 2
    assert "data.sources.0: expected a section, got str" in capsys.readouterr().err


def test_what_reading_finds_names_its_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.sources\.0\.num_seen: 9999 of 834 seen rules"):
        read({**RULES, "num_seen": 9999})
    path = write(tmp_path / "a.jsonl", ["add it", "add it"], num_examples=4)
    with pytest.raises(UserError, match=r"^data\.sources\.1: 2 tasks are 1 distinct rules, too"):
        read(RULES, file(path))
    path.write_text('{"id": 3}\n')
    with pytest.raises(UserError, match=r"^data\.sources: a\.jsonl: .*a\.jsonl"):
        read(RULES, {"path": str(path)})


def test_lengths_are_the_longest_of_all_sources(tmp_path: Path) -> None:
    wide = {"form": "brackets", "max_length": 20, "max_value": 999}
    of_rules = RulesSource(RulesConfig(**wide)).lengths()
    tokens = {"instruction": {"tokens": 40}, "input": {"tokens": 10}, "target": {"tokens": 10}}
    cuts = {"path": "x", "truncation": tokens}
    of_files = FilesSource(FilesConfig.model_validate(cuts)).lengths()
    config = MixtureConfig.model_validate({"sources": [{"kind": "rules", **wide}, cuts]})
    lengths = MixtureTasks(config).lengths()
    assert lengths == (of_files.instruction, of_rules.input, of_rules.target) == (40, 102, 202)


def test_the_verb_data_shares_the_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", [f"paint it {i}" for i in range(30)], num_examples=4)
    rules = "{kind: rules, name: world, num_seen: 10}"
    data = f"data={{sources: [{rules}, {{path: {path}, weight: 0.5}}]}}"
    command = ["data", "--config", "quickstart-smoke", data]
    assert cli.main([*command, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["parts"] == {"seen": 10, "dev": 55, "unseen": 114}
    assert (first["name"], first["format"], first["seen_weight"]) == ("world", "generated", 10)
    drawn = 0.5 * 3 * second["parts"]["seen"]
    assert first["share_of_draws"] == pytest.approx(10 / (10 + drawn))
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("world: rules, weight 1\nformat generated: 179 tasks, ")
    assert f"\n{path}, weight 0.5\n" in out and f"{drawn / (10 + drawn):.1%} of the draws" in out


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind of tests/toys/source.py in this process, for one test."""
    monkeypatch.setattr(SOURCES, "_kinds", dict(SOURCES._kinds))
    module = importlib.import_module("tests.toys.source")
    SOURCES.register(module.JoinedConfig, module.Joined)


@pytest.mark.usefixtures("toy")
def test_a_source_from_outside_is_one_of_a_mixture(
    tmp_path: Path, world: Splits, capsys: pytest.CaptureFixture[str]
) -> None:
    """That says nothing before it is read, and splits as it likes."""
    joined = {"kind": "toy_joined", "parts": [RULES], "weight": 0.25}
    path = write(tmp_path / "a.jsonl", [world.unseen[0].task.instruction, "paint it red"])
    splits, _ = read(joined, file(path))
    assert ids(splits) == {f"toy_joined/0/{task.id}" for task in world.tasks} | {"a.jsonl/t1"}
    assert {task.weight for task in splits.seen} == {0.25, 3}
    data = f"data={json.dumps({'sources': [joined, {'path': str(path)}]})}"
    assert cli.main(["data", "--config", "quickstart-smoke", data]) == 0
    out = capsys.readouterr().out
    said = "toy_joined, weight 0.25\nnothing is said of it before its tasks are read\n"
    assert out.startswith(said) and "of the draws" not in out
    assert "a training would end here: data.sources.1: 0 tasks" in out
    config = load_config("quickstart-smoke", [data])
    assert parse_config(config.model_dump(mode="json"), "here") == config
    with pytest.raises(UserError, match=r"data\.sources\.0\.parst: unknown key"):
        load_config("quickstart-smoke", [data, "data.sources.0.parst=1"])


def test_a_kind_with_a_weight_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class HeavyConfig(RulesConfig):
        kind: str = "heavy"  # type: ignore[assignment]
        weight: float = 3

    monkeypatch.setattr(SOURCES, "_kinds", dict(SOURCES._kinds))
    SOURCES.register(HeavyConfig, RulesSource)
    with pytest.raises(UserError, match=r"data\.sources\.0\.kind: 'heavy' has a weight itself"):
        load_config("quickstart-smoke", ["data={sources: [{kind: heavy}]}"])


def test_a_run_of_rules_is_extended_by_a_file_and_goes_on(
    tmp_path: Path, rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """Its last two steps are the same after a crash."""
    path = write(tmp_path / "a.jsonl", ["keep 3 of the list", "add the first number"])
    rules = "{kind: rules, num_seen: 12, train_examples: 8, test_examples: 2}"
    data = f"data={{sources: [{rules}, {{path: {path}, {'filters: {min_examples_per_task: 1}'}}}]}}"
    run = tmp_path / "run"
    settings = ["evaluation.every_steps=0", "evaluation.ends_with_report=false"]
    train_and_go_on(run, [data, *settings, "training.threads=1"])
    first = [json.loads(line) for line in (run / FIRST).read_text().splitlines()]
    assert [row["loss/total"] for row in rows(run)] == [row["loss/total"] for row in first]
    seen = json.loads((run / "splits.json").read_text())["seen"]
    assert {name.split("/")[0] for name in seen} == {"rules", "a.jsonl"} and len(seen) == 14
    written = json.loads((run / "config.json").read_text())
    assert isinstance(source_of(parse_config(written, "config.json").data), MixtureTasks)


def test_worlds_of_two_seeds_do_not_mix() -> None:
    """One would train on compositions of what the other holds out."""

    def said(*seeds: int) -> str | None:
        sources = [{"kind": "rules", "seed": seed, "name": f"w{i}"} for i, seed in enumerate(seeds)]
        config = MixtureConfig.model_validate({"sources": sources})
        return MixtureTasks(config).conflict(["mine"])

    assert said(3, 3) is None
    line = said(0, 0, 1)
    assert line is not None and line.startswith("data.sources.2.seed: generated rules of the seeds")


def test_each_world_keeps_its_own_split_and_gives_way_to_the_others() -> None:
    """By equal words, those that are never shown in training among them."""

    def one(name: str, text: str, hidden: str = "") -> SplitTask:
        return SplitTask(Task(name, text, ()), (), (), (hidden,) if hidden else ())

    first = Splits(
        seen=(one("a", "add 1"), one("b", "add 2", "plus two"), one("c", "plus two")),
        dev=(),
        unseen=(one("d", "add 1"), one("e", "add 4", "plus four")),
    )
    second = Splits(
        seen=(one("f", "plus four"), one("g", "plus two"), one("h", "add 7")), dev=(), unseen=()
    )
    lines: list[str] = []
    sources = [RulesSource(RulesConfig()), RulesSource(RulesConfig())]
    kept = _without_leaks([first, second], sources, lines.append)
    assert kept[0] == first, "two of its rules are worded alike, and that is its own affair"
    assert [task.id for task in kept[1].seen] == ["h"]
    assert lines == [
        "left out: seen tasks with the rule of a tested one elsewhere: 1",
        "left out: seen tasks in a wording that another source never shows: 1",
    ]
