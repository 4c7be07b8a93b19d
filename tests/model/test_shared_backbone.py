"""`model.backbone: shared`: one frozen base for encoder, decoder and Task LLM gives the bits of
three copies of it. Under ZeRO on two ranks: tests/runtime."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ship_ds.bundle import Bundle, write_bundle
from ship_ds.config import Config, ModelConfig, load_config
from ship_ds.data.sampler import TaskDraw
from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.ship import ShipModel
from ship_ds.prompt import describe_roles
from tests.model.models import wake_up

EXAMPLES = tuple(Example(text, text[::-1]) for text in ("3 9 5", "1 2", "8 8 1", "4"))
DRAWS = [
    TaskDraw("a", "reverse the list", EXAMPLES[:2], EXAMPLES[2:], True),
    TaskDraw("b", "put 7 at the front", EXAMPLES[2:], EXAMPLES[:1], False),
]


def config_of(backbone: str, quantisation: str, **changes: Any) -> Config:
    """Roles whose LoRAs overlap with the Task LLM's sites, and with each other's, in part."""
    encoder = {"kind": "lora", "rank": 3, "dropout": 0.2, "targets": ["up_proj", "q_proj"]}
    decoder = {"kind": "lora", "rank": 2, "dropout": 0.1, "targets": ["q_proj", "o_proj"]}
    settings = {
        "backbone": backbone,
        "latent_size": 16,
        "task_llm": {"quantisation": quantisation},
        "encoder": {"quantisation": quantisation, "tuning": encoder},
        "decoder": {"quantisation": quantisation, "tuning": decoder},
        "hypernetwork": {"kind": "lora", "rank": 2, "width": 8, "targets": ["q_proj", "down_proj"]},
    }
    overrides = [f"model.{key}={json.dumps(value)}" for key, value in (settings | changes).items()]
    return load_config("quickstart-smoke", ["run.folder=nowhere", *overrides])


def build(model: ModelConfig) -> ShipModel:
    torch.manual_seed(0)
    ship = build_ship(model, LoadedWeights())
    wake_up(ship)
    return ship.train()


def step(ship: ShipModel) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and gradients of a step, with dropout."""
    torch.manual_seed(2)
    sums = ship(ship.collate(DRAWS, 0, 0))
    sum(sums.objectives.values()).backward()
    gradients = {name: p.grad for name, p in trained(ship).items() if p.grad is not None}
    return [float(loss.detach()) for loss in sums.objectives.values()], gradients


def trained(ship: ShipModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in ship.named_parameters() if p.requires_grad}


def frozen_bytes(ship: ShipModel) -> int:
    frozen = [*ship.parameters(), *ship.task_llm.parameters()]
    storages = {p.untyped_storage().data_ptr(): p for p in frozen if not p.requires_grad}
    return sum(p.untyped_storage().nbytes() for p in storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_one_base_gives_the_bits_of_three(quantisation: str) -> None:
    three, one = (build(config_of(kind, quantisation).model) for kind in ("separate", "shared"))
    assert list(trained(one)) == list(trained(three))
    for name, parameter in trained(three).items():
        assert torch.equal(trained(one)[name], parameter), name
    # The copies of the encoder have no output layer.
    assert 2.7 < frozen_bytes(three) / frozen_bytes(one) <= 3
    (losses, gradients), (expected_losses, expected) = step(one), step(three)
    assert losses == expected_losses
    assert list(gradients) == list(expected) and any(map(torch.any, gradients.values()))
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name
    latents = [ship.eval().encode(["reverse the list"]) for ship in (one, three)]
    assert torch.equal(*latents)
    answers = [ship.answer(ship.adapt(latents[0]), ["1 2 3"], 5) for ship in (one, three)]
    texts = [ship.decode(latents[0], 5) for ship in (one, three)]
    assert answers[0] == answers[1] and texts[0] == texts[1]


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "width": 8, "targets": ["q_proj", "down_proj"]},
    "soft_prompt": {"kind": "soft_prompt", "num_virtual_tokens": 3},
    "both": {
        "kind": "combination",
        "parts": [
            {"kind": "lora", "rank": 1, "width": 8, "targets": ["q_proj"]},
            {"kind": "soft_prompt", "num_virtual_tokens": 2},
        ],
    },
}


def without_dropout(quantisation: str = "nf4", **changes: Any) -> dict[str, Any]:
    """Roles of which Task LLM and decoder may be read in one pass."""
    tuning = {"kind": "lora", "dropout": 0.0, "targets": ["q_proj", "o_proj"]}
    return {
        "encoder": {"quantisation": quantisation, "tuning": tuning | {"rank": 3}},
        "decoder": {"quantisation": quantisation, "tuning": tuning | {"rank": 2, "alpha": 3.0}},
        **changes,
    }


def num_passes(ship: ShipModel) -> int:
    """Of a step's forward over the base."""
    passes = []
    block = ship.task_llm.language_model.blocks()["model.layers.0"]
    hook = block.register_forward_pre_hook(lambda *_: passes.append(1))
    step(ship)
    hook.remove()
    return len(passes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "quantisation", "checkpointing"),
    [
        ("lora", "nf4", False),
        ("lora", "nf4", True),
        ("lora", "none", True),
        ("soft_prompt", "nf4", True),
        ("both", "none", False),
    ],
)
def test_task_llm_and_decoder_are_read_in_one_pass(
    kind: str, quantisation: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = without_dropout(quantisation, hypernetwork=KINDS[kind])
    if checkpointing:
        changes["decoder"]["checkpointing"] = True
        changes["task_llm.checkpointing"] = True
    ship = build(config_of("shared", quantisation, **changes).model)
    assert num_passes(ship) == 2
    ship.zero_grad()
    losses, gradients = step(ship)
    with monkeypatch.context() as patched:
        patched.setattr(ShipModel, "reads_together", lambda *_: False)
        apart = build(ship.config)
        assert num_passes(apart) == 3
        apart.zero_grad()
        expected_losses, expected = step(apart)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert list(gradients) == list(expected) and any(map(torch.any, gradients.values()))
    for name, gradient in expected.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1e-3)
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder": {"quantisation": "nf4", "tuning": {"kind": "lora", "rank": 2, "dropout": 0.1}}},
        {"decoder.checkpointing": True},
        {"hypernetwork": {"kind": "bottleneck", "rank": 2, "width": 8}},
        {"hypernetwork": {"kind": "prefix", "length": 2, "width": 8}},
    ],
)
def test_what_is_more_than_low_rank_is_read_in_passes_of_its_own(changes: dict[str, Any]) -> None:
    ship = build(config_of("shared", "nf4", **without_dropout() | changes).model)
    assert num_passes(ship) == 3


@pytest.mark.parametrize(("shard", "num_models"), [("never", 0), ("always", 1)])
def test_the_base_is_in_the_engine_once_where_it_is_sharded(shard: str, num_models: int) -> None:
    model = config_of("shared", "nf4", **{"task_llm.shard": shard}).model
    ship = build(model)
    linears = [name for name, p in ship.named_parameters() if type(p).__name__ == "Params4bit"]
    assert len(linears) == num_models * 4 * 7
    assert all(name.startswith("sharded_task_llm.lm.model.layers.") for name in linears)
    module = ship.task_llm.language_model.module
    assert module is ship.encoder.language_model.module is ship.decoder.language_model.module
    # Frozen, so never in training mode, whoever reads.
    assert ship.training and not module.training and ship.encoder.adapter.training
    assert set(ship.task_llm.sites()) == {
        f"model.layers.{i}.{name}"
        for i in range(4)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    counts = ship.parameter_counts()
    assert counts["encoder"] < counts["task LLM"] / 10


def test_a_bundle_of_either_opens_as_the_other(tmp_path: Path) -> None:
    three, one = (build(config_of(kind, "nf4").model) for kind in ("separate", "shared"))
    with torch.no_grad():
        trained(three)["encoder.adapter.model.layers.3.mlp.up_proj.lora_a.weight"] += 1
    prompts = {name: one.prompts for name in ("task_llm", "encoder", "decoder")}
    for folder, ship in (("three", three), ("one", one)):
        write_bundle(
            tmp_path / folder,
            {name: parameter.detach() for name, parameter in trained(ship).items()},
            config_of("separate" if ship is three else "shared", "nf4"),
            describe_roles(prompts),
            {},
            [],
            [],
        )
    assert not torch.equal(one.eval().encode(["x"]), three.eval().encode(["x"]))
    Bundle.open(tmp_path / "three").load_into(one)
    assert torch.equal(one.encode(["x"]), three.encode(["x"]))
    Bundle.open(tmp_path / "one").load_into(three)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"encoder.base": "elsewhere"},
            "backbone=shared needs one base for all: encoder.base is elsewhere and task_llm.base "
            "is embedded",
        ),
        (
            {"decoder.quantisation": "none"},
            "backbone=shared needs one quantisation for all: decoder.quantisation is none and "
            "task_llm.quantisation is nf4",
        ),
        (
            {"decoder.tuning": {"kind": "full"}, "decoder.quantisation": "none"}
            | {"encoder.quantisation": "none", "task_llm.quantisation": "none"},
            "backbone=shared needs decoder.tuning.kind=lora",
        ),
    ],
)
def test_what_cannot_share_a_base_is_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        config_of("shared", "nf4", **changes)
    assert "\n" not in str(error.value)
    config_of("separate", "nf4", **changes)
