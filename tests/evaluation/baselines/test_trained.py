"""What holds for every trained baseline: directions, seeds, gradients, and weights that are
kept."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ship_ds.api import Ship
from ship_ds.data.sampler import balanced
from ship_ds.data.task import Splits
from ship_ds.evaluation.baselines import TRAINED
from ship_ds.evaluation.baselines.sft import Sft
from ship_ds.evaluation.cells import cells_of
from ship_ds.evaluation.method import Deduces, Induces, Reasons

pytestmark = pytest.mark.slow

Make = Callable[..., Any]
DIRECTIONS = {
    "sft": [Deduces],
    "prompt_tuning": [Deduces, Reasons],
    "tagi": [Deduces],
    "text_to_lora": [Deduces],
    "itd": [Induces],
}
every_method = pytest.mark.parametrize("method", TRAINED, ids=lambda method: method.name)


def asked_in_each_direction(method: Any, splits: Splits) -> list[Any]:
    tasks = splits.seen[:3]
    inputs = [[e.input for e in task.test[: 1 + t]] for t, task in enumerate(tasks)]
    shown = [task.train[: 2 + t % 2] for t, task in enumerate(tasks)]
    said: list[Any] = []
    if isinstance(method, Deduces):
        said.append(method.deduce(tasks, [task.task.instruction for task in tasks], inputs))
        assert [len(row) for row in said[-1]] == [1, 2, 3]
    if isinstance(method, Reasons):
        said.append(method.reason(shown, inputs))
        assert [len(row) for row in said[-1]] == [1, 2, 3]
    if isinstance(method, Induces):
        said.append(method.induce(shown))
        assert len(said[-1]) == 3 and all(isinstance(text, str) for text in said[-1])
    return said


def test_names_and_directions(make: Make) -> None:
    found = {
        method.name: [way for way in (Deduces, Reasons, Induces) if isinstance(make(method), way)]
        for method in TRAINED
    }
    assert found == DIRECTIONS
    # What the harness asks of it: a method of another name would be taken for a direction.
    asked = {
        method.name: {cell.direction for cell in cells_of(method, ["unseen"], [5])}
        for method in TRAINED
    }
    names = {Deduces: "deduction", Reasons: "reasoning", Induces: "induction"}
    assert asked == {name: {names[way] for way in ways} for name, ways in DIRECTIONS.items()}
    assert [method.name for method in TRAINED if method.states_instruction] == ["sft"]


@every_method
def test_trained_once_then_loaded_with_the_same_answers(
    method: Any, make: Make, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(method)
    untrained = {name: tensor.clone() for name, tensor in first.module.state_dict().items()}
    first.prepare()
    trained = first.module.state_dict()
    assert any(not torch.equal(trained[name], tensor) for name, tensor in untrained.items())
    monkeypatch.setattr(method, "train", lambda self: pytest.fail("trained again"))
    second = make(method)
    assert all(
        torch.equal(tensor, untrained[name]) for name, tensor in second.module.state_dict().items()
    )
    second.prepare()
    assert all(
        torch.equal(tensor, trained[name]) for name, tensor in second.module.state_dict().items()
    )
    assert asked_in_each_direction(second, splits) == asked_in_each_direction(first, splits)
    assert not list(tmp_path.glob("**/*.part"))


@every_method
def test_seed_decides_the_weights_and_the_base_is_left_alone(
    method: Any, make: Make, ship: Ship
) -> None:
    before = {
        name: weight.detach().clone() for name, weight in ship.model.task_llm.lm.named_parameters()
    }
    state = torch.get_rng_state()
    runs = [make(method, steps=2, seed=seed) for seed in (0, 0, 1)]
    for run in runs:
        with torch.random.fork_rng():
            torch.manual_seed(run.setting.seed)
            run.train()
    assert torch.equal(torch.get_rng_state(), state)
    weights = [
        torch.cat([tensor.flatten() for tensor in run.module.state_dict().values()]) for run in runs
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    for name, weight in ship.model.named_parameters():
        assert weight.grad is None, name
    assert all(
        torch.equal(weight, before[name])
        for name, weight in ship.model.task_llm.lm.named_parameters()
    )
    assert not {id(p) for p in runs[0].module.parameters()} & {
        id(p) for p in ship.model.task_llm.parameters()
    }


def test_baselines_meet_families_as_ship_does(
    make: Make, ship: Ship, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ship.config.training.model_copy(update={"family_alpha": 0.5})
    monkeypatch.setattr(ship, "config", ship.config.model_copy(update={"training": training}))
    assert make(Sft).sampler.tasks == balanced(splits.seen, 0.5) != splits.seen


def test_baselines_balance_labels_as_ship_does(
    make: Make, ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored for a run that does not is taken for its own still."""
    plain = make(Sft)
    assert not plain.sampler.balances_labels and "labels" not in plain._identity()
    training = ship.config.training.model_copy(update={"balances_labels": True})
    monkeypatch.setattr(ship, "config", ship.config.model_copy(update={"training": training}))
    assert (
        make(Sft).sampler.balances_labels
        and make(Sft)._identity()["labels"] == "balanced where enough"
    )


def test_weights_for_something_else_are_trained_again(
    make: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make(Sft, steps=1).prepare()
    make(Sft, steps=2).prepare()
    assert "other budget; training sft again" in capsys.readouterr().err
    make(Sft, steps=2, seed=1).prepare()
    assert "other seed; training sft again" in capsys.readouterr().err
    path = tmp_path / "a" / "weights" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    make(Sft, steps=2, seed=1).prepare()
    assert "the file is not the one in its manifest; training sft again" in capsys.readouterr().err
    make(Sft, steps=2, seed=1).prepare()
    assert "again" not in capsys.readouterr().err
    path.unlink()
    make(Sft, steps=2, seed=1).prepare()
    assert "weights.safetensors is missing; training sft again" in capsys.readouterr().err
    path.with_name("manifest.json").write_text('{"method": "sft",')
    make(Sft, steps=2, seed=1).prepare()
    assert "manifest.json is damaged; training sft again" in capsys.readouterr().err


def test_weights_that_a_version_before_wrote_are_found(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest as versions up to 0.2.0 write it, with nothing in it that they have not."""
    run = make(Sft)
    folder = tmp_path / "a" / "weights"
    folder.mkdir(parents=True)
    weights = {name: tensor + 1 for name, tensor in run.module.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    manifest = run._identity() | {"train_seconds": 1.0, "costs": {}, "sha256": digest}
    expected = {"method", "training", "recipe", "budget", "seed", "step", "seen", "base"}
    assert manifest.keys() == expected | {"train_seconds", "costs", "sha256"}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    monkeypatch.setattr(Sft, "train", lambda self: pytest.fail("trained again"))
    run.prepare()
    assert all(torch.equal(one, weights[name]) for name, one in run.module.state_dict().items())


@every_method
def test_weights_whose_later_stages_had_their_own_share_alone_are_trained_again(
    method: Any, make: Make
) -> None:
    """Of baselines that train in stages; those of others stay."""
    run = make(method)
    run._folder.mkdir(parents=True)
    recipe = {key: number for key, number in method.numbers().items() if key != "stages"}
    manifest = run._identity() | {"recipe": recipe}
    (run._folder / "manifest.json").write_text(json.dumps(manifest) + "\n")
    in_stages = method.name in ("tagi", "text_to_lora", "itd")
    expected = "other recipe" if in_stages else "weights.safetensors is missing"
    assert run._why_not_these() == expected


@pytest.mark.parametrize(
    "method", [m for m in TRAINED if m.name != "itd"], ids=lambda method: method.name
)
def test_instruction_is_in_the_question_only_where_the_class_says_so(
    method: Any, make: Make, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(method)
    questions: list[Any] = []
    monkeypatch.setattr(run.base, "answer", lambda rows, *rest: questions.extend(rows))
    task = splits.seen[0]
    run.deduce([task], ["reverse the list"], [["1 2"]])
    stated = run.base.prompts.task_prompt(
        "1 2", "reverse the list" if method.states_instruction else None
    )
    assert questions == [[stated]]
