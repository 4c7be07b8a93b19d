"""What the filters leave out, with the count of each reason."""

import pytest

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


def test_a_preset_sets_what_is_not_written_out() -> None:
    preset = FilterConfig.model_validate({"preset": "published-sni"})
    assert (preset.max_input_words, preset.max_instruction_words) == (20, 32)
    assert (preset.min_examples_per_task, preset.max_examples_per_task) == (27, 27)
    wins = FilterConfig.model_validate(
        {"preset": "published-sni", "max_input_words": 9, "max_instruction_words": None}
    )
    assert (wins.max_input_words, wins.max_instruction_words) == (9, None)
    assert wins.max_examples_per_task == 27
    assert FilterConfig.model_validate(wins.model_dump()) == wins


@pytest.mark.parametrize(
    ("preset", "given", "kept"),
    [
        ("published-sni", task("t", " ".join("k" * 32), num=27, length=19), 27),
        ("published-sni", task("t", num=40), 27),
        ("published-sni", task("t", num=26), None),
        ("published-sni", task("t", num=27, length=20), None),
        ("published-sni", task("t", " ".join("k" * 33), num=27), None),
        ("published-p3", task("p3-3", num=25, length=300), 25),
        ("published-p3", task("p3-3", num=24), None),
        ("published-p3", task("p3-3", num=25, length=600), None),
        ("published-p3", task("p3-1", num=25), None),
    ],
)
def test_presets_keep_what_the_authors_keep(preset: str, given: Task, kept: int | None) -> None:
    tasks, counts = apply_filters([given], FilterConfig.model_validate({"preset": preset}))
    assert [len(t.examples) for t in tasks] == ([] if kept is None else [kept])
    assert kept is not None or counts


def test_a_task_of_one_input_stays_where_one_example_is_enough() -> None:
    one = Task("one", "k", (Example("", "x"),))
    three = Task("three", "k", tuple(Example("", x) for x in "xyz"))
    only_tested = Task("tested", "k", (hold_out(Example("", "x")),))
    filters = FilterConfig(min_examples_per_task=1)
    kept, counts = apply_filters([one, three, only_tested], filters)
    assert kept == [one, three] and counts == {"tasks: only the format's test examples left": 1}
    assert apply_filters([one], FilterConfig(), usual_min=1)[0] == [one]
    assert apply_filters([one], FilterConfig(min_examples_per_task=2), usual_min=1)[0] == []
