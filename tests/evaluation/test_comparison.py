"""The table of several runs: its numbers are those of the harness and of the runs' own files. The
runs are copies of one that version 0.1.0 trained for three steps, whose base is tiny."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ship_ds.config import load_config
from ship_ds.console import no_log
from ship_ds.data.task import Splits, SplitTask, Task
from ship_ds.evaluation import comparison
from ship_ds.evaluation.baselines.sft import Sft
from ship_ds.evaluation.baselines.trained import TrainedMethod
from ship_ds.evaluation.budgets import AnsweredExamples
from ship_ds.evaluation.cells import Cell, Measured
from ship_ds.evaluation.comparison import ComparedRun
from ship_ds.evaluation.config import HarnessConfig
from ship_ds.evaluation.harness import Run
from ship_ds.evaluation.method import Setting
from ship_ds.evaluation.methods import METHODS

pytestmark = pytest.mark.slow

TRAINED = Path("tests/fixtures/v0_1/run")
"""It names its base by a path from the root of the repository, where the tests stand."""
CONTROLS = ("bare_base", "neighbour_instruction", "majority_label")
SETTINGS = HarnessConfig(
    methods=("ship", "prompting"), parts=("seen", "unseen"), directions=("deduction",), num_tasks=3
)
ALL_KINDS = SETTINGS.model_copy(
    update={
        "methods": (*("ship", "prompting", "text_to_lora", "icl"), *CONTROLS),
        "budget": "examples",
        "changes": ("text_to_lora.oracles.steps=1",),
    }
)
"""One that is trained, one that asks SHIP, two that see labels or nothing, one of reasoning."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="module")
def entries(root: Path) -> list[ComparedRun]:
    found: list[ComparedRun] = []
    for label, seed in (("first", 0), ("first", 1), ("second", 0)):
        folder = root / f"{label}-{seed}"
        shutil.copytree(TRAINED, folder, ignore=shutil.ignore_patterns("checkpoints"))
        run = Run.open(folder, no_log)
        found.append(comparison.measure_run(label, seed, run, SETTINGS, ["compare"], no_log, found))
    return found


@pytest.fixture
def report(entries: list[ComparedRun]) -> dict[str, Any]:
    return comparison.build(entries, {"third, seed 0": "it fell"}, SETTINGS, ["compare", "x"])


def test_costs_are_those_of_the_run(entries: list[ComparedRun]) -> None:
    rows = [json.loads(row) for row in (TRAINED / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["speed/step_seconds"] for row in rows]
    facts = entries[0].facts
    assert facts["steps"] == 3 and facts["minutes"] == pytest.approx(sum(seconds) / 60, abs=1e-4)
    assert facts["seconds_a_step"] == pytest.approx(median(seconds), abs=1e-4)
    run = Run.open(Path(entries[0].folder), no_log)
    model = run.ship.model
    assert facts["trained_parameters"] == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    sites = model.task_llm.sites()
    assert facts["adapter_numbers"] == sum(inputs + outputs for inputs, outputs in sites.values())
    assert len(set(facts["query_gigaflops"].values())) == 1, "flat in the instruction's length"
    in_prompt = list(facts["prompt_query_gigaflops"].values())
    assert facts["query_gigaflops"]["16"] < in_prompt[0] * 2 and in_prompt == sorted(in_prompt)


def test_the_instruction_in_the_prompt_is_measured_once(entries: list[ComparedRun]) -> None:
    assert [list(entry.beside) for entry in entries] == [["prompting"], [], []]
    stored = [
        sorted(path.name for path in (Path(entry.folder) / "evaluation" / "cells").iterdir())
        for entry in entries
    ]
    assert "prompting.deduction.seen.json" in stored[0] and stored[1] == [
        *("ship.deduction.seen.json", "ship.deduction.unseen.json")
    ]


def test_rows_are_the_variants_then_their_seeds_together_then_the_reference(
    report: dict[str, Any],
) -> None:
    assert [(row["label"], row["seed"]) for row in report["rows"]] == [
        ("first", 0),
        ("first", 1),
        ("first", "all"),
        ("second", 0),
        ("instruction in the prompt", None),
    ]
    one, _, together, second, stated = report["rows"]
    # Both seeds are copies of one run: together they have its scores, of twice as many answers.
    score, both = one["scores"]["deduction"]["seen"], together["scores"]["deduction"]["seen"]
    assert both["exact_match"] == score["exact_match"] and both["n_tasks"] == score["n_tasks"] == 3
    assert both["n_examples"] == 2 * score["n_examples"]
    assert "minus_first" in one and not one["minus_first"]
    nothing = {"value": 0.0, "ci95": [0.0, 0.0]}
    assert second["minus_first"]["deduction"]["seen"]["exact_match"] == nothing
    assert stated["minus_first"]["deduction"].keys() == {"seen", "unseen"}
    assert list(stated["query_gigaflops"]) == ["16", "256", "4096"]


@pytest.fixture(scope="module")
def beside(root: Path, entries: list[ComparedRun]) -> tuple[list[ComparedRun], list[str]]:
    """The same runs with more methods, and what was said on the way."""
    found: list[ComparedRun] = []
    said: list[str] = []
    for entry in entries:
        run = Run.open(Path(entry.folder), said.append)
        assert isinstance(entry.seed, int)
        found.append(
            comparison.measure_run(
                entry.label, entry.seed, run, ALL_KINDS, ["compare"], said.append, found
            )
        )
    return found, said


def test_what_asks_ship_is_measured_of_every_run_and_the_rest_once(
    beside: tuple[list[ComparedRun], list[str]],
) -> None:
    found, said = beside
    assert [list(entry.beside) for entry in found] == [
        [name for name in ALL_KINDS.methods if name != "ship"],
        ["neighbour_instruction"],
        ["neighbour_instruction"],
    ]
    measured = [line.partition(":")[0] for line in said if " tasks, " in line]
    methods = [cell.partition(".")[0] for cell in measured]
    # SHIP and the instruction in the prompt were measured before there were others.
    assert {name: methods.count(name) for name in methods} == {
        **{"text_to_lora": 2, "bare_base": 2, "majority_label": 2},
        "neighbour_instruction": 6,
    }
    trained = [
        entry.folder for entry in found if (Path(entry.folder) / "evaluation" / "methods").is_dir()
    ]
    assert trained == [found[0].folder]


def test_a_method_has_the_columns_of_a_variant(
    beside: tuple[list[ComparedRun], list[str]], tmp_path: Path
) -> None:
    found, _ = beside
    report = comparison.build(found, {}, ALL_KINDS, ["compare"])
    assert [(row["label"], row["seed"], row["method"]) for row in report["rows"]] == [
        *(("first", 0, "ship"), ("first", 1, "ship"), ("first", "all", "ship")),
        *(("second", 0, "ship"), ("instruction in the prompt", None, "prompting")),
        *(("text_to_lora", None, "text_to_lora"), ("bare_base", None, "bare_base")),
        *(("first: neighbour_instruction", seed, "neighbour_instruction") for seed in (0, 1)),
        ("first: neighbour_instruction", "all", "neighbour_instruction"),
        ("second: neighbour_instruction", 0, "neighbour_instruction"),
        ("majority_label (sees labels)", None, "majority_label"),
    ]
    rows = {(row["label"], row["seed"]): row for row in report["rows"]}
    assert report["notes"] == ["icl: none of the directions asked for on any task of these parts"]
    assert report["setting"]["budget"] == "examples" and report["setting"]["changes"]
    for row in report["rows"][1:]:
        assert row["scores"]["deduction"].keys() == {"seen", "unseen"}
        if row["label"] != "first":
            assert row["minus_first"]["deduction"].keys() == {"seen", "unseen"}
    run = Run.open(Path(found[0].folder), no_log)
    taught = rows["text_to_lora", None]
    maker = METHODS["text_to_lora"](
        Setting(run.ship, run.splits, tmp_path, AnsweredExamples(run.num_answered), 0)
    )
    assert isinstance(maker, TrainedMethod)
    assert taught["trained_parameters"] == sum(p.numel() for p in maker.module.parameters())
    assert taught["steps"] > 0 and taught["minutes"] * 60 > taught["seconds_a_step"] > 0
    # The run's own adapter is the LoRA that the baseline makes.
    first = rows["first", 0]
    for key in ("query_gigaflops", "adapter_numbers"):
        assert taught[key] == first[key]
    bare = rows["bare_base", None]["query_gigaflops"]
    assert bare["16"] == bare["4096"] < first["query_gigaflops"]["16"]
    own = rows["first: neighbour_instruction", 0]
    assert "query_gigaflops" not in own and own["folder"] == found[0].folder
    page = comparison.markdown(report)
    assert "| second: neighbour_instruction | 0 |  |  |  |  |  |  |  |  |  |" in page
    assert f"| text_to_lora |  | {taught['steps']:,} | {taught['minutes']:.2f} |" in page
    assert "- text_to_lora: a hypernetwork from a frozen embedding of the instruction." in page
    assert "Trained on as many answered examples as the run that they were measured with" in page


def test_baselines_that_took_longer_are_told(
    beside: tuple[list[ComparedRun], list[str]],
) -> None:
    """The first oracles are trained whatever the budget."""
    (first, *_), _ = beside
    minutes = first.beside["text_to_lora"].facts["minutes"]
    for limit, told in ((minutes / 2, True), (minutes * 2, False)):
        settings = ALL_KINDS.model_copy(update={"budget": "minutes", "minutes": limit})
        report = comparison.build([first], {}, settings, ["compare"])
        assert (report["setting"]["budget"], report["setting"]["minutes"]) == ("minutes", limit)
        told_of = [note for note in report["notes"] if note.startswith("text_to_lora: took ")]
        assert bool(told_of) is told
        assert f"Trained for {limit:g} minutes each: text_to_lora." in comparison.markdown(report)


def test_scores_that_ask_the_run_are_left_out_of_what_is_shared() -> None:
    """An induced text through the run's encoder is of that run alone."""
    scores = ["execution_accuracy", "execution_accuracy_encoder", "rouge_l"]
    one = Measured({}, scores, [{"task": "a"} | {name: [1.0] for name in scores}], 1.0, 0.0, 1)
    settings = SETTINGS.model_copy(update={"directions": ("induction",)})
    found = {
        name: comparison._of_method(name, {Cell(name, "induction", "seen", 5): one}, settings)
        for name in ("ship", "itd")
    }
    assert found["ship"]["induction", "seen"] == one
    assert found["itd"]["induction", "seen"].metrics == ["execution_accuracy", "rouge_l"]


def test_a_method_that_fails_leaves_the_others_their_rows(
    entries: list[ComparedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not tried again with a run of the same base and data."""
    asked: list[str] = []

    def fails(self: Sft) -> None:
        asked.append("sft")
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Sft, "train", fails)
    settings = SETTINGS.model_copy(update={"methods": ("ship", "sft", "prompting")})
    found: list[ComparedRun] = []
    for entry in entries[:2]:
        run, seed = Run.open(Path(entry.folder), no_log), entry.seed
        assert isinstance(seed, int)
        found.append(comparison.measure_run(entry.label, seed, run, settings, [], no_log, found))
    assert asked == ["sft"]
    (name, reason), none = *found[0].failures.items(), found[1].failures
    assert name == "sft (first, seed 0)" and "out of luck" in reason and not none
    report = comparison.build(found, found[0].failures, settings, ["compare"])
    assert {row["method"] for row in report["rows"]} == {"ship", "prompting"}
    assert report["notes"] == []


def test_baselines_that_another_lora_would_have_are_told(
    beside: tuple[list[ComparedRun], list[str]],
) -> None:
    first, _, second = beside[0]
    other = replace(second, taken="a wider LoRA")
    with_own = replace(other, beside=first.beside)
    line = (
        "text_to_lora: with the LoRA and steps of first, seed 0; those of second, seed 0 are others"
    )
    for run, told in ((second, False), (other, True), (with_own, False)):
        notes = comparison.build([first, run], {}, ALL_KINDS, ["compare"])["notes"]
        assert (line in notes) is told


def measured(values: dict[str, list[float]]) -> Measured:
    rows = [{"task": task, "kind": "", "exact_match": row} for task, row in values.items()]
    return Measured({}, ["exact_match"], rows, 1.0, 0.0, 1)


def test_differences_are_task_by_task_and_seed_by_seed(entries: list[ComparedRun]) -> None:
    """Four runs that were asked two tasks; by hand."""
    first, other = entries[0], entries[2]
    scores = {
        ("first", 0): {"a": [1.0, 1.0], "b": [0.0, 1.0]},
        ("first", 1): {"a": [1.0, 0.0], "b": [0.0, 0.0]},
        ("second", 0): {"a": [0.0, 1.0], "b": [0.0, 1.0]},
        ("second", 1): {"a": [1.0, 1.0], "b": [1.0, 1.0]},
    }
    some = [
        replace(
            first if label == "first" else other,
            seed=seed,
            cells={("deduction", "unseen"): measured(values)},
            beside={},
        )
        for (label, seed), values in scores.items()
    ]
    report = comparison.build(some, {}, SETTINGS, ["compare"])
    found = {
        (row["label"], row["seed"]): row["minus_first"]["deduction"]["unseen"]["exact_match"]
        for row in report["rows"]
        if row["minus_first"]
    }
    # a: 1/2 - 1, b: 1/2 - 1/2; then a: 1 - 1/2, b: 1 - 0; together a: 3/4 - 3/4, b: 3/4 - 1/4
    assert {key: cell["value"] for key, cell in found.items()} == {
        ("second", 0): -0.25,
        ("second", 1): 0.75,
        ("second", "all"): 0.25,
    }
    assert found["second", "all"]["ci95"] == [0.0, 0.5]
    page = comparison.markdown(report)
    assert "| unseen, n=2 | unseen, minus first, n=2 |" in page
    assert "| second | all | 0.750 [0.750, 0.750] | 0.250 [0.000, 0.500] |" in page


def test_other_tasks_are_told_and_not_subtracted(entries: list[ComparedRun]) -> None:
    first, _, second = entries
    other = replace(second, tasks={**second.tasks, "unseen": "others"})
    report = comparison.build([first, other], {}, SETTINGS, ["compare"])
    assert list(report["rows"][1]["minus_first"]["deduction"]) == ["seen"]
    assert report["notes"] == [
        "second, seed 0: its unseen tasks are not those of first, seed 0, so the scores are of "
        "other tasks and no difference is given"
    ]


def test_a_run_that_its_steps_ended_is_told(entries: list[ComparedRun]) -> None:
    first = entries[0]
    minutes = first.facts["minutes"]
    for limit, told in ((minutes * 2, True), (minutes * 0.98, False)):
        timed = replace(first, facts={**first.facts, "max_minutes": limit})
        notes = comparison.build([timed], {}, SETTINGS, ["compare"])["notes"]
        assert [note for note in notes if "took all its 3 steps" in note] == notes
        assert bool(notes) is told


def test_page_has_every_row_and_every_failure(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison.write(report, tmp_path)
    assert json.loads((tmp_path / "compare.json").read_text()) == report
    page = (tmp_path / "compare.md").read_text()
    costs = report["rows"][0]
    flat = f"{costs['query_gigaflops']['16']:.3g}"
    assert f"| {costs['adapter_numbers']:,} | {flat} | {flat} | {flat} |" in page
    assert "| first | all |" in page and "| instruction in the prompt |  |" in page
    assert "- third, seed 0: it fell" in page and "    ship-ds compare x" in page
    assert "## Deduction: exact match" in page and "seen, minus first, n=3" in page
    comparison.print_comparison(report)
    assert "instruction in the prompt" in capsys.readouterr().out


def test_what_is_measured_once_is_of_one_base_and_data() -> None:
    """Whatever a method's answers depend on tells two runs apart; SHIP's own parts do not."""
    splits = Splits((SplitTask(Task("a", "add 1", ()), (), ()),), (), ())
    other = Splits((SplitTask(Task("a", "add 2", ()), (), ()),), (), ())

    def key(
        *overrides: str, name: str = "sft", dtype: Any = torch.float32, of: Any = splits
    ) -> str:
        config = load_config("quickstart-smoke", overrides)
        run: Any = SimpleNamespace(ship=SimpleNamespace(config=config, dtype=dtype), splits=of)
        return comparison._once_for(name, run, {"seen": "digest"})

    keys = [
        key(),
        key("model.task_llm.base=elsewhere"),
        key("model.task_llm.quantisation=none"),
        key("model.system_message=Answer."),
        key("evaluation.max_new_tokens=3"),
        key("evaluation.max_instruction_tokens=3"),
        key(dtype=torch.bfloat16),
        key(of=other),
    ]
    assert len(set(keys)) == len(keys)
    assert key("model.latent_size=8", "loss.kl=1") == keys[0]
    assert key(name="prompting") == key(name="prompting", of=other), "it is trained on nothing"
    assert key(name="ship") == ""


def test_a_variant_may_be_called_as_a_method() -> None:
    """The method is compared with it as any other row."""
    first = ComparedRun("sft", 0, "", {}, {}, {})
    rows = [first, replace(first, seed=None, method="sft")]
    assert comparison._partner(rows[0], rows) is None
    assert comparison._partner(rows[1], rows) is rows[0]
    pooled = [
        first,
        replace(first, seed=comparison._POOLED, method="sft"),
        replace(first, label="b"),
    ]
    of_all_seeds = replace(pooled[2], seed=comparison._POOLED)
    assert comparison._partner(of_all_seeds, pooled) is first
