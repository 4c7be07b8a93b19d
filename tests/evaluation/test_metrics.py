"""Every metric by hand, and intervals over tasks."""

import json
import math
from collections.abc import Sequence

import pytest
from rouge_score.rouge_scorer import RougeScorer

from ship_ds.data.task import CutOff, Example, PaperMetric, SplitTask, Task
from ship_ds.evaluation.metrics import (
    ANSWER_METRICS,
    constant_label,
    label_match,
    majority_label,
    metrics_to_show,
    normalised_match,
    paper_score,
    rouge_l,
    score,
    summary,
)


def test_of_an_answer_that_never_ended_what_was_written_counts() -> None:
    """A base that talks on has said something."""
    talk = CutOff("It is positive. The reviewer likes")
    assert rouge_l(talk, ["It is positive"]) == rouge_l(str(talk), ["It is positive"]) > 0.6
    assert label_match(talk, ["positive"], ("positive", "negative"))
    assert paper_score("exact", CutOff("It is positive. And"), ["it is positive"]) == 1
    assert not normalised_match(CutOff("Positive."), ["positive"])
    assert rouge_l(None, ["It is positive"]) == 0


def test_score_is_the_mean_over_tasks_not_over_examples() -> None:
    result = score([[True], [False, False, False, True]])
    assert result.value == (1 + 0.25) / 2 and (result.num_tasks, result.num_examples) == (2, 5)


def test_interval_by_hand() -> None:
    """Half of 100 tasks right: 0.5 +- 1.96 * sqrt(0.25 / 100)."""
    low, high = score([[i % 2 == 0] for i in range(100)]).ci95
    assert low == pytest.approx(0.402, abs=0.015) and high == pytest.approx(0.598, abs=0.015)


def test_interval_is_over_tasks_whatever_the_number_of_examples() -> None:
    few, many = score([[True], [False]] * 20), score([[True] * 50, [False] * 50] * 20)
    assert few.ci95 == many.ci95


def test_interval_holds_the_value_and_stays_within_0_and_1() -> None:
    for rows in ([[True]] * 7, [[False]] * 7, [[True, False]], [[True]] * 9 + [[False]]):
        result = score(rows)
        assert 0 <= result.ci95[0] <= result.value <= result.ci95[1] <= 1
    assert score([[True]] * 7).ci95 == (1.0, 1.0)


def test_same_rows_give_the_same_interval() -> None:
    rows = [[i % 3 == 0] for i in range(40)]
    assert score(rows) == score(rows)


def test_no_task_is_not_a_score_of_zero() -> None:
    empty = score([])
    assert math.isnan(empty.value) and (empty.num_tasks, empty.num_examples) == (0, 0)
    nothing = {"exact_match": {"value": None, "ci95": None}, "n_tasks": 0, "n_examples": 0}
    assert json.loads(json.dumps(summary([], []), allow_nan=False)) == nothing


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_score_that_is_not_finite_is_null_in_json(loss: float) -> None:
    rows = [{"answer_loss": [1.0, loss]}, {"answer_loss": [1.0]}]
    report = summary(["answer_loss"], rows)
    assert json.loads(json.dumps(report, allow_nan=False)) == {
        "answer_loss": {"value": None, "ci95": None},
        "n_tasks": 2,
        "n_examples": 3,
    }


def test_json_has_the_reports_keys() -> None:
    assert summary(["exact_match"], [{"exact_match": [True, False]}]) == {
        "exact_match": {"value": 0.5, "ci95": [0.5, 0.5]},
        "n_tasks": 1,
        "n_examples": 2,
    }


def test_metric_of_some_tasks_counts_these_alone() -> None:
    rows = [{"exact_match": [1.0], "a": [1.0], "b": []}, {"exact_match": [0.0], "a": [], "b": []}]
    assert summary(["exact_match", "a", "b"], rows) == {
        "exact_match": {"value": 0.5, "ci95": [0.0, 1.0]},
        "a": {"value": 1.0, "ci95": [1.0, 1.0], "n_tasks": 1},
        "n_tasks": 2,
        "n_examples": 2,
    }


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("The answer is A.", "answer is", True),
        ("  yes!", "Yes", True),
        ("don't", "dont", True),
        ("It\u2019s «fine»。", "its fine", True),
        ("Überraschung", "überraschung.", True),
        ("another", "other", False),
        ("-5", "5", False),
        ("[1, 2]", "12", False),
        ("1 2", "[1, 2].", True),
        ("3.5", "35", True),
        ("?", "!", False),
        ("+", "+", True),
        ("the", "", False),
        ("A", "A.", True),
        ("B", "B.", True),
        ("(a)", "A", True),
        ("A", "the", False),
        ("?", "A", False),
        ("1234", "1,234", True),
        ("1,234", "1234", True),
        ("12345678", "12,345,678", True),
        ("-1,234", "1234", False),
        ("-1,000", "1,000", False),
        ("123", "1,23", False),
        ("1234", "1, 234", False),
        ("1234", "[1,234]", False),
    ],
)
def test_normal_form_is_squads(answer: str, reference: str, right: bool) -> None:
    assert normalised_match(answer, [reference]) is right
    assert not normalised_match(None, [reference])


def task(train: Sequence[str], test: Sequence[str]) -> SplitTask:
    parts = [tuple(Example(str(i), text) for i, text in enumerate(part)) for part in (train, test)]
    return SplitTask(Task("t", "k", (*parts[0], *parts[1])), *parts)


def test_majority_label_is_the_most_frequent_and_the_first_of_equals() -> None:
    assert majority_label(task("b a a c".split(), [])) == "a"
    assert majority_label(task("b a a b".split(), [])) == "b"


def test_words_of_rouge_are_the_scorers_own_in_ascii_and_of_every_script_beyond() -> None:
    own = RougeScorer(["rougeL"])
    for one, other in (("A b_c, d-e 12.5!", "b c d 12"), ("don't do", "do it don t")):
        assert rouge_l(one, [other]) == own.score(other, one)["rougeL"].fmeasure
    assert rouge_l("我喜欢猫", ["我喜欢狗"]) == pytest.approx(3 / 4)
    assert rouge_l("красный дом", ["Красный, дом?"]) == pytest.approx(1)
    assert rouge_l("café noir", ["cafe noir"]) == pytest.approx(1 / 2)
    assert rouge_l("हिन्दी भाषा", ["हिन्दी"]) == pytest.approx(2 / 3)


def test_letters_are_equal_however_unicode_writes_them() -> None:
    """The capital J with a caron has no letter of its own, the small one has."""
    for one, other in (("Caf\u00e9 noir", "cafe\u0301 noir"), ("J\u030c", "\u01f0")):
        assert normalised_match(one, [other]) and normalised_match(other, [one])
        assert rouge_l(one, [other]) == rouge_l(other, [one]) == 1
    assert normalised_match("x2", ["x\u00b2"]) is False
    # As the paper has it.
    assert paper_score("exact", "caf\u00e9", ["cafe\u0301"]) == 0


def test_metrics_of_lists_are_exact_match_alone() -> None:
    assert metrics_to_show([task(["3 1"], ["1 2", "[]", ""])]) == ("exact_match",)
    assert metrics_to_show([task(["3 1"], ["1 2"]), task([], ["cat"])]) == ANSWER_METRICS


@pytest.mark.parametrize(
    ("metric", "answer", "references", "value"),
    [
        ("exact", "The Dog.\nAnd more", ["the dog"], 1),
        ("exact", "a dog", ["dog", "cat"], 0),
        ("exact", "forty-two", ["forty two"], 1),
        ("set", "cat and dog", ["dog, cat"], 1),
        ("set", "cat, dog, cow", ["dog, cat"], 0),
        ("contains", "it is big today", ["large", "big"], 1),
        ("contains", "bigger", ["big"], 0),
        ("f1", "they are round fruits", ["are round"], 2 * 0.5 * 1 / 1.5),
        ("f1", "", ["are round"], 0),
        ("exact", None, [""], 0),
    ],
)
def test_metrics_of_the_instruction_induction_paper(
    metric: PaperMetric, answer: str | None, references: list[str], value: float
) -> None:
    assert paper_score(metric, answer, references) == pytest.approx(value)


YES_NO = [["Yes"], ["No"], ["Yes"], ["No"]]


@pytest.mark.parametrize(
    ("answers", "references", "expected"),
    [
        (["Yes", "yes.", "It is a yes", "Yes"], YES_NO, [True]),
        (["Yes", "No", "Yes", "No"], YES_NO, [False]),
        (["Yes"] * 4, [["Yes"], ["yes."], ["Yes", "No"], ["yes"]], []),  # right for all
        (["Yes"] * 4, [["No", "Maybe"], ["maybe"], ["Maybe"], ["maybe."]], []),  # one would be
        (["Yes"] * 4, [["No", "Maybe"], ["Maybe"], ["No"], ["Yes"]], [True]),
        ([None] * 4, YES_NO, [True]),  # nothing to any
        (["Yes", None, "Yes", "Yes"], YES_NO, [False]),
        ([CutOff("No, and on"), CutOff("No, and so"), "No", "No"], YES_NO, [True]),
        (["Yes"] * 3, YES_NO[:3], []),
    ],
)
def test_one_label_for_inputs_with_different_right_ones_is_seen(
    answers: list[str | None], references: list[list[str]], expected: list[bool]
) -> None:
    assert constant_label(answers, references, ("Yes", "No", "Maybe")) == expected
    assert constant_label(answers, references, ()) == []
