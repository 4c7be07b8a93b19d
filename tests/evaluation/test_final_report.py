"""The report at the end of a run is a run of the harness: what one measures the other does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ship_ds.evaluation import final_report
from ship_ds.evaluation.config import HarnessConfig
from ship_ds.evaluation.evaluate import evaluate
from ship_ds.evaluation.harness import Run
from ship_ds.evaluation.measure import measure
from ship_ds.evaluation.method import Setting
from ship_ds.evaluation.methods import METHODS
from ship_ds.evaluation.metrics import score
from ship_ds.evaluation.questions import ask, spread
from tests.evaluation.test_harness import fresh

SECTIONS = {
    "bare_base": ("bare_base", "deduction"),
    "shuffled_instruction": ("shuffled_instruction", "deduction"),
    "instruction_in_prompt": ("prompting", "deduction"),
    "nearest_seen_rule": ("nearest_known", "reasoning"),
}


@pytest.fixture(scope="module")
def both(
    one_rank_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """report.json with every test example and evaluation/report.json, over the same tasks."""
    run = fresh(one_rank_run, tmp_path_factory.mktemp("both") / "run")
    config = HarnessConfig(
        methods=("ship", *(name for name, _ in SECTIONS.values())),
        parts=("seen", "unseen", "unseen_paraphrase"),
        num_tasks=2,
        judges=(),
    )
    harness = evaluate(run, config, ["evaluate"], lambda text: None)
    opened = Run.open(run, lambda text: None)
    few = opened.ship.config.evaluation.model_copy(
        update={"num_final_tasks": 2, "examples_per_task": 3}
    )
    opened.ship.config = opened.ship.config.model_copy(update={"evaluation": few})
    unseen = tuple(spread(opened.splits.unseen, 2))
    splits = replace(opened.splits, unseen=unseen, dev=opened.splits.dev[:2])
    return final_report.measure_run(opened.ship, splits, run), harness["methods"]


def test_every_control_is_the_harness_method_of_its_name(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    report, methods = both
    for part in ("seen", "unseen"):
        for key, (name, direction) in SECTIONS.items():
            cell = report["controls"][key][part]
            assert cell["exact_match"] == methods[name][direction][part]["exact_match"], (key, part)
            assert (cell["n_tasks"], cell["n_examples"]) == (2, 6)
        for direction in ("deduction", "reconstruction"):
            cell = report[direction][part]
            assert cell["exact_match"] == methods["ship"][direction][part]["exact_match"]
        ours, theirs = (
            one["reconstruction"][part]["commonest_text"] for one in (report, methods["ship"])
        )
        assert ours["n_tasks"] == theirs["n_tasks"] and ours["n_texts"] == theirs["n_texts"]
    paraphrased = report["deduction"]["unseen_paraphrase"]
    assert (
        paraphrased["exact_match"]
        == methods["ship"]["deduction"]["unseen_paraphrase"]["exact_match"]
    )
    assert report["controls"]["instruction_in_prompt"]["seen"]["exact_match"]["value"] > 0


def test_kinds_of_unseen_rules_are_shares_of_the_unseen(one_rank_run: Path) -> None:
    deduction = json.loads((one_rank_run / "report.json").read_text())["deduction"]
    names = [name for name in deduction if name.startswith("unseen_")]
    kinds = [deduction[name] for name in names if name != "unseen_paraphrase"]
    assert len(kinds) > 1
    assert sum(cell["n_tasks"] for cell in kinds) == deduction["unseen"]["n_tasks"]


def test_score_that_is_not_finite_leaves_its_place_empty() -> None:
    cell = {"n_tasks": 2, "answer_loss": {"value": None, "ci95": None}}
    assert final_report._text(cell, "answer_loss") == ""
    cell["answer_loss"] = {"value": 1.25, "ci95": [1.0, 1.5], "n_tasks": 1}
    assert final_report._text(cell, "answer_loss") == "1.250 [1.000, 1.500] n=1"


def test_table_has_a_row_of_every_measurement(
    one_rank_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((one_rank_run / "report.json").read_text())
    final_report.show(report)
    text = capsys.readouterr().out
    for title in (
        "deduction (SHIP)",
        "control: bare base",
        "control: shuffled instruction",
        "control: prompting",
        "control: nearest known",
        "reconstruction",
        "deduction, unseen paraphrase",
        "deduction, unseen composition",
    ):
        assert title in text
    assert (
        f"{report['controls']['instruction_in_prompt']['unseen']['exact_match']['value']:.3f}"
        in text
    )


class Parrot:
    """Answers its own table; gives instructions back, with spaces, or not at all."""

    def deduce(self, tasks: Any, wordings: Any, inputs: Any) -> Any:
        return [
            [f"{wording} {text}" for text in row]
            for wording, row in zip(wordings, inputs, strict=True)
        ]

    def reconstruct(self, wordings: list[str]) -> list[str]:
        return [f" {wording.replace(' ', '  ')} " for wording in wordings[:-1]] + ["something else"]


def test_reconstruction_is_right_for_the_very_words_alone(one_rank_run: Path) -> None:
    tasks = Run.open(one_rank_run, lambda text: None).splits.seen[:3]
    outcome = measure(Parrot(), "reconstruction", [ask(task, 0, 0) for task in tasks])
    assert outcome.values("exact_match") == [[True], [True], [False]]
    assert score(outcome.values("exact_match")).value == pytest.approx(2 / 3)


def test_unseen_paraphrase_words_the_task_as_training_never_did(one_rank_run: Path) -> None:
    tasks = Run.open(one_rank_run, lambda text: None).splits.seen[:2]
    questions = [ask(task, 0, 0, 1, "unseen_paraphrase") for task in tasks]
    outcome = measure(Parrot(), "deduction", questions)
    for row, task in zip(outcome.rows, tasks, strict=True):
        assert row["said"] == [f"{task.held_out_paraphrases[0]} {task.test[0].input}"]
        assert task.held_out_paraphrases[0] not in task.wordings


def test_the_curve_while_training_is_the_method_ship(one_rank_run: Path) -> None:
    """The last evaluation of the smoke run is after its last step, so it is of the bundle."""
    run = Run.open(one_rank_run, lambda text: None)
    last = json.loads((one_rank_run / "evaluations.jsonl").read_text().splitlines()[-1])
    method = METHODS["ship"](Setting(run.ship, run.splits, one_rank_run, None, 0))
    config = run.ship.config.evaluation
    for part in ("seen", "dev"):
        tasks = getattr(run.splits, part)
        few = tasks[:: max(1, len(tasks) // config.num_tasks)][: config.num_tasks]
        outcome = measure(
            method, "deduction", [ask(task, 0, 0, config.examples_per_task) for task in few]
        )
        assert score(outcome.values("exact_match")).value == last[f"deduction/{part}"]
