"""The generated world keeps what its docstring promises."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ship_ds.data.readers import read_tasks
from ship_ds.data.rules import (
    FAMILIES,
    UNSEEN_FAMILIES,
    RulesConfig,
    behaviour,
    build_world,
    draw_examples,
    draw_wording,
    other_compositions,
    part_rules,
)
from ship_ds.data.task import Splits
from ship_ds.errors import UserError
from tools.write_rules import main as write_rules

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world() -> Splits:
    return build_world(RulesConfig())


def test_world_is_large_and_balanced(world: Splits) -> None:
    tasks = [*world.seen, *world.dev, *world.unseen]
    families = Counter(task.task.family for task in tasks)
    assert len(tasks) >= 1000 and len(families) >= 25
    assert max(families.values()) / len(tasks) <= 0.08
    assert len(world.unseen) >= 100 and len(world.dev) >= 50
    assert {task.kind for task in world.unseen} == {"parameter", "composition", "family"}


def test_rules_differ_on_at_least_one_fixed_input_in_twenty() -> None:
    seen, dev, unseen = part_rules(0)
    answers_UF = behaviour([*seen, *(rule for rule, _ in dev), *(rule for rule, _ in unseen)])
    for index in range(1, len(answers_UF)):
        assert (answers_UF[:index] == answers_UF[index]).mean(axis=1).max() < 0.95


def test_wordings_are_never_shared_between_rules(world: Splits) -> None:
    owners = Counter(
        text
        for task in world.seen + world.dev + world.unseen
        for text in {*task.wordings, *task.held_out_paraphrases}
    )
    assert max(owners.values()) == 1


def test_unseen_kinds_are_what_they_say(world: Splits) -> None:
    seen_families = {task.task.family for task in world.seen}
    for task in world.unseen + world.dev:
        assert (task.task.family in seen_families) == (task.kind == "parameter"), task.id
    apart = {family.name for family in UNSEEN_FAMILIES}
    assert {task.task.family for task in world.unseen if task.kind == "family"} == apart


def test_few_answers_are_trivial_and_no_test_input_is_trained_on(world: Splits) -> None:
    for part in (world.seen, world.unseen):
        tests = [example for task in part for example in task.test]
        assert np.mean([example.target in ("", example.input) for example in tests]) <= 0.1
    for task in world.seen:
        assert not {example.input for example in task.train} & {
            example.input for example in task.test
        }


def test_examples_follow_their_rule() -> None:
    rule = {family.name: family for family in FAMILIES}["keep_between"]
    assert rule.apply((1, 5, 9, 12), 5, 9) == (5, 9)
    swap = {family.name: family for family in FAMILIES}["swap"]
    assert swap.apply((1, 2, 3), 1, 3) == (3, 2, 1) and swap.apply((1, 2), 1, 3) == (1, 2)


def test_the_same_seed_gives_the_same_world(world: Splits) -> None:
    assert build_world(RulesConfig()) == world
    assert build_world(RulesConfig(seed=1)).seen[0].train != world.seen[0].train


def test_what_a_base_model_learns_besides_is_no_dev_or_unseen_rule() -> None:
    seen, dev, unseen = part_rules(0)
    held = [rule for rule, _ in dev + unseen]
    other = other_compositions(0, per_pair=12)
    assert len(other) > 200 and not {rule.name for rule in other} & {
        rule.name for rule in (*seen, *held)
    }
    assert not {rule.family for rule in other} & {
        rule.family for rule, kind in dev + unseen if kind == "composition"
    }
    assert not {step.name for rule in (*seen, *other) for step in rule.steps} & {
        rule.name for rule in held
    }
    answers_UF = behaviour([*held, *other])
    for answers_F in answers_UF[len(held) :]:
        assert (answers_UF[: len(held)] == answers_F).mean(axis=1).max() < 0.95


def test_more_compositions_are_new_seen_rules_and_change_nothing_else(world: Splits) -> None:
    more = build_world(RulesConfig(more_compositions=20))
    assert (more.dev, more.unseen) == (world.dev, world.unseen) and more.seen[
        : len(world.seen)
    ] == world.seen
    new = more.seen[len(world.seen) :]
    assert len(new) > 600 and all("+" in task.task.family for task in new)
    pairings = {task.task.family for task in more.seen}
    assert len(pairings - {task.task.family for task in world.seen}) > 20
    assert not pairings & {
        task.task.family for task in (*world.dev, *world.unseen) if task.kind == "composition"
    }
    rules = {rule.name: rule for rule in (*part_rules(0)[0], *other_compositions(0, 20))}
    test_wordings_are_never_shared_between_rules(more)
    answers_UF = behaviour([rules[task.task.id] for task in more.seen])
    for i in range(len(world.seen), len(more.seen)):
        assert (answers_UF[:i] == answers_UF[i]).mean(axis=1).max() < 0.95


def test_more_seen_rules_than_there_are_is_one_line() -> None:
    with pytest.raises(UserError, match="data.num_seen: 100000 of "):
        build_world(RulesConfig(num_seen=100_000))


def test_a_wording_is_drawn_from_those_that_training_may_show() -> None:
    rule = next(rule for rule in part_rules(0)[0] if rule.steps)
    rng = random.Random(0)
    drawn = {draw_wording(rule, rng) for _ in range(400)}
    assert drawn > set(rule.wordings) and rule.held_out not in drawn
    assert not [text for text in drawn for step in rule.steps if step.held_out in text]


def test_lists_may_be_written_and_drawn_as_in_the_list_functions(world: Splits) -> None:
    wide = {"form": "brackets", "min_length": 0, "max_length": 10, "max_value": 99, "num_seen": 40}
    drawn = build_world(RulesConfig.model_validate(wide))
    plain = {task.id: task for task in world.seen}
    inputs, small = [], 0
    for task in drawn.seen:
        assert task.wordings == plain[task.id].wordings
        assert task.test != plain[task.id].test
        for example in task.train:
            numbers, answer = json.loads(example.input), json.loads(example.target)
            assert example.input == str(numbers) and example.target == str(answer)
            inputs.append(numbers)
            small += max(numbers, default=0) <= 9
    lengths = {len(numbers) for numbers in inputs}
    assert lengths == set(range(11)) and max(map(max, filter(None, inputs))) == 99
    assert 0.45 < small / len(inputs) < 0.75  # half by the coin, short ones by chance
    by_rule = {rule.name: rule for rule in part_rules(0)[0]}
    for task in drawn.seen:
        for example in task.test:
            answer = by_rule[task.id].apply(tuple(json.loads(example.input)))
            assert json.loads(example.target) == list(answer), task.id


def test_rules_with_too_few_inputs_are_one_line() -> None:
    with pytest.raises(
        UserError, match=r"data\.max_length: .* and 58 are asked for: make it longer"
    ):
        build_world(RulesConfig(min_length=0, max_length=2))


def test_lengths_that_cross_are_one_line() -> None:
    with pytest.raises(ValueError, match="min_length: above max_length"):
        RulesConfig(min_length=5, max_length=4)


def test_drawn_inputs_are_distinct() -> None:
    rule = part_rules(0)[0][0]
    assert len({example.input for example in draw_examples(rule, 50, random.Random(0))}) == 50


def test_the_quickstart_shows_an_unseen_instruction(world: Splits) -> None:
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text()
    shown = re.search(r'ship-ds deduce "(.*)" --run runs/quickstart ', makefile)
    assert shown is not None and shown[1] in {task.task.instruction for task in world.unseen}


def test_rules_are_written_as_our_jsonl(tmp_path: Path, world: Splits) -> None:
    """Seen ones alone; and those that a smaller world lacks, without examples."""
    assert write_rules(["--out", str(tmp_path / "all.jsonl")]) == 0
    read = read_tasks(tmp_path / "all.jsonl")
    assert [(one.id, one.instruction, one.examples) for one in read] == [
        (one.id, one.task.instruction, one.train) for one in world.seen
    ]
    new = ["--out", str(tmp_path / "new.jsonl"), "--without", "seed=0", "--unlabelled"]
    assert write_rules([*new, "more_compositions=2"]) == 0
    more = read_tasks(tmp_path / "new.jsonl")
    known = {one.task.instruction for one in world.tasks}
    assert len(more) > 10 and not known & {one.instruction for one in more}
    assert not any(one.examples or one.inputs for one in more)
