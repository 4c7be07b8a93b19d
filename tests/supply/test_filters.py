"""Each filter by itself, on texts."""

from collections.abc import Sequence

import pytest

from ship_ds.data.task import Example, Task
from ship_ds.errors import UserError
from ship_ds.supply.chains import Chain, draw_pairs, fits
from ship_ds.supply.compress import without_idle_words
from ship_ds.supply.config import ChainsConfig, CompressConfig, parse_settings
from ship_ds.supply.disagreement import change, shortened, weights_of
from ship_ds.supply.filters import agreed, is_new, is_trivial, share_alike


def test_an_instruction_is_new_below_the_bound_of_every_known_one() -> None:
    # 3 words in common of 4 and 5: F = 2 * 3 / 9
    known = ["sort the list", "keep the first numbers of"]
    assert is_new("keep the last numbers", known, 0.7)
    assert not is_new("keep the last numbers", known, 0.66)
    assert not is_new("sort the list", known, 1.0)


def test_answers_are_kept_that_end_say_something_and_are_agreed_on() -> None:
    kept = agreed(list("abcd"), ["1", None, " ", "4"], [0.75, 1.0, 1.0, 0.625], 0.75)
    assert kept == [Example("a", "1")]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("1", "1"), ("2", "2"), ("3", "4")], True),  # copies
        ([("1", "7"), ("2", "7"), ("3", "7")], True),  # one answer
        ([("1", "1"), ("2", "3"), ("3", "4")], False),
    ],
)
def test_copies_and_constants_are_trivial(pairs: list[tuple[str, str]], expected: bool) -> None:
    assert is_trivial([Example(x, y) for x, y in pairs]) is expected


def test_share_of_answers_alike() -> None:
    examples = [Example("a", "1 2"), Example("b", "3"), Example("c", "5", ("5", "6"))]
    assert share_alike(["1, 2", None, "6"], examples) == pytest.approx(2 / 3)


def test_outputs_fit_inputs_of_their_form_and_length() -> None:
    assert fits(["1 2 3", "4"], ["1 2 3 4", "5"])
    assert not fits(["yes", "no"], ["1 2", "3"])
    assert not fits(["1 2 3 4 5 6 7"] * 3, ["1 2 3", "4"])
    assert not fits([], ["1"])


def chain() -> Chain:
    first = Task("a", "add 1", tuple(Example(str(i), str(i + 1)) for i in range(8)))
    second = Task("b", "double", (Example("1", "2"),))
    return Chain.of(first, second, ChainsConfig(), lambda *_: True)


def test_a_chain_is_kept_where_both_directions_agree() -> None:
    doubled = [str(2 * (i + 1)) for i in range(8)]
    alone = [str(2 * i) for i in range(8)]
    reason, examples, share = chain().judged(doubled, doubled, alone, ChainsConfig())
    assert (reason, share) == ("kept", 1.0)
    assert chain().text == "add 1 and then double" and examples[3] == Example("3", "8")
    half = [*doubled[:5], "x", "x", "x"]
    assert chain().judged(doubled, half, alone, ChainsConfig())[0] == "disagreement"
    assert chain().judged(doubled, doubled, doubled, ChainsConfig())[0] == "one step is enough"
    ends = [*doubled[:7], None]
    assert chain().judged(ends, doubled, alone, ChainsConfig())[0] == "unfinished"


def test_the_second_task_s_own_examples_come_before_what_the_run_answers() -> None:
    wrong = ["9", *(str(2 * (i + 1)) for i in range(1, 8))]
    alone = [str(2 * i) for i in range(8)]
    assert chain().judged(wrong, wrong, alone, ChainsConfig())[1][0] == Example("0", "2")


def test_a_chain_has_no_example_that_one_of_its_three_questions_cannot_have() -> None:
    """At once, by the two steps, and by the second step alone."""
    examples = tuple(Example(str(i), str(10 + i)) for i in range(5))
    first, second = Task("a", "add 10", examples), Task("b", "double", ())
    unread = {("add 10 and then double", "1"), ("double", "2"), ("double", "13")}
    made = Chain.of(first, second, ChainsConfig(), lambda *asked: asked not in unread)
    assert made.inputs == ["0", "4"]
    few = ChainsConfig(num_inputs=1)
    assert Chain.of(first, second, few, lambda _, text: text != "0").inputs == ["1"]


def test_two_pairs_have_two_ids() -> None:
    names = ("a", "b-c", "a-b", "c", "a+b", "b+c", "a%2Bb", "%", "a+", "+c")
    tasks = [Task(name, name, ()) for name in names]
    ids = {
        Chain.of(one, other, ChainsConfig(), lambda *_: True).id for one in tasks for other in tasks
    }
    assert len(ids) == len(names) ** 2


def test_pairs_are_distinct_and_of_different_tasks() -> None:
    pairs = draw_pairs(5, 100, 0)
    assert len(set(pairs)) == 20 and all(a != b for a, b in pairs)
    assert draw_pairs(50, 10, 0) == draw_pairs(50, 10, 0) != draw_pairs(50, 10, 1)


def test_compression_drops_what_the_loss_does_not_need() -> None:
    """The loss needs "keep" and "4"; one more word lowers it a little."""

    def losses(texts: Sequence[str]) -> list[float]:
        return [
            1.0 * (not {"keep", "4"} <= set(text.split())) + 0.03 * ("numbers" not in text)
            for text in texts
        ]

    text = "You get numbers. Please keep those above 4"
    tight = CompressConfig(tolerance=0.02, min_words=1)
    assert without_idle_words(text, losses, tight) == ("numbers. keep 4", 0.0, 0.0)
    loose = tight.model_copy(update={"tolerance": 0.05})
    assert without_idle_words(text, losses, loose)[0] == "keep 4"
    assert (
        len(without_idle_words(text, losses, loose.model_copy(update={"min_words": 4}))[0].split())
        == 4
    )
    spaced = "numbers.\n\n  keep 4"
    assert without_idle_words(spaced, losses, tight) == (spaced, 0.0, 0.0)


def test_words_are_dropped_by_the_seed() -> None:
    text = "keep the numbers greater than 4"
    texts = shortened(text, 8, 0.2, 0)
    assert texts == shortened(text, 8, 0.2, 0) != shortened(text, 8, 0.2, 1)
    for short in texts:
        words = short.split()
        assert 0 < len(words) < 6
        assert [word for word in text.split() if word in words] == words
    assert shortened("reverse", 8, 0.2, 0) == []
    assert all(len(short.split()) == 1 for short in shortened("reverse it", 8, 0.99, 0))


def test_disagreement_is_the_share_of_answers_that_change() -> None:
    assert change(["a", "b"], [["a", "x"], ["a", "b"]]) == 0.25
    assert change(["a", None], [["a", None]]) == 0.0
    weights = weights_of([0.0, 0.4, 0.8], 0.1)
    assert sum(weights) == pytest.approx(3, abs=1e-3)
    assert weights[2] / weights[0] == pytest.approx(9, rel=1e-2)


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("propse", "", "expected one of propose"),
        ("propose", "max_rogue=1", "--set max_rogue: unknown key; there are by, num_at_once, "),
        ("propose", "max_rouge=2", "max_rouge"),
        ("propose", "num_shown=8", "more than num_shown"),
        ("chains", "min_examples=17", "num_inputs"),
        ("chains", "joint=and", "--set joint: expected a text with {first}"),
        ("chains", "joint='{first} and {other} {second}'", "no other braces"),
        ("chains", "joint='{first} and {second} {}'", "no other braces"),
        ("chains", "joint='{first} and {second'", "--set joint: "),
    ],
)
def test_wrong_settings_are_named(kind: str, change: str, named: str) -> None:
    with pytest.raises(UserError, match=named.replace("{", r"\{")) as error:
        parse_settings(kind, [change] if change else [])
    assert "\n" not in str(error.value)
