"""Rules, and not tasks, are parted; test inputs are never trained on."""

import itertools
import random
from dataclasses import replace

import pytest
from pydantic import ValidationError

from ship_ds.data.splits import (
    GroupedBy,
    SplitConfig,
    alike,
    hold_out,
    is_near_copy,
    rule_groups,
    split_tasks,
    together_key,
    without_rules_of,
)
from ship_ds.data.task import DataError, Example, SplitTask, Task


def task(name: str, instruction: str, *paraphrases: str, num: int = 6) -> Task:
    return Task(
        name,
        instruction,
        tuple(Example(str(i), str(i)) for i in range(num)),
        paraphrases,
        source="here",
    )


def only(examples: tuple[Example, ...], config: SplitConfig) -> SplitTask:
    splits = split_tasks(
        [Task("a", "first", examples), task("b", "second"), task("c", "third")], config
    )
    (found,) = (part for part in splits.seen + splits.dev + splits.unseen if part.id == "a")
    return found


def test_equal_and_near_equal_wordings_are_one_rule() -> None:
    tasks = [
        task("a", "Sort the list up"),
        task("b", "reverse it"),
        task("c", "sort the LIST up."),
        task("d", "one two three four five six seven eight nine"),
        task("e", "one two three four five six seven eight ten"),
        task("f", "if element 1 = 2"),
        task("g", "if element 1 > 2"),
        task("h", "other words", "turn it round", "reverse it"),
    ]
    assert rule_groups(tasks) == [[0, 2], [1, 7], [3, 4], [5], [6]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("这是好的吗？", "这是好的吗"),
        ("这是好的吗？", "这是好的吗?"),
        ("请回答，这是好的吗", "请回答 这是好的吗。"),
        ("请把下面的英文句子翻译成法文", "请把下面的英文句子翻译成法语"),
        ("これは良いですか？", "これは良いですか"),
        ("ဒါကောင်းလား။", "ဒါကောင်းလား"),
        ("តើនេះល្អទេ។", "តើនេះល្អទេ"),
        ("แปลประโยคต่อไปนี้เป็นภาษาอังกฤษให้ครบถ้วน", "แปลประโยคต่อไปนี้เป็นภาษาอังกฤษให้ครบ"),
        ("هل هذا جيد؟", "هل هذا جيد"),
        ("क्या यह अच्छा है।", "क्या यह अच्छा है"),
        ("क्या यह अच्छा है ।", "क्या यह अच्छा है"),
        ("¿Es bueno?", "Es bueno"),
        ("«Это хорошо?»", "это хорошо"),
        ("tell the caf\u00e9", "tell the cafe\u0301"),
        ("Ｉｓ ｉｔ ｇｏｏｄ？", "Is it good"),
    ],
)
def test_near_copies_are_one_rule_in_every_script(one: str, other: str) -> None:
    tasks = [task("a", one), task("b", other)]
    assert rule_groups(tasks) == [[0, 1]]
    known, read = (split_tasks([only], SplitConfig(unseen_share=1)).unseen for only in tasks)
    assert without_rules_of(read, known) == ()


def test_other_rules_stay_so_in_every_script() -> None:
    texts = (
        "这是好的吗",
        "那是坏的吗",
        "把每个数加一",
        "add -1",
        "add 1",
        "é + 1",
        "é = 1",
        "？",
        "!",
    )
    assert len(rule_groups([task(text, text) for text in texts])) == len(texts)


def test_long_texts_of_one_alphabet_are_no_near_copies() -> None:
    """They have most of its letters in common."""
    rng = random.Random(0)
    words = ["".join(rng.choices("กขคงจชดตทนบปพมยรลวสหอาิี", k=4)) for _ in range(400)]
    texts = ["".join(rng.sample(words, 60)) for _ in range(4)]
    assert len(rule_groups([task(text, text) for text in texts])) == 4


def test_one_rule_reaches_over_a_chain_of_near_copies() -> None:
    words = [f"w{i}" for i in range(30)]
    assert rule_groups([task(str(i), " ".join(words[i : i + 20])) for i in (0, 4, 2)]) == [
        [0, 1, 2]
    ]


def test_tasks_of_two_sources_are_alike_without_chains() -> None:
    """Near copies, held-out wordings, and what another source cut; none of one source."""
    words = "one two three four five six seven eight nine ten".split()
    chain = [" ".join([*words[i:], *"abc"[:i]]) for i in range(3)]
    assert len(rule_groups([task(text, text) for text in chain])) == 1
    long = " ".join(f"w{i}" for i in range(30))
    texts = [chain[0], chain[2], "sort it", chain[1], long, " ".join(long.split()[:15])]
    ones = [SplitTask(task(text, text), (), ()) for text in texts]
    ones[3] = replace(ones[3], held_out_paraphrases=("Sort it!",))
    pairs = {frozenset(pair) for pair in alike(ones, ["a", "a", "a", "b", "b", "a"])}
    assert pairs == {frozenset(pair) for pair in ((0, 3), (1, 3), (2, 3), (4, 5))}
    assert list(alike(ones, ["a"] * 6)) == []


def test_rule_groups_are_those_of_comparing_every_pair() -> None:
    rng = random.Random(0)
    sets = [frozenset(rng.sample("abcdefghijkl", rng.randint(1, 11))) for _ in range(120)]
    groups = [{i} for i in range(120)]
    for i, j in itertools.combinations(range(120), 2):
        one, other = (next(group for group in groups if k in group) for k in (i, j))
        if one is not other and 5 * len(sets[i] & sets[j]) >= 4 * len(sets[i] | sets[j]):
            groups.remove(other)
            one |= other
    found = rule_groups([task(str(i), " ".join(sorted(own))) for i, own in enumerate(sets)])
    assert {frozenset(group) for group in found} == {
        frozenset(group) for group in groups
    } and 1 < len(found) < 120


@pytest.mark.parametrize("num_shared", range(1, 25))
def test_the_jaccard_index_is_looked_up_exactly(num_shared: int) -> None:
    """At 0.8 and just below it, whichever of the two sets has the words that no other has."""
    shared, own = (
        [f"s{i}" for i in range(num_shared)],
        [f"o{i}" for i in range(num_shared // 4 + 1)],
    )
    for num_left in range(len(own)):
        for num_right in range(len(own) - num_left):
            two = [
                task("a", " ".join(shared + own[:num_left])),
                task("b", " ".join(shared + own[::-1][:num_right])),
            ]
            assert rule_groups(two) == [[0, 1]]
    assert rule_groups([task("a", " ".join(shared)), task("b", " ".join(shared + own))]) == [
        [0],
        [1],
    ]


def test_a_rule_lies_in_one_part_and_every_part_is_there() -> None:
    tasks = [task(f"{i}-{copy}", f"rule number {i}") for i in range(20) for copy in range(2)]
    splits = split_tasks(tasks, SplitConfig())
    parts = [
        {t.task.instruction for t in part} for part in (splits.seen, splits.dev, splits.unseen)
    ]
    assert [len(part) for part in parts] == [17, 1, 2] and len(set.union(*parts)) == 20
    assert split_tasks(tasks, SplitConfig()) == splits != split_tasks(tasks, SplitConfig(seed=1))


@pytest.mark.parametrize(("unseen", "dev"), [(0.1, 0.05), (0.5, 0.49), (0.98, 0.01)])
def test_three_rules_are_enough_for_any_shares(unseen: float, dev: float) -> None:
    tasks = [task(str(i), f"rule number {i}") for i in range(3)]
    splits = split_tasks(tasks, SplitConfig(unseen_share=unseen, dev_share=dev))
    assert [len(part) for part in (splits.seen, splits.dev, splits.unseen)] == [1, 1, 1]
    with pytest.raises(DataError, match="2 tasks are 2 distinct rules, too few"):
        split_tasks(tasks[:2], SplitConfig())


@pytest.mark.parametrize("key", ["rule", "dataset"])
@pytest.mark.parametrize(
    ("unseen", "dev", "sizes"),
    [(0, 0, [8, 0, 0]), (0, 0.25, [6, 2, 0]), (0.25, 0, [6, 0, 2]), (0, 0.01, [7, 1, 0])],
)
def test_a_share_of_zero_is_none(
    key: GroupedBy, unseen: float, dev: float, sizes: list[int]
) -> None:
    tasks = made_of("a b c d e f g h")
    config = SplitConfig(unseen_share=unseen, dev_share=dev, keeps_together=key)
    splits = split_tasks(tasks, config)
    assert [len(part) for part in (splits.seen, splits.dev, splits.unseen)] == sizes
    fewest = 1 + (unseen > 0) + (dev > 0)
    least = split_tasks(tasks[:fewest], config)
    assert len(least.seen) == 1 and len(least.tasks) == fewest
    if fewest > 1:
        missing = f"a seen and {'a dev' if dev else 'an unseen'} part"
        with pytest.raises(DataError, match=f"too few for {missing}"):
            split_tasks(tasks[: fewest - 1], config)


def made_of(names: str, key: str = "dataset") -> list[Task]:
    return [
        replace(task(str(i), f"rule number {i}"), **{key: name.strip("-")})  # type: ignore[arg-type]
        for i, name in enumerate(names.split())
    ]


@pytest.mark.parametrize("key", ["dataset", "family"])
@pytest.mark.parametrize("seed", range(5))
def test_a_data_set_lies_in_one_part_and_shares_are_of_tasks(key: GroupedBy, seed: int) -> None:
    sizes = {"a": 30, "b": 9, "c": 5, "d": 4, "e": 3, "f": 2, "g": 1}
    names = [name for name, size in sizes.items() for _ in range(size)] + ["-"] * 46
    tasks = made_of(" ".join(names), key)
    config = SplitConfig(keeps_together=key, unseen_share=0.29, dev_share=0.1, seed=seed)
    splits = split_tasks(tasks, config)
    parts = [{getattr(t.task, key) for t in part} - {""} for part in vars(splits).values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 7, "each in one part"
    assert len(splits.tasks) == 100 == len({t.id for t in splits.tasks})
    # Single tasks fill what groups leave.
    assert (len(splits.unseen), len(splits.dev)) == (29, 10)
    assert "a" in parts[0], "larger than either share"
    by_rule = split_tasks(tasks, config.model_copy(update={"keeps_together": "rule"}))
    parted = [{getattr(t.task, key) for t in part} - {""} for part in vars(by_rule).values()]
    assert any(parted[0] & other for other in parted[1:])


def test_rules_stay_together_where_data_sets_do() -> None:
    """A near copy of another data set's task joins the two; spelling parts none."""
    tasks = made_of("roc_stories RocStories b b c d e f")
    tasks[2] = replace(tasks[2], instruction=tasks[0].instruction)
    config = SplitConfig(keeps_together="dataset")
    groups = rule_groups(tasks, together=[together_key(one, config) for one in tasks])
    assert groups == [[0, 1, 2, 3], [4], [5], [6], [7]]
    assert (
        rule_groups(tasks, together=[""] * 8)
        == rule_groups(tasks)
        == [
            [0, 2],
            *([i] for i in (1, 3, 4, 5, 6, 7)),
        ]
    )


def test_no_part_is_empty_where_data_sets_are_large() -> None:
    config = SplitConfig(keeps_together="dataset")
    splits = split_tasks(made_of("a " * 9 + "b " * 8 + "c " * 7), config)
    assert {len(part) for part in vars(splits).values()} == {7, 8, 9}
    splits = split_tasks(made_of("a " * 9 + "b c"), config)
    assert [len(part) for part in vars(splits).values()] == [9, 1, 1], "a large one is seen"
    with pytest.raises(DataError, match="leaves 2 groups of tasks that can all be tested"):
        split_tasks(made_of("a a b b"), config)
    alone = [replace(one, examples=one.examples[:1]) for one in made_of("a b c")]
    with pytest.raises(DataError, match="leaves 1 groups"):
        split_tasks([*made_of("a a b b c c d d"), *alone], config)
    with pytest.raises(DataError, match="keeps_together=dataset: no task says of which dataset"):
        split_tasks(made_of("- - - -"), config)


def test_shares_that_leave_nothing_seen_are_refused() -> None:
    with pytest.raises(ValidationError, match="leave nothing to train on"):
        SplitConfig(unseen_share=0.6, dev_share=0.4)


def test_of_a_benchmark_every_task_is_unseen() -> None:
    tasks = [task("a", "first"), task("b", "second"), task("c", "third", num=1)]
    splits = split_tasks(tasks, SplitConfig(unseen_share=1, test_examples=2))
    assert [part.id for part in splits.tasks] == ["a", "b"] == [one.id for one in splits.unseen]
    assert all(len(one.test) == 2 for one in splits.unseen)


def test_tasks_of_known_rules_are_left_out_by_their_wordings() -> None:
    config = SplitConfig(unseen_share=1)
    known = split_tasks([task("a", "reverse it"), task("b", "say no", "deny all")], config).unseen
    read = [task("x", "Reverse it!"), task("y", "something"), task("z", "else", "deny all")]
    others = split_tasks(read, config).unseen
    assert [one.id for one in without_rules_of(others, known)] == ["y"]
    assert without_rules_of(others, ()) == others


def test_a_near_copy_is_one_of_the_others_and_not_of_a_task_between() -> None:
    """Where a chain of tasks would join all: each pair in a row shares 18 of 20 words."""
    words = [f"w{i}" for i in range(24)]
    first, second, third = (task(str(i), " ".join(words[i : i + 20])) for i in (0, 2, 4))
    known = split_tasks([first], SplitConfig(unseen_share=1)).unseen
    asked = split_tasks([second, third], SplitConfig(unseen_share=1)).unseen
    assert is_near_copy([second, third], known) == [True, False]
    assert is_near_copy([third, second], known) == [False, True]
    assert without_rules_of(asked, known) == ()
    assert is_near_copy([second], ()) == [False] and is_near_copy([], known) == []
    hidden = replace(known[0], held_out_paraphrases=("say no",))
    assert is_near_copy([task("x", "else", "Say no!")], [hidden]) == [True]
    assert is_near_copy([task("x", " ".join(words[:14]))], known) == [True]  # as if cut
    assert is_near_copy([task("x", "else"), task("x", "Else.")], known) == [False, False]


def test_a_wording_that_was_cut_is_the_rule_of_the_whole_one() -> None:
    """Each way round; another ending of a short beginning is another rule."""
    whole = " ".join(f"word{i}" for i in range(60))
    cut, other = whole[: whole.index("word20") + 3], whole.replace("word30", "another")
    config = SplitConfig(unseen_share=1)
    for known, read, left in (
        (cut, whole, []),
        (whole, cut, []),
        ("word0 word1 word2", whole, ["x"]),
        (whole, whole.replace("word5 ", "instead "), []),  # near copies
        (whole, " ".join(other.split()[28:]), ["x"]),
    ):
        (trained,) = split_tasks([task("a", known)], config).unseen
        found = without_rules_of(split_tasks([task("x", read)], config).unseen, [trained])
        assert [one.id for one in found] == left, read
    # Marks that stand alone are words of an ASCII text, and here of one side alone.
    colons = "".join(f"w{i} : " for i in range(20))
    longer = f"{colons} in the café " + " ".join(f"x{i}" for i in range(40))  # no near copy
    for known, read in ((colons, longer), (longer, colons)):
        (trained,) = split_tasks([task("a", known)], config).unseen
        assert without_rules_of(split_tasks([task("x", read)], config).unseen, [trained]) == ()
    shown = replace(trained, held_out_paraphrases=("never shown in training",))
    asked = split_tasks([task("x", "never shown in training")], config).unseen
    assert without_rules_of(asked, [shown]) == ()


def test_a_chinese_wording_that_was_cut_is_the_rule_of_the_whole_one() -> None:
    whole = "阅读给出的段落，然后用一句完整的话回答后面的问题，不要重复题目中的任何词语。"
    known, read = (
        split_tasks([task("a", text)], SplitConfig(unseen_share=1)).unseen
        for text in (whole[:20], whole)
    )
    assert without_rules_of(read, known) == without_rules_of(known, read) == ()


def test_near_copies_of_a_cut_wording_go_with_it() -> None:
    """Of one length all: only where lengths differ is a beginning the same rule."""
    words = [f"word{i}" for i in range(60)]
    cut, near = " ".join(words[:20]), " ".join([*words[:19], "another"])
    tasks = [task("a", " ".join(words)), task("b", cut), task("c", near)]
    assert rule_groups(tasks) == [[0], [1, 2]]
    assert rule_groups(tasks, cut_as=["long", "short", "short"]) == [[0, 1, 2]]


def test_no_input_is_both_trained_on_and_tested() -> None:
    part = only(tuple(Example(str(i % 7), str(i)) for i in range(20)), SplitConfig(test_examples=5))
    assert not {e.input for e in part.train} & {e.input for e in part.test}
    assert len(part.test) == 3 and len({e.input for e in part.train}) == 4
    same = (Example("x", "1"), Example("x", "2"))
    assert (only(same, SplitConfig()).train, only(same, SplitConfig()).test) == (same, ())
    with pytest.raises(DataError, match="task 'a' has 2 distinct inputs, too few"):
        only((hold_out(Example("x", "1")), hold_out(Example("y", "2"))), SplitConfig())


ALL_SEEN = SplitConfig(unseen_share=0, dev_share=0)


@pytest.mark.parametrize(
    "config", [ALL_SEEN, ALL_SEEN.model_copy(update={"keeps_together": "dataset"})]
)
def test_no_input_is_trained_on_as_another_task_of_its_rule(config: SplitConfig) -> None:
    """Super-NaturalInstructions has near copies of a task with the same examples."""
    wording = "one two three four five six seven eight"
    copies = [task(name, f"{wording} {name}", num=20) for name in ("nine", "ten")]
    other = task("c", "reverse it", num=20)
    copies, other = ([replace(one, dataset="d") for one in copies], replace(other, dataset="d"))
    lines: list[str] = []
    one, copy, alone = split_tasks([*copies, other], config, lines.append).seen
    tested = {example.input for part in (one, copy) for example in part.test}
    trained = {example.input for part in (one, copy) for example in part.train}
    assert 5 < len(tested) <= 10 and trained == set(map(str, range(20))) - tested
    assert len(alone.train) == 15, "what other rules are tested on may be trained on"
    number = 2 * 15 - len(one.train) - len(copy.train)
    assert number == 2 * (len(tested) - 5)
    assert lines == [
        f"left out: training examples with a test input of a task of their rule: {number}"
    ]
    assert split_tasks([*copies, other], config).seen == (one, copy, alone)


def test_a_task_that_would_have_nothing_to_train_on_stays_as_it_is() -> None:
    first, second = Example("1", "1"), Example("2", "2")
    examples = [(hold_out(first), second), (first, hold_out(second))]
    tasks = [replace(task(str(i), "add 1"), examples=both) for i, both in enumerate(examples)]
    lines: list[str] = []
    seen = split_tasks([*tasks, task("c", "reverse it")], ALL_SEEN, lines.append).seen
    assert [[example.input for example in one.train] for one in seen[:2]] == [["2"], ["1"]]
    assert lines == ["left as they are: tasks with no other training examples: 2"]


def test_an_input_is_tested_once_with_all_its_answers() -> None:
    rows = tuple(Example(text, f"{text}{i}") for text in "ABCD" for i in range(4))
    part = only(rows, SplitConfig())
    assert len(part.test) == 2 and len(part.train) == 8
    for one in part.test:
        assert one.target == f"{one.input}0"
        assert one.answers == tuple(f"{one.input}{i}" for i in range(4))
    same = tuple(Example(x, "1", refs) for x in "ab" for refs in (("1", "2"), ("1", "2", "3")))
    assert only(same, SplitConfig()).test[0].references == ("1", "2", "3")
    assert only((*same[:1] * 2, *same[2:3] * 2), SplitConfig()).test[0] in same


def test_test_examples_are_drawn_by_seed_from_the_whole_file() -> None:
    examples = tuple(Example(f"{i:02}", str(i)) for i in range(40))
    parts = [only(examples, SplitConfig(seed=seed)) for seed in range(4)]
    assert parts[0].test != examples[-5:] and len({part.test for part in parts}) == 4
    for part in parts:
        assert (
            sorted(part.train + part.test, key=lambda e: e.input) == list(examples)
            and len(part.test) == 5
        )
        assert part.train == tuple(sorted(part.train, key=lambda e: e.input))
    assert only(examples, SplitConfig(train_examples=9)).train == parts[0].train[:9]


@pytest.mark.parametrize("num_test", [1, 2, 5])
def test_a_formats_own_test_examples_are_never_trained_on(num_test: int) -> None:
    given = tuple(Example(str(i), "y") for i in range(8))
    held = (hold_out(Example("3", "z")), hold_out(Example("8", "z")))
    part = only(given + held, SplitConfig(test_examples=num_test))
    assert part.train == given[:3] + given[4:]
    assert part.test == (Example("3", "y", ("y", "z")), held[1])[:num_test]


def test_a_task_of_one_input_is_trained_on_and_never_tested() -> None:
    many = [task(f"t{i}", f"rule number {i} of them") for i in range(30)]
    ones = [task(f"one{i}", f"say {i}", num=1) for i in range(50)]
    before, splits = (split_tasks(tasks, SplitConfig()) for tasks in (many, [*many, *ones]))
    assert [len(part) for part in (before.dev, before.unseen)] == [2, 3]
    assert (splits.dev, splits.unseen) == (before.dev, before.unseen)
    assert [t.id for t in splits.seen] == [t.id for t in (*before.seen,)] + [t.id for t in ones]
    assert all((t.train, t.test) == (t.task.examples, ()) for t in splits.seen[-50:])
    tested = {t.id for t in before.unseen}
    first = next(t for t in many if t.id in tested)
    near = Task("near", f"{first.instruction}!", (Example("", "x"),))
    seen = {t.id for t in split_tasks([*many, near], SplitConfig()).seen}
    assert {first.id, "near"} <= seen, "its rule is trained on, so it is not unseen"


def test_tasks_of_one_input_alone_are_all_seen() -> None:
    ones = [task(f"one{i}", f"say {i}", num=1) for i in range(2)]
    splits = split_tasks([*ones, task("two", "double it")], SplitConfig())
    assert [len(part) for part in (splits.seen, splits.dev, splits.unseen)] == [3, 0, 0]
    assert splits.seen[2].test
