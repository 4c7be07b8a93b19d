"""Fusion by the base's own attention: beside both texts in one sequence, by the stock model."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ship_ds.config import Config, load_config
from ship_ds.errors import UserError
from ship_ds.model.adapters.adapter import States, Target
from ship_ds.model.adapters.block_fusion import BlockFusionHypernetwork
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.batch import TokenBatch
from ship_ds.model.decoder_only import DecoderOnly
from ship_ds.model.language_model import language_model
from ship_ds.model.ship import ShipModel
from tests.model.models import tiny_lm, tiny_t5, wake_up

WORDINGS = ["keep the numbers greater than 4", "reverse", "put 7 at the front of the list"]
INPUTS = ["3 9 5", "1 2", "8"]


def small(*overrides: str, part: str = "{kind: block_fusion}") -> Config:
    lora = "{kind: lora, rank: 2, width: 8}"
    kind = f"model.hypernetwork={{kind: combination, parts: [{lora}, {part}]}}"
    return load_config(
        "quickstart-smoke",
        ["model.latent_size=16", "model.task_llm.quantisation=none", kind, *overrides],
    )


def ship_of(*overrides: str) -> ShipModel:
    torch.manual_seed(0)
    return build_ship(small(*overrides).model, LoadedWeights()).eval().double()


def logits_of(ship: ShipModel, adapter: Any, ids: list[tuple[int, ...]]) -> list[Tensor]:
    """Of each row's own tokens, (S, V)."""
    batch = TokenBatch.build(ids, None, ship.prompts.pad_id)
    found = ship.task_llm.logits(adapter, batch)
    return [one[: len(row)] for one, row in zip(found, ids, strict=True)]


@pytest.mark.parametrize("packs", [True, False])
@torch.no_grad()
def test_a_fresh_one_is_the_instruction_in_front_of_the_prompt(
    packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One encoder and one base: what the stock model says of both texts in one sequence, in fp64,
    whatever else the batch holds and however it is laid out."""
    ship = ship_of()
    monkeypatch.setattr(DecoderOnly, "packs", packs)
    prompts = [ship.question(text) for text in INPUTS]
    latent_TZ = ship.encode(WORDINGS)
    found = logits_of(ship, ship.adapt(latent_TZ, WORDINGS), prompts)
    stock = ship.task_llm.lm
    for wording, prompt, logits_SV in zip(WORDINGS, prompts, found, strict=True):
        read = ship.encoder_prompts.encoder_prompt(wording)
        whole_SV = stock(torch.tensor([[*read, *prompt]])).logits[0, len(read) :]
        torch.testing.assert_close(logits_SV, whole_SV, rtol=1e-5, atol=1e-5)
    without = logits_of(ship, ship.adapt(latent_TZ), prompts)
    bare = logits_of(ship, None, prompts)
    for one, other in zip(without, bare, strict=True):
        torch.testing.assert_close(one, other)


def gradients(ship: ShipModel) -> dict[str, Tensor]:
    """Of the sum of the logits' squares under adapters of what the encoder reads."""
    ids = [ship.encoder_prompts.encoder_prompt(text) for text in WORDINGS]
    batch = TokenBatch.build(ids, None, ship.encoder_prompts.pad_id)
    mean_TZ, _, states_TSX = ship.encoder(batch)
    adapter = ship.hypernetwork(latent_TZ=mean_TZ, read=States(states_TSX, batch.real_ES))
    ship.zero_grad()
    found = logits_of(ship, adapter, [ship.question(text) for text in INPUTS])
    sum(one.square().sum() for one in found).backward()  # type: ignore[union-attr]
    named = ship.encoder.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def test_every_block_of_the_encoder_learns_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed or not, packed or not, in one base or in two."""
    lora = "model.encoder.tuning={kind: lora, rank: 2, dropout: 0}"
    plain = ship_of(lora)
    wake_up(plain)
    expected = gradients(plain)
    blocks = {name.split("layers.")[1][0] for name in expected if "layers." in name}
    assert blocks == {"0", "1", "2", "3"} and all(one.any() for one in expected.values())
    for settings in (
        ["model.encoder.checkpointing=true"],
        ["model.backbone=shared", "model.decoder.tuning={kind: lora, rank: 2, dropout: 0}"],
    ):
        other = ship_of(lora, *settings)
        for part in ("encoder", "hypernetwork"):
            named = dict(getattr(plain, part).named_parameters())
            for name, parameter in getattr(other, part).named_parameters():
                parameter.data.copy_(named[name])
        found = gradients(other)
        assert found.keys() == expected.keys()
        for name, one in found.items():
            torch.testing.assert_close(one, expected[name], rtol=1e-6, atol=1e-9)
    monkeypatch.setattr(DecoderOnly, "packs", False)
    for name, one in gradients(plain).items():
        torch.testing.assert_close(one, expected[name], rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_states_stand_before_those_of_the_blocks() -> None:
    """So that what reads the last layer alone, `fusion` and the posterior, sees what it saw."""
    plain = build_ship(small(part="{kind: fusion, width: 8}").model, LoadedWeights()).double()
    both = build_ship(small().model, LoadedWeights()).double()
    both.encoder.load_state_dict(plain.encoder.state_dict())
    batch = TokenBatch.build([[5, 6, 7, 8], [9, 3]], None, 0)
    mean_TZ, _, states_TSH = plain.eval().encoder(batch)
    other_TZ, _, states_TSX = both.eval().encoder(batch)
    assert torch.equal(mean_TZ, other_TZ)
    size = states_TSH.shape[2]
    assert states_TSX.shape[2] == 5 * size == both.encoder.state_width
    assert plain.encoder.state_width == size
    assert torch.equal(states_TSX[..., :size], states_TSH)
    embeddings = both.encoder.language_model.embed_ids(batch.ids_ES)
    torch.testing.assert_close(states_TSX[0, :, size : 2 * size], embeddings[0])
    assert not states_TSX[1, 2:].any()


def test_bases_of_other_sizes_are_one_line() -> None:
    model = tiny_lm("llama")
    target = replace(Target.of(language_model(model), {}), state_size=64, state_blocks=4)
    config: Any = small().model.hypernetwork.parts[1]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="2 blocks of width 64 and the encoder 4 of 64"):
        BlockFusionHypernetwork(config, 16, target)
    target = replace(Target.of(language_model(tiny_t5()), {}), state_size=64, state_blocks=2)
    with pytest.raises(UserError, match="give both one base, by model.encoder.base"):
        BlockFusionHypernetwork(config, 16, target)
