"""Which tasks have labels, which label a text means, and draws in which all are as frequent."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from ship_ds.data.labels import (
    closed_labels,
    label_form,
    label_forms,
    nearest_label,
    sample_by_label,
)
from ship_ds.data.task import Example, SplitTask, Task
from ship_ds.evaluation.metrics import label_match


def task(train: Sequence[str], test: Sequence[str]) -> SplitTask:
    parts = [tuple(Example(str(i), text) for i, text in enumerate(part)) for part in (train, test)]
    return SplitTask(Task("t", "k", (*parts[0], *parts[1])), *parts)


@pytest.mark.parametrize(
    ("train", "test", "labels"),
    [
        ("Yes no yes. No".split(), ["no"], ("Yes", "no")),
        ("yes no maybe".split(), ["no"], ()),
        ("yes no yes no".split(), ["maybe"], ()),
        (["yes"] * 9, ["yes"], ()),
        ("+ - + -".split(), ["-"], ("+", "-")),
        (["ด\u0e35", "ด\u0e39"] * 2, ["ด\u0e39"], ("ด\u0e35", "ด\u0e39")),
        ([str(i) for i in range(10)] * 2, ["3"], tuple(map(str, range(10)))),
        ([str(i) for i in range(11)] * 2, ["3"], ()),
    ],
)
def test_labels_are_few_and_repeated(
    train: list[str], test: list[str], labels: tuple[str, ...]
) -> None:
    made = task(train, test)
    assert closed_labels(made) == labels
    forms = label_forms(made.train)
    assert bool(forms) is bool(closed_labels(replace(made, test=())))
    assert forms in ({}, {text: label_form(text) for text in train})


@pytest.mark.parametrize(
    ("answer", "nearest"),
    [
        ("POSITIVE!", "Positive"),
        ("It is not positive, it is negative.", "not positive"),
        ("negative, then positive", "Negative"),
        ("negativ", "Negative"),
        ("pos", "Positive"),
        ("", None),
        ("7", None),
        (None, None),
    ],
)
def test_nearest_label_by_each_rule(answer: str | None, nearest: str | None) -> None:
    labels = ("Positive", "Negative", "not positive")
    assert nearest_label(answer, labels) == nearest
    assert label_match(answer, ["negative", "x"], labels) is (nearest == "Negative")


@pytest.mark.parametrize(
    ("answer", "labels", "nearest"),
    [
        ("-1", ("0", "1", "-1"), "-1"),
        ("It is 1.", ("0", "1", "-1"), "1"),
        ("The answer is (A).", ("A", "B", "C"), "A"),
        ("It is a B", ("A", "B", "C"), "B"),
        ("a", ("B", "A"), "A"),
        ("about 3.5, I think", ("35", "3.5"), "3.5"),
        ("-", ("+", "-"), "-"),
        ("It is +.", ("-", "+"), "+"),
        ("non-toxic: +", ("-", "+"), "+"),
        (">.", ("<", "=", ">"), ">"),
        ("It is <=.", ("<", "=", "<="), "<="),
        ("\U0001f621!", ("\U0001f600", "\U0001f621"), "\U0001f621"),
        ("positive \U0001f621", ("\U0001f600", "\U0001f621"), "\U0001f621"),
        ("\u2764", ("\u2600\ufe0f", "\u2764\ufe0f"), "\u2764\ufe0f"),
        ("I think - yes", ("-", "yes"), "yes"),
        ("ह\u0942\u0901", ("ह\u093e\u0901", "ह\u0948", "ह\u0942\u0901"), "ह\u0942\u0901"),
        ("उत्तर है।", ("ह\u093e\u0901", "ह\u0948"), "ह\u0948"),
        ("ด\u0e39.", ("ด\u0e35", "ด\u0e39"), "ด\u0e39"),
        ("ك\u064f", ("ك\u064e", "ك\u064f"), "ك\u064f"),
        ("J\u030c!", ("k", "\u01f0"), "\u01f0"),
    ],
)
def test_signs_points_and_letters_tell_labels_apart(
    answer: str, labels: tuple[str, ...], nearest: str
) -> None:
    assert nearest_label(answer, labels) == nearest
    assert [label_match(answer, [label], labels) for label in labels] == [
        label == nearest for label in labels
    ]


@pytest.mark.parametrize("answer", ["", " ", "7", "it is"])
def test_answer_without_a_sign_means_no_label_of_signs(answer: str) -> None:
    assert nearest_label(answer, ("<", "=", ">")) is None


def test_an_empty_label_is_meant_by_an_empty_answer_alone() -> None:
    labels = ("", "x")
    assert [nearest_label(answer, labels) for answer in ("", "an x", "-")] == ["", "x", None]


def test_letters_of_labels_are_equal_however_unicode_writes_them() -> None:
    assert nearest_label("CAFE\u0301", ("cafe", "caf\u00e9")) == "caf\u00e9"
    same = ["caf\u00e9", "cafe\u0301", "x", "x"]
    assert closed_labels(task(same, same[1:2])) == ("caf\u00e9", "x")


def _examples(counts: dict[str, int]) -> list[Example]:
    """As files have them, sorted by label."""
    return [Example(f"{label} {i}", label) for label, num in counts.items() for i in range(num)]


@pytest.mark.slow
@pytest.mark.parametrize("count", range(1, 13))
def test_each_label_is_drawn_as_often_as_the_others(count: int) -> None:
    """Nine in ten are of one label, and no draw says so: neither its labels nor their order."""
    examples = _examples({"a": 45, "b": 5, "c": 4})
    forms = label_forms(examples)
    draws = [sample_by_label(examples, count, forms, random.Random(i)) for i in range(600)]
    for drawn in draws:
        assert len(set(drawn)) == count and set(drawn) <= set(examples)
        times = Counter(one.target for one in drawn)
        assert max(times.values()) - min(times["a"], times["b"], times["c"]) <= 1
    for place in range(count):
        met = Counter(drawn[place].target for drawn in draws)
        assert all(150 < met[label] < 250 for label in "abc"), place
    assert count < 3 or len({one for drawn in draws for one in drawn}) == len(examples)


def test_labels_that_run_out_leave_the_rest_to_the_others() -> None:
    examples = _examples({"a": 6, "b": 1, "c": 2})
    for seed in range(40):
        drawn = sample_by_label(examples, 9, label_forms(examples), random.Random(seed))
        assert sorted(drawn, key=repr) == sorted(examples, key=repr)
        assert [Counter(one.target for one in drawn[:n])["a"] for n in (3, 5, 9)] == [1, 2, 6]


def test_labels_are_told_apart_by_their_form() -> None:
    """ "No." and "no" are one label, which is not twice as frequent for its two spellings."""
    examples = _examples({"No.": 10, "no": 10, "Yes": 10})
    forms = label_forms(examples)
    first = Counter(
        forms[sample_by_label(examples, 1, forms, random.Random(i))[0].target] for i in range(600)
    )
    assert abs(first["no"] - 300) < 50 and abs(first["yes"] - 300) < 50
