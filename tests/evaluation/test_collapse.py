"""A method that gives one text to nearly every task is named, with what that text alone scores; and
one that gives one label to every input of most tasks."""

from dataclasses import replace
from typing import Any

import pytest

from ship_ds.data.task import Example, SplitTask, Task
from ship_ds.evaluation import evaluate, final_report
from ship_ds.evaluation.cells import Cell, Measured
from ship_ds.evaluation.collapse import collapse_warning, commonest_text
from ship_ds.evaluation.judges import RougeJudge
from ship_ds.evaluation.measure import measure
from ship_ds.evaluation.metrics import score
from ship_ds.evaluation.questions import ask
from ship_ds.evaluation.report import Provenance, build, markdown

INSTRUCTIONS = ["reverse the list", "sort the list", "add 5", "count the words"]


def rows(texts: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "task": f"t{i}",
            "kind": "",
            "instruction": INSTRUCTIONS[i],
            "said": text,
            "exact_match": [text == INSTRUCTIONS[i]],
        }
        for i, text in enumerate(texts)
    ]


def test_the_text_that_most_tasks_got_is_scored_against_all() -> None:
    """ "sort the list" shares two of three words with the first, all with the second, one with the
    last: F of 2/3, 1, 0 and 1/3."""
    found = commonest_text(
        "reconstruction", rows(["sort the list", "sort  the list\n", "add 5", "sort the list"])
    )
    assert found["commonest_text"] == {
        "text": "sort the list",
        "n_tasks": 3,
        "n_texts": 2,
        "rouge_l": pytest.approx((2 / 3 + 1 + 0 + 1 / 3) / 4, abs=1e-4),
    }
    assert commonest_text("reconstruction", []) == {}


class Parrot:
    """Induces one text."""

    def induce(self, shown: Any) -> list[str]:
        return ["flip the order"] * len(shown)


def test_in_induction_it_is_scored_by_what_the_methods_own_rouge_l_is() -> None:
    """Another wording is as right as the instruction; a task that has none keeps to its row."""
    example = Example("1 2", "2 1")
    wordings = [("flip the order", "turn it round"), ()]
    tasks = [
        SplitTask(
            Task(f"t{i}", "reverse the list", (example,) * 6, others),
            (example,) * 5,
            (example,),
        )
        for i, others in enumerate(wordings)
    ]
    questions = [ask(task, 2, 0) for task in tasks]
    outcome = measure(Parrot(), "induction", questions, [RougeJudge()])
    own = score(outcome.values("rouge_l")).value
    assert own == pytest.approx((1 + 1 / 3) / 2)
    assert commonest_text("induction", outcome.rows)["commonest_text"]["rouge_l"] == (
        pytest.approx(own, abs=1e-4)
    )
    assert ["wordings" in row for row in outcome.rows] == [True, False]


def test_half_of_four_tasks_are_warned_of_and_less_is_not() -> None:
    def said(texts: list[str]) -> str:
        of = rows(texts)
        return collapse_warning(
            "ship, induction", {"n_tasks": len(of), **commonest_text("induction", of)}
        )

    assert said(["a", "a", "b", "c"]) == (
        "ship, induction: 2 of 4 tasks got the same text, which alone has ROUGE-L 0.000 with "
        "their instructions: these texts hardly tell tasks apart"
    )
    assert said(["a", "b", "c", "d"]) == "" == said(["a", "a", "b"])
    assert collapse_warning("a report of an earlier version", {"n_tasks": 9}) == ""


def test_a_decoder_that_takes_nothing_from_the_latent_is_warned_of() -> None:
    """Beside one text for most tasks, or alone; a loss that is not finite is no number."""

    def said(gain: float | None, **more: Any) -> str:
        return collapse_warning(
            "reconstruction, dev", {"n_tasks": 9, "latent_gain": {"value": gain}, **more}
        )

    assert said(0.007) == (
        "reconstruction, dev: beside its own latent a token of an instruction is likelier by 0.007 "
        "nats than beside another task's: these texts hardly tell tasks apart"
    )
    common = {"commonest_text": {"n_tasks": 5, "rouge_l": 0.2, "n_texts": 2, "text": "a"}}
    assert said(-0.2, **common) == (
        "reconstruction, dev: 5 of 9 tasks got the same text, which alone has ROUGE-L 0.200 with "
        "their instructions and beside its own latent a token of an instruction is likelier by "
        "-0.200 nats than beside another task's: these texts hardly tell tasks apart"
    )
    assert said(0.5) == "" == said(None)
    assert said(0.5, **common).startswith("reconstruction, dev: 5 of 9 tasks got the same text")


@pytest.mark.parametrize("direction", ["induction", "reconstruction"])
def test_reports_name_it(direction: Any, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"instruction_in_query": False, "sees_labels": False, "about": "what it is"}
    provenance = Provenance("run", "", {}, {"num_shown": [5]}, {"ship": about}, 5)
    cell = Cell("ship", direction, "unseen", 5 if direction == "induction" else None)
    collapsed = Measured({}, ["exact_match"], rows(["add 5"] * 4), 1.0, 0.0, 1)
    line = f"ship, {direction}, unseen: 4 of 4 tasks got the same text"
    report = build({cell: collapsed}, provenance)
    assert report["methods"]["ship"][direction]["unseen"]["commonest_text"]["n_texts"] == 1
    assert line in markdown(report, {cell: collapsed})
    evaluate.print_methods(report)
    assert line in " ".join(capsys.readouterr().out.split())
    told = {cell: replace(collapsed, rows=rows(INSTRUCTIONS))}
    report = build(told, provenance)
    assert "the same text" not in markdown(report, told)
    evaluate.print_methods(report)
    assert "the same text" not in capsys.readouterr().out


def test_answers_are_no_texts_of_tasks() -> None:
    """Half of the tasks of a classification may well be answered "yes"."""
    about = {"instruction_in_query": False, "sees_labels": False, "about": "what it is"}
    provenance = Provenance("run", "", {}, {"num_shown": [5]}, {"ship": about}, 5)
    answered = [row | {"said": ["yes"]} for row in rows(["yes"] * 4)]
    cell = Cell("ship", "deduction", "unseen", None)
    report = build({cell: Measured({}, ["exact_match"], answered, 1.0, 0.0, 1)}, provenance)
    assert "commonest_text" not in report["methods"]["ship"]["deduction"]["unseen"]


def test_the_report_of_a_run_says_it_under_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    cell = {"exact_match": {"value": 0.0, "ci95": [0.0, 0.0]}, "n_tasks": 4, "n_examples": 4}
    report = {
        "deduction": {},
        "reconstruction": {
            "seen": cell | commonest_text("reconstruction", rows(["add 5"] * 4)),
            "unseen": cell | commonest_text("reconstruction", rows(INSTRUCTIONS)),
        },
        "tables": ["exact_match"],
        "left_out": {},
        "train_seconds": 1.0,
        "tokens_per_second": 1.0,
        "world_size": 1,
        "seed": 0,
    }
    final_report.show(report)
    printed = " ".join(capsys.readouterr().out.split())
    assert "reconstruction, seen: 4 of 4 tasks got the same text" in printed
    assert "reconstruction, unseen: " not in printed
    report["deduction"] = {
        part: cell | {"constant_label": {"value": share, "ci95": [0.0, 1.0]}}
        for part, share in {"seen": 0.4, "unseen": 0.6, "unseen_family": 0.9}.items()
    }
    final_report.show(report)
    assert "one label" not in capsys.readouterr().out, (
        "of lists, whose tables are exact match alone"
    )
    final_report.show(report | {"tables": ["exact_match", "constant_label"]})
    printed = " ".join(capsys.readouterr().out.split())
    assert "deduction, unseen: 60% of 4 tasks with labels got one label for all inputs" in printed
    assert "deduction, seen: " not in printed and "unseen_family" not in printed


class OneLabel:
    """Answers each task's inputs by a label of its own."""

    def deduce(self, tasks: Any, wordings: Any, inputs: Any) -> Any:
        return [[task.train[0].target] * len(row) for task, row in zip(tasks, inputs, strict=True)]


def test_a_method_that_gives_each_task_one_label_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not the control that does it on purpose, nor tasks that one label is right for, nor those
    without labels."""
    pairs = tuple(Example(str(i), "ab"[i % 2]) for i in range(8))
    words = tuple(Example(str(i), f"word {i}") for i in range(8))
    tasks = [
        SplitTask(Task(f"t{i}", f"do {i}", train), train, asked)
        for i, (train, asked) in enumerate(
            [*[(pairs, pairs[:4])] * 4, (pairs, pairs[::2]), (words, words[:4])]
        )
    ]
    outcome = measure(OneLabel(), "deduction", [ask(task, 0, 0) for task in tasks])
    assert outcome.values("constant_label") == [[True]] * 4 + [[], []]
    about = {"instruction_in_query": False, "sees_labels": False, "about": "what it is"}
    names = {"ship": about, "majority_label": {**about, "about": "control: it does"}}
    provenance = Provenance("run", "", {}, {"num_shown": [5]}, names, 5)
    cells = {
        Cell(name, "deduction", "unseen", None): Measured(
            {}, outcome.metrics, outcome.rows, 1.0, 0.0, 1
        )
        for name in names
    }
    report = build(cells, provenance)
    assert report["methods"]["ship"]["deduction"]["unseen"]["constant_label"] == {
        "value": 1.0,
        "ci95": [1.0, 1.0],
        "n_tasks": 4,
    }
    line = "ship, deduction, unseen: 100% of 4 tasks with labels got one label for all inputs"
    page = markdown(report, cells)
    assert line in page and "majority_label, deduction, unseen: " not in page
    evaluate.print_methods(report)
    assert line in " ".join(capsys.readouterr().out.split())


def test_few_tasks_with_labels_are_not_warned_of() -> None:
    """Neither by their number, nor among so many others that they are rules about lists."""

    def said(share: float, number: int, of: int) -> str:
        return collapse_warning(
            "ship", {"n_tasks": of, "constant_label": {"value": share, "n_tasks": number}}
        )

    assert said(0.5, 4, 40).startswith("ship: 50% of 4 tasks with labels")
    assert said(0.49, 4, 40) == said(1.0, 3, 30) == said(1.0, 4, 41) == ""
    assert (
        collapse_warning("ship", {"n_tasks": 9, "constant_label": {"value": None, "ci95": None}})
        == ""
    )
