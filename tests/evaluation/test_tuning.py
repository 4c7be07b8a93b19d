"""`ship-ds tune` on a run that version 0.1.0 trained for three steps, whose base is tiny: the two
starts, what is trained on, the folder that is left."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ship_ds import cli
from ship_ds.api import Ship
from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.evaluation import tuning
from ship_ds.evaluation.baselines import oracles
from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.evaluation.tuning import Curve, Recipe, parted, tune
from ship_ds.export.peft_adapter import live_logits
from ship_ds.export.tuned import export_tuned
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.adapters.combination import CombinedAdapter
from ship_ds.model.adapters.lora import LoraAdapter
from tests.export.models import make_base, make_ship

RUN = Path("tests/fixtures/v0_1/run")
"""It names its base by a path from the root of the repository, where the tests stand."""
INSTRUCTION = "put 7 at the front"
PAIRS = [(f"{i} {j}", f"7 {i} {j}") for i in range(4) for j in range(5)]
RECIPE = Recipe(steps=30, lr=1e-2, held_out_share=0.2, seed=0)


@pytest.fixture(scope="module")
def ship() -> Ship:
    return Ship.from_run(RUN, "cpu")


def nats_a_token(ship: Ship, adapter: Adapter, examples: Sequence[Example]) -> float:
    """By another route than training's: the likelihoods that the baselines are scored by."""
    base = FrozenBase.of_run(ship)
    prompts = [ship.model.question(example.input) for example in examples]
    targets = [example.target for example in examples]
    tokens = sum(len(base.prompts.target(text)) for text in targets)
    return float(-base.log_likelihoods(adapter, prompts, targets).sum() / tokens)


@torch.no_grad()
def nats_by_logits(ship: Ship, adapter: Adapter, examples: Sequence[Example]) -> float:
    """The same of each example alone, by the logits of `peft`'s proof."""
    total = count = 0.0
    for example in examples:
        prompt = list(ship.model.question(example.input))
        target = list(ship.model.prompts.target(example.target))
        logits_SV = live_logits(ship, adapter, prompt + target)[len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits_SV, torch.tensor(target))) * len(
            target
        )
        count += len(target)
    return total / count


@pytest.mark.slow
def test_it_starts_at_the_generated_adapter_and_at_pefts_start(ship: Ship) -> None:
    tuned = tune(ship, INSTRUCTION, PAIRS, RECIPE, with_fresh=True)
    assert tuned.fresh is not None and (tuned.num_examples, tuned.num_held_out) == (16, 4)
    _, held_out = parted([Example(*pair) for pair in PAIRS], 0.2, 0)
    generated = ship.model.adapt(ship.model.encode([INSTRUCTION]))
    assert isinstance(generated, LoraAdapter)
    assert tuned.curve.first == pytest.approx(nats_a_token(ship, generated, held_out), rel=1e-5)
    nothing = replace(generated, factors={p: (a, b * 0) for p, (a, b) in generated.factors.items()})
    bare = nats_a_token(ship, nothing, held_out)
    assert tuned.fresh.first == pytest.approx(bare, rel=1e-5), "B is zero at peft's start"
    assert tuned.curve.last == pytest.approx(nats_a_token(ship, tuned.adapter, held_out), rel=1e-5)
    for curve in (tuned.curve, tuned.fresh):
        assert len(curve.training) == 30 and curve.last < curve.first
        assert min(curve.held_out) == 0 and len(curve.held_out) == 21
    again = tune(ship, INSTRUCTION, PAIRS, RECIPE)
    assert again.curve == tuned.curve and again.fresh is None


def test_nothing_of_the_run_is_trained_and_held_out_examples_are_not_drawn(
    ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in ship.model.state_dict().items()}
    examples = [Example(*pair) for pair in PAIRS]
    train, held_out = parted(examples, 0.2, 0)
    drawn: list[Example] = []

    def draw(examples: Sequence[Example], count: int, key: str) -> list[Example]:
        drawn.extend(examples)
        return oracles.draw(examples, count, key)

    monkeypatch.setattr(tuning, "draw", draw)
    tune(ship, INSTRUCTION, PAIRS, replace(RECIPE, steps=3))
    assert set(drawn) == set(train) == set(examples) - set(held_out)
    assert all(torch.equal(before[n], value) for n, value in ship.model.state_dict().items())


def test_some_are_held_out_whatever_the_share() -> None:
    examples = [Example(str(n), str(n)) for n in range(5)]
    for share, count in ((0.01, 1), (0.4, 2), (0.99, 4)):
        train, held_out = parted(examples, share, 3)
        assert len(held_out) == count
        assert {*train, *held_out} == set(examples) and len(train) + count == 5
    assert parted(examples, 0.4, 3) == parted(examples, 0.4, 3) != parted(examples, 0.4, 4)
    with pytest.raises(UserError, match="--data: has examples of one input; give two inputs"):
        parted(examples[:1], 0.5, 0)


def test_an_example_that_is_given_twice_lies_on_one_side() -> None:
    examples = [Example(str(n % 5), str(n % 5)) for n in range(10)]
    train, held_out = parted(examples, 0.4, 3)
    assert (len(train), len(held_out)) == (3, 2) and not {*train} & {*held_out}
    with pytest.raises(UserError, match="--data: has examples of one input; give two inputs"):
        parted([examples[0]] * 3, 0.5, 0)


def test_curve_counts_the_steps_to_a_loss() -> None:
    curve = Curve("generated", (2.0, 1.5, 1.0), {0: 2.5, 2: 1.25, 3: 1.0})
    assert [curve.steps_to(loss) for loss in (3.0, 2.5, 2.0, 1.0, 0.5)] == [0, 0, 2, 3, None]
    assert curve.rows()[:3] == [
        {"start": "generated", "step": 0, "training_loss": None, "held_out_loss": 2.5},
        {"start": "generated", "step": 1, "training_loss": 2.0, "held_out_loss": None},
        {"start": "generated", "step": 2, "training_loss": 1.5, "held_out_loss": 1.25},
    ]


@pytest.mark.slow
def test_it_leaves_a_proved_folder_with_its_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`explain` reads it as any LoRA of this base."""
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"input": x, "target": y}) + "\n" for x, y in PAIRS))
    command = ["tune", "--run", str(RUN), "--from", INSTRUCTION, "--data", str(data)]
    command += ["--out", str(out), "--steps", "30", "--lr", "0.01", "--fresh", "--device", "cpu"]
    assert cli.main([*command, "--pad-to", "4"]) == 0
    first, second, third, proved = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in (out / "tune.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 31
    last = {row["start"]: row["held_out_loss"] for row in rows if row["step"] == 30}
    at_start = {row["start"]: row["held_out_loss"] for row in rows if row["step"] == 0}
    for line, start in ((first, "generated"), (second, "fresh")):
        losses = f"{at_start[start]:.3f} at step 0, {last[start]:.3f} at step 30"
        assert line == f"{start} start: loss of 4 held-out examples {losses} (nats a token)"
    reached = next(
        (
            row["step"]
            for row in rows
            if row["start"] == "generated"
            and row["held_out_loss"] is not None
            and row["held_out_loss"] <= last["fresh"]
        ),
        None,
    )
    assert (f"by step {reached}: {30 - (reached or 0)} of 30 steps saved" in third) == (
        reached is not None
    )
    assert proved.startswith(f"{out}: peft = live within ")
    origin = json.loads((out / "ship.json").read_text())
    assert origin["tuning"] == {
        "start": "generated",
        "steps": 30,
        "lr": 0.01,
        "seed": 0,
        "num_examples": 16,
        "num_held_out": 4,
        "held_out_loss": [at_start["generated"], last["generated"]],
    }
    assert origin["made_from"] == INSTRUCTION and math.isfinite(origin["proof"]["from_live"])
    assert "then trained by gradient on 16 examples: 30 steps" in (out / "README.md").read_text()
    read = Ship.from_run(RUN, "cpu").model.read_adapter(out)
    assert isinstance(read, LoraAdapter) and next(iter(read.factors.values()))[0].shape[1] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"kind": "block_fusion"}, "prefix"),
        ({"kind": "soft_prompt", "num_virtual_tokens": 2, "width": 32}, "prompt"),
    ],
)
def test_of_a_combination_the_lora_is_trained_beside_the_rest(
    other: dict[str, object], name: str, tmp_path: Path
) -> None:
    """It starts from another loss than its LoRA alone, and what stands before the prompt leaves as
    it was; the fresh LoRA has nothing before its prompts."""
    lora = {"kind": "lora", "rank": 4, "alpha": 6, "width": 32}
    parts = {"kind": "combination", "parts": [lora, other]}
    ship = make_ship(make_base(tmp_path / "base"), std=0.05, **parts)
    recipe = replace(RECIPE, steps=6)
    tuned = tune(ship, INSTRUCTION, PAIRS, recipe, with_fresh=True)
    with torch.no_grad():
        generated = ship.model.adapt(ship.model.encode([INSTRUCTION]), [INSTRUCTION])
    assert isinstance(generated, CombinedAdapter) and isinstance(tuned.adapter, CombinedAdapter)
    _, held_out = parted([Example(*pair) for pair in PAIRS], 0.2, 0)
    first = nats_by_logits(ship, generated, held_out)
    assert tuned.curve.first == pytest.approx(first, rel=1e-5)
    last = nats_by_logits(ship, tuned.adapter, held_out)
    assert tuned.curve.last == pytest.approx(last, rel=1e-5)
    assert abs(first - nats_a_token(ship, generated.parts[0], held_out)) > 1e-3
    assert tuned.fresh is not None and tuned.curve.last < tuned.curve.first
    before, after = generated.parts[1].tensors(), tuned.adapter.parts[1].tensors()
    assert all(torch.equal(before[path], after[path]) for path in before)
    export_tuned(
        ship, tuned.adapter, INSTRUCTION, tuned.summary(), tuned.rows(), tmp_path / "out", ["3 9"]
    )
    assert json.loads((tmp_path / "out/ship.json").read_text())["folders"] == ["lora", name]
    assert (tmp_path / "out/tune.jsonl").is_file()
