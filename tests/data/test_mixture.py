"""A mixture: each source read and split by itself, no rule in two parts, weights that are kept; a
pre-training on triples and an in-domain run that starts from it."""

import json
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ship_ds import cli
from ship_ds.bundle import Bundle
from ship_ds.config import load_config
from ship_ds.data.mixture import MixtureConfig, MixtureTasks
from ship_ds.data.source import source_of
from ship_ds.data.task import Splits, SplitTask
from ship_ds.data.task_files import FilesConfig, FilesSource
from ship_ds.inference.analogies import share_in_slots
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.derived import Derived
from ship_ds.model.loading import load_tokenizer
from tests.conftest import train_each


def tasks(path: Path, wordings: list[str]) -> Path:
    rows = [
        {
            "id": f"t{i}",
            "instruction": wording,
            "examples": [{"input": f"{i} {n}", "target": str(n)} for n in range(6)],
        }
        for i, wording in enumerate(wordings)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def triples(path: Path, count: int, wording: str = "say {0}") -> Path:
    rows = [{"instruction": wording.format(i), "input": "", "output": str(i)} for i in range(count)]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tasks(tmp_path / "tasks.jsonl", [f"add {i} to it" for i in range(30)])
    triples(tmp_path / "alpaca.json", 40)
    return tmp_path


def mixture(folder: Path, **alpaca: Any) -> MixtureTasks:
    sources = [{"path": str(folder / "tasks.jsonl")}, {"path": str(folder / "alpaca.json")}]
    return MixtureTasks(
        MixtureConfig.model_validate({"sources": [sources[0], sources[1] | alpaca]})
    )


def read(source: MixtureTasks) -> tuple[Splits, list[str]]:
    lines: list[str] = []
    return source.read(load_tokenizer("embedded"), lines.append), lines


def test_each_source_keeps_the_split_that_it_has_alone(folder: Path) -> None:
    splits, lines = read(mixture(folder, weight=0.25))
    alone = FilesSource(FilesConfig(path=str(folder / "tasks.jsonl"))).read(
        load_tokenizer("embedded"), lambda text: None
    )
    for part in ("seen", "dev", "unseen"):
        ours = [task for task in getattr(splits, part) if task.id.startswith("tasks.jsonl/")]
        assert [t.task.instruction for t in ours] == [
            t.task.instruction for t in getattr(alone, part)
        ]
    triples = [task for task in splits.seen if task.id.startswith("alpaca.json/")]
    assert len(triples) == 40 and all(t.weight == 0.25 and not t.test for t in triples)
    assert lines[-2:] == [
        "tasks.jsonl: weight 1: 25 seen tasks, 75 examples, 71.4% of the draws",
        "alpaca.json: weight 0.25: 40 seen tasks, 40 examples, 28.6% of the draws",
    ]
    assert "alpaca.json: of the seen tasks 40 are trained on and never tested: one input each" in (
        lines
    )


def test_a_rule_in_two_parts_stays_where_it_is_tested(folder: Path) -> None:
    """The second file has every rule of the first, split by another seed."""
    splits, lines = read(mixture(folder))
    dev, unseen = ({task.task.instruction for task in x} for x in (splits.dev, splits.unseen))
    tasks(folder / "again.jsonl", [f"add {i} to it" for i in reversed(range(30))])
    source = mixture(folder, path=str(folder / "again.jsonl"), split={"seed": 1})
    splits, lines = read(source)
    parts = [
        {task.task.instruction for task in part}
        for part in (splits.seen, splits.dev, splits.unseen)
    ]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert unseen <= parts[2], "before dev, whichever source has it there"
    assert dev <= parts[1] | parts[2] and any("the rule of a tested one" in x for x in lines)


def test_what_a_source_is_tested_on_no_other_trains_on_as_the_same_rule(folder: Path) -> None:
    """Of a file that was made from another one, with test examples of its own draw, and of one that
    was made from generated rules."""
    world = {"kind": "rules", "num_seen": 24, "train_examples": 12, "test_examples": 3}
    alone = source_of(load_config("quickstart-smoke").data).read(load_tokenizer("embedded"), print)
    rows = [
        {
            "id": one.id,
            "instruction": one.task.instruction,
            "examples": [{"input": e.input, "target": e.target} for e in one.task.examples],
        }
        for one in alone.seen
    ]
    (folder / "of_rules.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = {"unseen_share": 0, "dev_share": 0}
    path = str(folder / "tasks.jsonl")
    sources = [
        {"path": path, "split": split},
        {"path": path, "name": "again", "split": {**split, "seed": 1}},
        {"path": str(folder / "of_rules.jsonl"), "split": split},
        world,
    ]
    splits, lines = read(MixtureTasks(MixtureConfig.model_validate({"sources": sources})))
    by_rule: dict[str, list[SplitTask]] = {}
    for task in splits.seen:
        by_rule.setdefault(task.task.instruction, []).append(task)
    pairs = [same for same in by_rule.values() if len(same) == 2]
    assert len(pairs) > 40, "but those that are worded like a held-out rule of the world"
    for same in pairs:
        tested = {example.input for task in same for example in task.test}
        trained = {example.input for task in same for example in task.train}
        assert tested and trained and not tested & trained
    left_out = [line for line in lines if line.startswith("left out: training examples with")]
    assert len(left_out) == 1 and int(left_out[0].split()[-1]) > 24 * 3


def test_a_data_set_in_two_sources_stays_where_it_is_tested(folder: Path) -> None:
    """Where their splits keep it together; another source's tasks of that name do not count."""
    together = {"split": {"keeps_together": "dataset", "unseen_share": 0.3, "dev_share": 0.2}}
    for name, word in (("one", "add"), ("two", "take away"), ("three", "write")):
        path = tasks(folder / f"{name}.jsonl", [f"{word} {i} here" for i in range(12)])
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for i, row in enumerate(rows):
            row["dataset"] = f"set {i % 6}"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(folder / f"{name}.jsonl")} for name in ("one", "two", "three")]
    config = {"sources": [sources[0] | together, sources[1] | together, sources[2]]}
    config["sources"][1]["split"] = together["split"] | {"seed": 1}
    splits, lines = read(MixtureTasks(MixtureConfig.model_validate(config)))
    sets = [
        {task.task.dataset for task in part if not task.id.startswith("three")}
        for part in (splits.seen, splits.dev, splits.unseen)
    ]
    assert all(sets) and not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert sum(task.id.startswith("three") for task in splits.tasks) == 12
    assert any("the rule, data set or family of a tested one elsewhere" in line for line in lines)


def test_a_rule_is_found_where_sources_cut_it_to_other_lengths(folder: Path) -> None:
    whole = [" ".join(f"{x}{y}" for y in ascii_lowercase) for x in ascii_lowercase]
    tasks(folder / "tasks.jsonl", whole)
    tasks(folder / "again.jsonl", whole)
    cut = {"truncation": {"instruction": {"tokens": 18}}, "split": {"seed": 1}}
    splits, lines = read(mixture(folder, path=str(folder / "again.jsonl"), **cut))
    rules = [{task.task.instruction[0] for task in part} for part in (splits.seen, splits.dev)]
    tested = {task.task.instruction[0] for task in splits.unseen}
    assert len({len(task.task.instruction) for task in splits.unseen}) == 2
    assert not rules[0] & rules[1] and not (rules[0] | rules[1]) & tested
    assert any("the rule of a tested one" in line for line in lines)


def test_weights_are_part_of_what_a_checkpoint_compares(folder: Path) -> None:
    one, two = mixture(folder), mixture(folder, weight=2)
    splits = [read(source)[0] for source in (one, two)]
    assert one.fingerprint(splits[0]) == one.fingerprint(read(one)[0])
    assert one.fingerprint(splits[0]) != two.fingerprint(splits[1])


@pytest.mark.slow
def test_two_sources_of_one_name_are_told_apart(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"two are called 'tasks.jsonl'; give one of them a name"):
        mixture(folder, path=str(folder / "tasks.jsonl"))
    named, _ = read(mixture(folder, path=str(folder / "tasks.jsonl"), name="b"))
    assert {task.id.split("/")[0] for task in named.seen} == {"tasks.jsonl", "b"}


def test_the_verb_data_describes_every_source(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = f"{{path: {folder / 'tasks.jsonl'}}}, {{path: {folder / 'alpaca.json'}, weight: 3}}"
    command = ["data", "--config", "quickstart-smoke", f"data={{sources: [{sources}]}}"]
    assert cli.main([*command, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["parts"] == {"seen": 25, "dev": 2, "unseen": 3}
    assert (second["format"], second["kept"]["never_tested"]) == ("alpaca", 40)
    assert second["share_of_draws"] == pytest.approx(120 / 145)
    assert cli.main(command) == 0
    assert "alpaca.json, weight 3" in capsys.readouterr().out


def test_the_verb_data_says_what_a_training_cuts_and_leaves_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = "truncation: {input: {tokens: 1}}"
    data = f"data={{sources: [{{path: {folder / 'tasks.jsonl'}, {cut}}}]}}"
    command = ["data", "--config", "quickstart-smoke"]
    assert cli.main([*command, data]) == 0
    first, _, read = capsys.readouterr().out.partition("\n\nas a training reads them, with the ")
    lines = read.splitlines()
    assert lines[0] == "tokenizer of embedded:" and "cut to length" not in first
    assert any(line.startswith("  tasks.jsonl: cut to length: input: ") for line in lines)
    # Such that nothing is left.
    all_cut = data.replace("input: {tokens: 1}", "target: {tokens: 1}, input: {tokens: 1}")
    assert cli.main([*command, all_cut, "data.sources.0.filters={max_input_letters: 1}"]) == 0
    assert "\n  a training would end here: " in capsys.readouterr().out
    assert cli.main([*command, data, "model.task_llm.base=/nowhere/smollm2"]) == 0
    out = capsys.readouterr().out
    assert "nothing is said of the length of texts in tokens: /nowhere/smollm2: " in out
    # Of generated rules nothing is cut.
    assert cli.main(command) == 0
    assert "as a training reads them" not in capsys.readouterr().out


def test_the_verb_data_counts_the_weights_of_tasks_too(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(row | {"weight": 2}) + "\n" for row in rows)
    (folder / "tasks.jsonl").write_text(text)
    source = mixture(folder, weight=0.5)
    first, second = source.describe()
    assert first["share_of_draws"] == pytest.approx(50 / 70)
    assert second["share_of_draws"] == pytest.approx(20 / 70)
    assert "71.4% of the draws" in read(source)[1][-2]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ("{sources: []}", "data.sources: "),
        ("{sources: [{path: /nowhere}]}", "data.sources.0.path: /nowhere: No such file"),
        ("{sources: [{path: x, wieght: 2}]}", "data.sources.0.wieght: unknown key"),
        ("{sources: [{path: x, weight: 0}]}", "data.sources.0.weight: "),
        ("{sources: [{path: x, name: a/b}]}", "data.sources.0.name: "),
    ],
)
def test_what_is_wrong_is_one_line(
    data: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "--config", "quickstart-smoke", f"run.folder={tmp_path / 'run'}"]
    assert cli.main([*run, f"data={data}"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and line in errors


@pytest.mark.slow
def test_pre_training_on_triples_and_in_domain_from_it(
    folder: Path, rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """The last run takes steps of no length: it ends where it started, which is where the one
    before it ended."""
    # Which differ in two words, as no grammar's do.
    written = triples(folder / "written.json", 40, "say {0} after {0}")
    of_triples = f"{{path: {written}}}"
    shared = "{steps: 2, tasks_per_step: 4, examples_per_task: 1, threads: 1}"
    command = ["--config", "quickstart-smoke", f"training={shared}"]
    from_mixed = [f"run.init_from={folder / 'mixed'}", "optimiser.lr=1e-15"]
    runs: dict[str, tuple[str, list[str]]] = {
        "triples": (f"{{sources: [{of_triples}]}}", []),
        "mixed": (f"{{sources: [{of_triples}, {{path: {folder / 'tasks.jsonl'}}}]}}", []),
        "in-domain": (f"{{path: {folder / 'tasks.jsonl'}}}", from_mixed),
    }
    train_each(
        *(
            [*command, f"run.folder={folder / name}", f"data={data}", *more]
            for name, (data, more) in runs.items()
        )
    )
    for name in runs:
        report = json.loads((folder / name / "report.json").read_text())
        assert report["deduction"]["unseen"]["n_tasks"] == (0 if name == "triples" else 3)
        assert len(rows(folder / name)) == 2
        bundle = Bundle.open(folder / name)
        known = bundle.known_instructions
        index = Derived(bundle.folder, "", "").example_index(known)
        is_written = InductionConfig().searches_by_examples(share_in_slots(known))
        assert is_written == (index is not None) == (name != "in-domain"), name
        assert index is None or set(index.instructions) == set(known)
    first, mixed, last = (
        load_file(folder / name / "bundle" / "ship.safetensors")
        for name in ("triples", "mixed", "in-domain")
    )
    torch.testing.assert_close(last, mixed, rtol=0, atol=1e-12)
    moved = max(float((mixed[name] - first[name]).abs().max()) for name in mixed)
    assert moved > 1e-6, "both began with the weights of the seed, and have left them"
    config = load_config("quickstart-smoke", [f"data={{sources: [{of_triples}]}}"])
    assert isinstance(source_of(config.data), MixtureTasks)
