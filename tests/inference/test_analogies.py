"""What follows from known instructions by analogy."""

import pytest

from ship_ds.inference.analogies import analogies

ADD = [f"add {n} to every number" for n in (1, 2, 3, 4)]


def test_a_slot_takes_the_words_of_slots_like_it() -> None:
    """A word that one of them never had comes from the others."""
    removed = [f"remove every {n}" for n in (1, 2, 3, 5)]
    assert set(analogies([*ADD, *removed])) == {"add 5 to every number", "remove every 4"}


def test_slots_that_share_few_words_take_none() -> None:
    assert (
        analogies(
            [*ADD, *(f"put {word} first" for word in ("1", "zeros", "ones", "names", "lists"))]
        )
        == []
    )


def test_two_that_differ_in_a_word_are_no_pattern() -> None:
    assert analogies([*ADD, "keep 1", "keep 2"]) == []


def test_what_is_known_does_not_follow_and_each_comes_once() -> None:
    texts = [f"swap {a} and {b}" for a in "1234" for b in "1234" if a != b]
    found = analogies(texts)
    assert sorted(found) == [f"swap {a} and {a}" for a in "1234"]


def test_blanks_and_line_ends_make_no_other_instruction() -> None:
    assert analogies(["add  1 now", "add 2\nnow", "add 3 now "]) == []


def test_slots_that_share_exactly_half_take_each_others_words() -> None:
    assert set(analogies([*ADD[:3], *(f"cut {n}" for n in (2, 3, 4))])) == {
        "add 4 to every number",
        "cut 1",
    }
    assert analogies([*ADD[:3], *(f"cut {n}" for n in (3, 4, 5))]) == []


def test_a_word_at_either_end_and_an_instruction_of_one_word() -> None:
    assert set(
        analogies([*(f"{word} it" for word in ("sort", "flip", "cut")), "sort", "flip", "drop"])
    ) == {"drop it", "cut"}
    assert analogies(["sort it", "flip it", "cut it", "it sort", "it flip", "it cut"]) == []


def test_slots_are_told_apart_by_what_stands_on_both_sides() -> None:
    """The same beginning with another end is another slot, filled here by too few."""
    assert analogies(["put 1 first", "put 2 first", "put 3 last", "put 1 last"]) == []


def test_of_very_many_the_first_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of which each takes the odd word of every other: the square of the number of
    instructions follows."""
    texts = [f"{slot} {word}" for slot in range(40) for word in ("b", "c", f"a{slot}")]
    everything = analogies(texts)
    assert len(everything) == 40 * 39
    assert everything == analogies(texts)
    monkeypatch.setattr("ship_ds.inference.analogies.MAX_ANALOGIES", 100)
    assert analogies(texts) == everything[:100]


def test_order_and_repetition_of_the_known_do_not_matter() -> None:
    texts = [*ADD, *(f"remove every {n}" for n in (1, 2, 3, 5))]
    assert set(analogies(texts)) == set(analogies([*reversed(texts), *texts])) != set()


def test_texts_without_a_common_pattern_imply_nothing() -> None:
    assert analogies(["Name the capital of the country.", "Sort the list.", ""]) == []
