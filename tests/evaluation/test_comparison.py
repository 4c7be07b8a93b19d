"""The table of several runs: its numbers are those of the harness and of the runs' own files. The
runs are copies of one that version 0.1.0 trained for three steps, whose base is tiny."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from ship_ds.console import no_log
from ship_ds.evaluation import comparison
from ship_ds.evaluation.cells import Measured
from ship_ds.evaluation.comparison import ComparedRun
from ship_ds.evaluation.config import HarnessConfig
from ship_ds.evaluation.harness import Run

TRAINED = Path("tests/fixtures/v0_1/run")
"""It names its base by a path from the root of the repository, where the tests stand."""
SETTINGS = HarnessConfig(
    methods=("ship",), parts=("seen", "unseen"), directions=("deduction",), num_tasks=3
)


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[ComparedRun]:
    root = tmp_path_factory.mktemp("compared")
    found: list[ComparedRun] = []
    for label, seed in (("first", 0), ("first", 1), ("second", 0)):
        folder = root / f"{label}-{seed}"
        shutil.copytree(TRAINED, folder, ignore=shutil.ignore_patterns("checkpoints"))
        run = Run.open(folder, no_log)
        found.append(comparison.measure(label, seed, run, SETTINGS, ["compare"], no_log, found))
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
    assert [bool(entry.in_prompt) for entry in entries] == [True, False, False]
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
            in_prompt={},
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
    comparison.show(report)
    assert "instruction in the prompt" in capsys.readouterr().out
