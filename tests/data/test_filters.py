"""What the filters leave out, with the count of each reason."""

from ship_ds.data.filters import FilterConfig, apply_filters
from ship_ds.data.splits import hold_out
from ship_ds.data.task import Example, Task


def task(name: str, instruction: str = "k", num: int = 6, length: int = 1) -> Task:
    return Task(
        name,
        instruction,
        tuple(Example(" ".join([str(i)] * length), str(i)) for i in range(num)),
        source="here",
    )


def test_filters_count_what_they_leave_out() -> None:
    tasks = [
        task("long", "a", length=20),
        task("edge", "b", length=19),
        task("wordy", "c d e"),
        task("few", "f", num=1),
    ]
    kept, counts = apply_filters(
        tasks, FilterConfig(max_input_words=20, max_instruction_words=2, max_examples_per_task=5)
    )
    assert [(t.id, len(t.examples)) for t in kept] == [("edge", 5)]
    assert counts == {
        "examples: input of 20 words or more": 6,
        "tasks: fewer than 2 examples left": 2,
        "examples: beyond the first 5 of a task": 1,
        "tasks: instruction of more than 2 words": 1,
    }


def test_input_words_are_parted_by_single_spaces() -> None:
    """As in SHIP's code: "a  b" is three words there."""
    tasks = [Task("t", "k", (Example("a  b", "1"), Example("a b", "2"), Example("a\nb c", "3")))]
    kept, counts = apply_filters(tasks, FilterConfig(max_input_words=3))
    assert [e.target for e in kept[0].examples] == ["2", "3"] and counts == {
        "examples: input of 3 words or more": 1
    }


def test_empty_targets_stay_unless_asked() -> None:
    tasks = [Task("t", "k", (Example("a", ""), Example("b", "x"), Example("c", "y")))]
    assert apply_filters(tasks, FilterConfig()) == (tasks, {})
    kept, counts = apply_filters(tasks, FilterConfig(drop_empty_targets=True))
    assert len(kept[0].examples) == 2 and counts == {"examples: empty target": 1}


def test_exact_repeats_go_and_other_answers_to_an_input_stay() -> None:
    a, b, other = Example("a", "x"), Example("b", "x"), Example("a", "y")
    kept, counts = apply_filters([Task("t", "k", (a, b, a, other, a))], FilterConfig())
    assert kept[0].examples == (a, b, other) and counts == {"examples: exact repeats": 2}


def test_a_task_that_cannot_be_parted_is_left_out() -> None:
    same = Task("same", "k", (Example("a", "x"), Example("a", "y")))
    tested = Task(
        "tested", "k", (Example("a", "x"), hold_out(Example("a", "y")), hold_out(Example("b", "y")))
    )
    kept, counts = apply_filters([same, tested, task("t")], FilterConfig())
    assert [t.id for t in kept] == ["t"]
    assert counts == {
        "tasks: the same input in every example": 1,
        "tasks: only the format's test examples left": 1,
    }


def test_the_formats_test_examples_do_not_count_as_the_first_ones() -> None:
    given = (*task("t").examples, hold_out(Example("x", "y")))
    kept, counts = apply_filters([Task("t", "k", given)], FilterConfig(max_examples_per_task=2))
    assert kept[0].examples == (*given[:2], given[-1]) and counts == {
        "examples: beyond the first 2 of a task": 4
    }
