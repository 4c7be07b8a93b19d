"""Exact match: lists as lists, texts as texts."""

import pytest

from ship_ds.data.matching import exact_match
from ship_ds.data.task import CutOff


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
        ("1 234", "1,234", True),
        ("1234", "1,234", False),
        ("1 2 three", "1 2 three", True),
        ("1 2 three", "1, 2, three", False),
        ("3.5", "3 5", False),
        ("caf\u00e9", "cafe\u0301", True),
        ("cafe", "caf\u00e9", False),
        ("x\u00b2", "x2", False),
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
    assert not exact_match(CutOff("3 1"), ["3 1"])


def test_numbers_of_thousands_of_digits_are_compared() -> None:
    long = "9" * 5000
    assert exact_match(f"[{long}, -0]", [f"{long} 0"])
    assert not exact_match(long, [long[:-1] + "8"])
    assert not exact_match(long, [f"-{long}"])
