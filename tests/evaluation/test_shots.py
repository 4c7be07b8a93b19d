"""Examples after the instruction in the prompts of `prompting` and `sft`: which, where, and said in
their rows."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from ship_ds.api import Ship
from ship_ds.data.task import Example, Splits
from ship_ds.errors import UserError
from ship_ds.evaluation.baselines.sft import Sft, SftRecipe
from ship_ds.evaluation.config import HarnessConfig
from ship_ds.evaluation.evaluate import evaluate
from ship_ds.evaluation.harness import _changed
from ship_ds.evaluation.method import Setting
from ship_ds.evaluation.methods.prompting import Prompting
from ship_ds.evaluation.questions import READ_DRAW, ask, examples_to_read
from ship_ds.evaluation.shots import prompt_with_shots
from ship_ds.inference.deduction import Answerer
from tests.evaluation.baselines.conftest import make, ship, splits
from tests.evaluation.test_harness import fresh

pytestmark = pytest.mark.slow

__all__ = ["make", "ship", "splits"]

Make = Callable[..., Any]


def prompting(count: int) -> Any:
    return _changed("prompting", [f"num_examples={count}"])


def test_a_row_says_that_it_sees_examples_and_how_many() -> None:
    for name, plain in (("prompting", Prompting), ("sft", Sft)):
        three: Any = _changed(name, ["num_examples=3"])
        assert three.sees_labels and not plain.sees_labels
        assert three.about == f"{plain.about}, and up to 3 of the task's training examples after it"
        none: Any = _changed(name, ["num_examples=0"])
        assert not none.sees_labels and none.about == plain.about


def test_without_examples_cells_and_weights_are_those_of_earlier_versions() -> None:
    drawn = {"num_examples": 2, "draw": READ_DRAW}
    assert Prompting.settings() == {} and prompting(2).settings() == drawn
    assert Sft.numbers() == {"lr": 2e-3}
    two: Any = _changed("sft", ["num_examples=2"])
    assert two.settings() == {**Sft.settings(), **drawn, "recipe": two.numbers()}
    assert two.numbers() == {"lr": 2e-3, "num_examples": 2}, "weights are found by what trains them"


def test_fewer_examples_are_among_more_and_those_that_are_shown(splits: Splits) -> None:
    """Of a long task too, of which `random.sample` of few is now and then no part of one of many:
    of 60 examples in one of ten draws."""
    examples = tuple(Example(str(i), str(i)) for i in range(60))
    for task in (splits.seen[0], replace(splits.seen[0], train=examples)):
        for seed in range(50):
            most = examples_to_read(task, 6, seed)
            assert most == ask(task, 6, seed).shown
            fewer = [examples_to_read(task, n, seed) for n in range(6)]
            assert fewer == [most[:n] for n in range(6)]


def test_bad_numbers_are_one_line() -> None:
    for change, message in (
        (("prompting", "num_examples=-1"), "--set prompting.num_examples: .*greater than or equal"),
        (("sft", "num_examples=33"), "--set sft.num_examples: .*less than or equal to 32"),
    ):
        with pytest.raises(UserError, match=message):
            _changed(change[0], [change[1]])
    with pytest.raises(UserError, match="num_examples is of our own prompt"):
        _changed("prompting", ["prompt=published", "num_examples=1"])


def test_prompts_hold_the_instruction_the_examples_and_the_input(
    ship: Ship, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked and scored alike; of a task with fewer examples, those that it has."""
    tasks, asked = splits.seen[:2], list[Sequence[int]]()
    monkeypatch.setattr(
        Answerer, "answers", lambda self, rows, *rest: asked.extend(chain(*rows)) or [["", ""]] * 2
    )
    setting = Setting(ship, splits, Path(), None, 5)
    method = prompting(2)(setting)
    wordings = [task.task.instruction for task in tasks]
    method.deduce(tasks, wordings, [["1 2"], ["3"]])
    shots = [examples_to_read(task, 2, 5) for task in tasks]
    assert [len(some) for some in shots] == [2, 2]
    assert all(one in task.train for task, some in zip(tasks, shots, strict=True) for one in some)
    prompts = ship.model.prompts
    assert asked == [
        prompts.task_prompt(text, wording, some)
        for text, wording, some in zip(["1 2", "3"], wordings, shots, strict=True)
    ]
    assert asked[0] != prompts.task_prompt("1 2", wordings[0])
    many = examples_to_read(tasks[0], 32, 5)
    assert sorted(many, key=repr) == sorted(tasks[0].train, key=repr)
    one = [[Example("4 5", "5")], [Example("4 5", "5")]]
    with_shots = method.answer_losses(tasks, wordings, one)
    without = Prompting(setting).answer_losses(tasks, wordings, one)
    assert all(a != b for a, b in zip(chain(*with_shots), chain(*without), strict=True))


def test_what_the_context_has_no_room_for_is_left_out(
    ship: Ship, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    shots = examples_to_read(splits.seen[0], 4, 0)
    whole = prompt_with_shots(ship, "1 2", "reverse", shots)
    lm = ship.model.task_llm.language_model
    room = len(whole) + ship.config.evaluation.max_new_tokens
    monkeypatch.setattr(type(lm), "context_length", property(lambda self: room - 1))
    assert prompt_with_shots(ship, "1 2", "reverse", shots) == ship.model.prompts.task_prompt(
        "1 2", "reverse", shots[:3]
    )
    # A target that is longer than an answer may be is scored within the context, too.
    prompts, target = ship.model.prompts, "9 " * 24
    prompt_of = [prompts.task_prompt("1 2", "reverse", shots[:count]) for count in range(5)]
    fitting = [one for one in prompt_of if len(one) + len(prompts.target(target)) < room]
    assert 0 < len(fitting) < 4, "fewer shots than beside an answer"
    assert prompt_with_shots(ship, "1 2", "reverse", shots, target) == fitting[-1]


def test_sft_trains_on_up_to_as_many_and_never_on_what_is_answered(
    make: Make, ship: Ship, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sft, "recipe", SftRecipe(num_examples=3))
    prompts, by_instruction = ship.model.prompts, {t.task.instruction: t for t in splits.seen}
    seen: list[tuple[str, str, tuple[Example, ...]]] = []

    def task_prompt(text: str, instruction: str, shots: Sequence[Example] = ()) -> Any:
        seen.append((text, instruction, tuple(shots)))
        return plain(text, instruction, shots)

    plain = prompts.task_prompt
    monkeypatch.setattr(type(prompts), "task_prompt", lambda self, *args: task_prompt(*args))
    run = make(Sft, steps=8)
    run.train()
    assert {len(shots) for _, _, shots in seen} == {0, 1, 2, 3}
    for text, instruction, shots in seen:
        assert text not in {one.input for one in shots}
        if instruction in by_instruction:
            assert set(shots) <= set(by_instruction[instruction].train)
    seen.clear()
    task = splits.seen[0]
    run.deduce([task], ["reverse the list"], [["1 2"]])
    assert seen == [("1 2", "reverse the list", examples_to_read(task, 3, 0))]


def test_the_report_says_it_of_the_row(one_rank_run: Path, tmp_path: Path) -> None:
    run = fresh(one_rank_run, tmp_path / "run")
    config = HarnessConfig(
        methods=("prompting",),
        directions=("deduction",),
        parts=("seen",),
        num_tasks=2,
        changes=("prompting.num_examples=2",),
    )
    report = evaluate(run, config, ["evaluate"], lambda line: None)
    row = report["methods"]["prompting"]
    assert row["sees_labels"] and "up to 2 of the task's training examples" in row["about"]
    cell = json.loads((run / "evaluation" / "cells" / "prompting.deduction.seen.json").read_text())
    assert cell["fingerprint"]["num_examples"] == 2
