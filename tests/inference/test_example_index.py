"""Known tasks by the words of their examples: what counts as alike, what is kept, and who looks."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ship_ds.api import Ship
from ship_ds.config import parse_config
from ship_ds.data.task import Example, SplitTask, Task
from ship_ds.inference.bank import Bank
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.derived import Derived, keep_examples_of
from ship_ds.inference.example_index import ExampleIndex
from ship_ds.inference.induction import induce_many, searches_of
from ship_ds.inference.reasoning import _better
from ship_ds.inference.results import Induction, score
from ship_ds.inference.scoring import fit_of_latents
from ship_ds.inference.search_state import Proposal, SearchState
from ship_ds.inference.trials import test_proposals as try_proposals
from tests.inference.test_language import EXAMPLES, QUICK, WRITTEN

PAIRS = {
    "count the letters": [("the letter a in: a banana", "3"), ("the letter o in: no", "1")],
    "answer the question": [("who was born first? Ada", "yes"), ("was Ada born? no", "no")],
    "翻译": [("今天天气很好", "good weather"), ("天气不好", "bad weather")],
}


def tasks_of(pairs: dict[str, list[tuple[str, str]]]) -> list[SplitTask]:
    rows = [(text, tuple(Example(*pair) for pair in some)) for text, some in pairs.items()]
    return [SplitTask(Task(text, text, shown), shown, ()) for text, shown in rows]


def nearest(index: ExampleIndex, *pairs: tuple[str, str], count: int = 1) -> list[str]:
    rows = index.nearest([[Example(*pair) for pair in pairs]], count)[0]
    return [index.instructions[row] for row in rows]


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        (("The LETTER e in: eel", "2"), "count the letters"),
        (("where did she live?", "Rome"), "answer the question"),
        (("xyzzy", "NO"), "answer the question"),
        (("明天天气", "weather"), "翻译"),
        (("ｌｅｔｔｅｒ", ""), "count the letters"),
    ],
)
def test_a_task_is_found_by_words_and_marks_however_written(
    pair: tuple[str, str], text: str
) -> None:
    assert nearest(ExampleIndex.of_tasks(tasks_of(PAIRS)), pair) == [text]


def test_what_is_said_in_inputs_and_in_targets_is_not_the_same() -> None:
    index = ExampleIndex.of_tasks(tasks_of({"a": [("red", "x1")], "b": [("y1", "red")]}))
    assert nearest(index, ("red", "z1"), count=9) == ["a"]
    assert nearest(index, ("z1", "red"), count=9) == ["b"]


def test_neighbouring_words_tell_an_order() -> None:
    index = ExampleIndex.of_tasks(tasks_of({"up": [("1 2 3", "")], "down": [("3 2 1", "")]}))
    assert nearest(index, ("3 2 1", ""), count=2) == ["down", "up"]
    assert nearest(index, ("1 2 3", ""), count=2) == ["up", "down"]


def test_a_rare_word_weighs_more_than_one_of_all_tasks() -> None:
    common = {f"task {i}": [("sentence sentence sentence", f"t{i}")] for i in range(6)}
    index = ExampleIndex.of_tasks(tasks_of({**common, "rare": [("sentence zebra", "u")]}))
    assert nearest(index, ("a zebra in a sentence", "?")) == ["rare"]


def test_what_has_no_word_in_common_is_left_out_and_equals_stay_in_order() -> None:
    index = ExampleIndex.of_tasks(tasks_of({"a": [("red", "1")], "b": [("red", "1")]}))
    assert nearest(index, ("red", "2"), count=9) == ["a", "b"]
    assert index.nearest([[Example("blue", "2")], [Example("red", "1")]], 9) == [[], [0, 1]]
    assert nearest(index, ("", ""), count=9) == []


def test_tasks_with_one_instruction_are_one_row_and_one_without_examples_is_none() -> None:
    one, other, third = tasks_of({"a": [("red", "1")], "b": [("blue", "1")], "c": []})
    same = SplitTask(Task("other", "a", ()), other.train, ())
    index = ExampleIndex.of_tasks([one, same, third])
    assert index.instructions == ("a",)
    assert nearest(index, ("blue", "2")) == ["a"] == nearest(index, ("red", "2"))


def test_of_no_tasks_nothing_is_alike() -> None:
    nobody = ExampleIndex.of_tasks([])
    assert nobody.instructions == () and nobody.nearest([[Example("red", "1")]], 3) == [[]]
    index = ExampleIndex.of_tasks(tasks_of(PAIRS))
    assert index.nearest([], 3) == [] and index.nearest([[]], 3) == [[]]


def test_only_training_examples_are_read(tmp_path: Path) -> None:
    example = Example("zebra", "1")
    hidden = SplitTask(Task("t", "hidden", (example,)), (), (example,))
    seen = SplitTask(Task("s", "seen", (example,)), (Example("horse", "1"),), (example,))
    assert nearest(ExampleIndex.of_tasks([hidden, seen]), ("zebra", "2"), count=9) == []


def test_an_index_is_kept_without_the_data_in_clear(tmp_path: Path) -> None:
    index = ExampleIndex.of_tasks(tasks_of(PAIRS))
    kept = Derived(tmp_path, "a", "float32")
    kept.keep_example_index(index)
    again = Derived(tmp_path, "of other weights", "bfloat16").example_index([*PAIRS, "more"])
    assert again is not None and again.instructions == index.instructions
    assert (again.counts != index.counts).nnz == 0
    assert nearest(again, ("the letter a in: aa", "2"), count=3) == nearest(
        index, ("the letter a in: aa", "2"), count=3
    )
    content = (tmp_path / "derived" / "known_examples.safetensors").read_bytes()
    assert b"count the letters" in content and b"banana" not in content
    assert Derived(tmp_path, "a", "float32").example_index(list(PAIRS)[:2]) is None, "other tasks"


@pytest.mark.parametrize(
    "fault", ["version", "rows", "column", "order", "count", "missing", "cut", "text"]
)
def test_a_file_that_is_no_index_is_made_again(tmp_path: Path, fault: str) -> None:
    index = ExampleIndex.of_tasks(tasks_of(PAIRS))
    kept = Derived(tmp_path, "a", "float32")
    kept.keep_example_index(index)
    path = tmp_path / "derived" / "known_examples.safetensors"
    assert kept.example_index(list(PAIRS)) is not None
    arrays, metadata = load_file(path), index.metadata()
    match fault:
        case "version":
            metadata["version"] = "0"
        case "rows":
            metadata["instructions"] = json.dumps(["count the letters"])
        case "column":
            arrays["features"][0] = 2**30
        case "order":
            arrays["ends"] = arrays["ends"][::-1].copy()
        case "count":
            arrays["counts"][0] = -3
        case "missing":
            del arrays["counts"]
        case "text":
            metadata["instructions"] = "[1"
    save_file(arrays, path, metadata)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    assert kept.example_index(list(PAIRS)) is None


def test_a_bundle_of_written_tasks_gets_one_and_a_grammar_none(tmp_path: Path) -> None:
    keep_examples_of(tasks_of(PAIRS), tmp_path / "written")
    assert Derived(tmp_path / "written", "", "").example_index(list(PAIRS)) is not None
    grammar = {f"add {i}": [("1", "2")] for i in range(9)}
    keep_examples_of(tasks_of(grammar), tmp_path / "grammar")
    assert not (tmp_path / "grammar").exists()


WRITTEN_TASKS = tasks_of(
    {
        WRITTEN[0]: [("8 8", "11 11")],
        WRITTEN[1]: [("7 5 7", "7 7")],
        WRITTEN[2]: [("3 4 9", "4 3"), ("1 2 5", "2 1")],
        WRITTEN[3]: [("8 6", "6 8")],
    }
)


@pytest.fixture
def written(ship: Ship) -> Ship:
    """The run as if people had written its instructions, without their examples at hand."""
    data = {"kind": "files", "path": "/nowhere"}
    config = parse_config({**ship.config.model_dump(), "data": data}, "test")
    return Ship(ship.model, config, ship.digest, WRITTEN)


@pytest.mark.slow
def test_a_search_tests_what_has_such_examples_and_not_what_the_decoder_likes(
    written: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def likes(bank: Bank, model: object, views: Sequence[object], count: int) -> list[list[int]]:
        asked.append(len(views))
        return [[3] for _ in views]

    monkeypatch.setattr(Bank, "shortlist_read", likes)
    more = {"num_known": 2, "num_finalists": 20, "ranks_in_prompt": False, "num_rounds": 0}
    search = InductionConfig.model_validate({**QUICK, **more, "num_read": 0})
    bank = written.bank_to_search(search, seen=WRITTEN_TASKS)
    odd = [Example("q", "w"), Example("e", "r"), Example("t", "y")]
    found = induce_many(written.model, bank, [EXAMPLES, odd], search)
    known = [{c.instruction for c in one.candidates if c.origin == "known"} for one in found]
    assert known == [{WRITTEN[2], WRITTEN[1]}, {WRITTEN[3]}]
    assert asked == [1], "of the task alone that has no word in common with a known one"
    for candidate in found[0].candidates:
        if candidate.origin == "known":
            own = bank.latent_CZ[bank.instructions.index(candidate.instruction)]
            assert candidate.latent == tuple(own.tolist()), "it is not encoded again"

    without = search.model_copy(update={"by_examples": False})
    bank = written.bank_to_search(without, seen=WRITTEN_TASKS)
    assert bank.index is None
    (one,) = induce_many(written.model, bank, [EXAMPLES], without)
    assert {c.instruction for c in one.candidates if c.origin == "known"} == {WRITTEN[3]}
    assert {c.score for c in one.candidates} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("in_prompt", [False, True])
def test_resemblance_counts_beside_what_a_text_answers(written: Ship, in_prompt: bool) -> None:
    """In the ways of using it that are tried, and where a text is screened as where it is
    chosen."""
    more = {"num_known": 2, "num_finalists": 3, "num_rounds": 0, "ranks_in_prompt": in_prompt}
    search = InductionConfig.model_validate({**QUICK, **more})
    bank = written.bank_to_search(search, seen=WRITTEN_TASKS)
    assert bank.index is not None
    alike = dict(zip(WRITTEN, bank.index.resemblance([EXAMPLES])[0].tolist(), strict=True))
    assert 1 > alike[WRITTEN[2]] > 0.5 > alike[WRITTEN[1]] > 0 == alike[WRITTEN[0]]
    (found,) = induce_many(written.model, bank, [EXAMPLES], search)
    for one in found.candidates:
        rights = [one.num_right, one.num_right_in_prompt] if in_prompt else [one.num_right]
        losses = [one.loss, one.loss_in_prompt] if in_prompt else [one.loss]
        right = fmean(n / 3 for n in rights if n is not None)
        assert one.score is not None
        rest = one.score - alike.get(one.instruction, 0) - 0.5 * right
        # Targets of two, two and one numbers, each with its end: the mean over examples of nats a
        # token lies between their mean over the longest and over the shortest.
        loss = fmean(loss for loss in losses if loss is not None)
        assert -0.05 * loss / 2 < rest < -0.05 * loss / 3
    order = [one.score for one in found.candidates]
    assert order == sorted(order, key=lambda value: -(value or 0)) and len(order) == 3
    assert found.instruction == found.candidates[0].instruction == WRITTEN[2]

    text = WRITTEN[2]
    fit = fit_of_latents(written.model, written.model.encode([text]), [text], [EXAMPLES])
    by_token = [loss / size for loss, size in zip(fit.loss_CM[0].tolist(), (3, 3, 2), strict=True)]
    if not in_prompt:
        share = float(fit.right_CM.float().mean())
        expected = alike[text] + 0.5 * share - 0.05 * fmean(by_token)
        assert found.candidates[0].score == pytest.approx(expected, abs=1e-4)

    # Told that another one is the most alike, the search keeps and chooses that.
    other, size = WRITTEN[0], (3, 3, 2)
    state = SearchState(tuple(EXAMPLES), resemblance={other: 30.0, text: 0.1}, num_tokens=size)
    proposals = [Proposal(state, one, "known") for one in (text, other, *WRITTEN[1:2])]
    narrow = search.model_copy(update={"num_finalists": 1})
    try_proposals(written.model, [state], proposals, narrow)
    assert list(state.tested) == [other] and state.result().instruction == other


def test_a_score_of_no_finite_loss_comes_last() -> None:
    assert score(0.9, 1.0, math.nan) == score(0.9, 1.0, math.inf) == -math.inf
    assert score(0.4, 0.2, 2.0) == pytest.approx(0.4 + 0.1 - 0.1)


@pytest.mark.slow
def test_tasks_of_a_group_have_their_own_resemblance(written: Ship) -> None:
    search = InductionConfig()
    bank = written.bank_to_search(search, seen=WRITTEN_TASKS)
    other = [Example("8 6", "6 8")]
    first, second = searches_of(written.model, bank, [EXAMPLES, other], search)
    for state, text in ((first, WRITTEN[2]), (second, WRITTEN[3])):
        assert state.resemblance is not None
        assert max(state.resemblance, key=state.resemblance.__getitem__) == text
    assert (first.num_tokens, second.num_tokens) == ((3, 3, 2), (3,))
    for config in (InductionConfig(method="bank"), InductionConfig(method="propose")):
        (state,) = searches_of(written.model, bank, [EXAMPLES], config)
        assert state.resemblance is None


@pytest.mark.slow
def test_of_two_rounds_the_text_stays_that_the_search_would_choose(
    written: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By resemblance too where that is compared, else by exact answers and then by loss."""
    config = InductionConfig()
    alike, other = WRITTEN[2], WRITTEN[0]
    indexed = written.bank_to_search(config, seen=WRITTEN_TASKS)
    fit = fit_of_latents(
        written.model, written.model.encode([alike, other]), [alike, other], [EXAMPLES] * 2
    )
    ranks = [
        (-int(right_M.sum()), float(loss_M.sum()))
        for right_M, loss_M in zip(fit.right_CM, fit.loss_CM, strict=True)
    ]
    by_answers = min(zip(ranks, (alike, other), strict=True))[1]

    def chosen(bank: Bank) -> set[str]:
        pairs = [
            [Induction(text, (), (), 0, 3) for text in pair]
            for pair in ((alike, other), (other, alike))
        ]
        found = [
            _better(written.model, bank, [EXAMPLES], [before], [after], config)[0].instruction
            for before, after in pairs
        ]
        # All at once as each alone.
        before, after = (list(texts) for texts in zip(*pairs, strict=True))
        both = _better(written.model, bank, [EXAMPLES] * 2, before, after, config)
        assert [one.instruction for one in both] == found
        return set(found)

    assert chosen(written.bank) == {by_answers}
    # More than any answer counts, for one and for the other.
    for text in (alike, other):
        like_its_own = {one: 30.0 * (one == text) for one in WRITTEN}
        monkeypatch.setattr(
            ExampleIndex,
            "resemblance",
            lambda self, tasks, only=like_its_own: np.array(
                [[only[one] for one in self.instructions] for _ in tasks]
            ),
        )
        assert chosen(indexed) == {text}


@pytest.mark.slow
def test_the_index_is_made_once_a_run(written: Ship, monkeypatch: pytest.MonkeyPatch) -> None:
    first = written.bank_to_search(InductionConfig(), seen=WRITTEN_TASKS)
    monkeypatch.setattr(ExampleIndex, "of_tasks", lambda *rest: pytest.fail("again"))
    assert written.bank_to_search(InductionConfig(), seen=WRITTEN_TASKS) is first


@pytest.mark.slow
def test_where_the_examples_are_nowhere_it_is_said_once(written: Ship) -> None:
    said: list[str] = []
    for _ in range(2):
        assert written.bank_to_search(InductionConfig(), said.append).index is None
    assert said == [
        "the run's data are not where they were: no known task is found by its examples"
    ]


@pytest.mark.slow
def test_examples_are_read_once_and_kept_with_the_bundle(
    ship: Ship, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_read = 0

    def read(self: Ship) -> Sequence[SplitTask]:
        nonlocal num_read
        num_read += 1
        return WRITTEN_TASKS

    monkeypatch.setattr(Ship, "_seen", read)
    for _ in range(2):
        opened = Ship(
            ship.model, ship.config, "", WRITTEN, derived=Derived(tmp_path, "", "float32")
        )
        for _ in range(2):
            index = opened.bank_to_search(InductionConfig()).index
            assert index is not None and index.instructions == WRITTEN
    assert num_read == 1
    assert np.array_equal(index.nearest([EXAMPLES], 1), [[2]])
    said: list[str] = []
    other = Ship(ship.model, ship.config, "", WRITTEN[:3])
    assert other.bank_to_search(InductionConfig(), said.append).index is None
    assert said == ["the run's data are others now: no known task is found by its examples"]


@pytest.mark.slow
def test_a_search_among_texts_of_a_grammar_reads_no_examples(
    ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ship, "_seen", lambda self: pytest.fail("read"))
    assert ship.bank_to_search(InductionConfig()) is ship.bank
    assert ship.bank_to_search(InductionConfig(method="bank")) is ship.bank
    assert not InductionConfig(method="propose").searches_by_examples(0)
    assert InductionConfig().searches_by_examples(0.49)
    assert not InductionConfig().searches_by_examples(0.5)
