"""Exact match by hand, and intervals over tasks."""

import json
import math

import pytest

from ship_ds.evaluation.metrics import exact_match, score


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("[1, 2, 3]", "[1,2,3]", True),
        ("1 2 3", "[1, 2, 3]", True),
        (" 1  2 ", "1 2", True),
        ("[]", "[ ]", True),
        ("1 2", "2 1", False),
        ("1 2", "1 2 3", False),
        ("[]", "[0]", False),
        ("-1 2", "1 2", False),
        ("12", "1 2", False),
        ("yes", " yes\n", True),
        ("Yes", "yes", False),
        ("", "", True),
        ("", "[]", False),
        ("1 2 three", "1 2 three", True),
        ("1 2 three", "1, 2, three", False),
        ("3.5", "3 5", False),
    ],
)
def test_lists_are_compared_as_lists_and_the_rest_as_text(
    answer: str, reference: str, right: bool
) -> None:
    assert exact_match(answer, [reference]) is right


def test_any_reference_is_enough() -> None:
    assert (
        exact_match("b", ["a", "b"])
        and not exact_match("c", ["a", "b"])
        and not exact_match("a", [])
    )


def test_answer_that_never_ended_is_wrong() -> None:
    assert not exact_match(None, ["", "None"])


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
    assert json.loads(json.dumps(empty.as_json(), allow_nan=False))["exact_match"] == {
        "value": None,
        "ci95": None,
    }


def test_json_has_the_reports_keys() -> None:
    assert score([[True, False]]).as_json() == {
        "exact_match": {"value": 0.5, "ci95": [0.5, 0.5]},
        "n_tasks": 1,
        "n_examples": 2,
    }
