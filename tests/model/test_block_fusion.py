"""Fusion by the base's own attention: beside both texts in one sequence, by the stock model."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ship_ds.config import Config, load_config
from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.inference.checks import check_examples, check_inputs, check_instruction
from ship_ds.inference.deduction import answer_latents, answer_read
from ship_ds.inference.scoring import fit_of_latents, losses_under_adapters
from ship_ds.model import budget
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
    """Of the sum of the logits' squares under adapters of what the encoder's blocks read alone."""
    ids = [ship.encoder_prompts.encoder_prompt(text) for text in WORDINGS]
    batch = TokenBatch.build(ids, None, ship.encoder_prompts.pad_id)
    mean_TZ, _, states_TSX = ship.encoder(batch)
    latent_TZ = mean_TZ.detach()
    adapter = ship.hypernetwork(latent_TZ=latent_TZ, read=States(states_TSX, batch.real_ES))
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
    moved = {name for name, one in expected.items() if one.any()}
    # What comes into the last block is all that the last block's own weights have no part in.
    assert {name.split("layers.")[1][0] for name in moved if "layers." in name} == {"0", "1", "2"}
    assert not any(name.startswith("head") for name in moved)
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


@torch.no_grad()
def test_the_gradient_is_that_of_both_texts_in_one_sequence() -> None:
    """Of the input embeddings that the instruction's tokens have in the stock model."""
    ship = ship_of()
    prompt, read = ship.question(INPUTS[0]), ship.encoder_prompts.encoder_prompt(WORDINGS[0])
    lm, stock = ship.encoder.language_model, ship.task_llm.lm
    tokens = torch.tensor([read])
    with torch.enable_grad():
        embeddings = lm.embed_ids(tokens).detach().requires_grad_()
        batch = TokenBatch.build([read], None, 0)
        mean_TZ, _, states_TSX = ship.encoder(batch, embeddings)
        latent_TZ = torch.zeros_like(mean_TZ)
        adapter = ship.hypernetwork(latent_TZ=latent_TZ, read=States(states_TSX, batch.real_ES))
        logits_of(ship, adapter, [prompt])[0].square().sum().backward()
        both = torch.cat([embeddings.detach(), lm.embed_ids(torch.tensor([prompt]))], 1)
        both = both.detach().requires_grad_()
        logits_SV = stock(inputs_embeds=both).logits[0, len(read) :]
        logits_SV.square().sum().backward()
    assert embeddings.grad is not None and both.grad is not None
    expected = both.grad[:, : len(read)]
    assert float(expected.abs().max()) > 1
    # The norms of the stock model are of fp32 whatever it is in.
    torch.testing.assert_close(embeddings.grad, expected, rtol=2e-3, atol=5e-3)


def test_what_does_not_go_with_it_is_one_line() -> None:
    for settings, message in (
        (
            ["model.encoder.base=smollm2"],
            "bases are smollm2 and embedded: leave model.encoder.base",
        ),
        (["model.encoder.chunk_tokens=8"], "model.encoder.chunk_tokens=8 reads it as several"),
        (
            ["model.hypernetwork={kind: block_fusion}"],
            "set kind=combination, with a part that does",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as error:
            small(*settings)
        assert "\n" not in str(error.value)


def test_the_instruction_counts_towards_the_context_where_it_stands_before() -> None:
    """Each of the two fits alone. States that stand at no place take none."""
    ship, text = ship_of(), " ".join(["7"] * 300)
    instruction = " ".join(["reverse"] * 300)
    places = len(ship.collator.read_prompt(instruction))
    assert ship.num_before(instruction) == places > 300 and ship.num_before(None) == 0
    check_instruction(ship, instruction)
    check_inputs(ship, [text], 8)
    with pytest.raises(UserError, match="input 1, behind the instruction, with an answer of 8"):
        check_inputs(ship, [text], 8, instruction)
    with pytest.raises(UserError, match="example 1: is"):
        check_examples(ship, [Example(text, "7")], instruction)
    other = build_ship(small(part="{kind: fusion}").model, LoadedWeights())
    check_inputs(other, [text], 8, instruction)


def test_what_needs_no_states_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are five times as wide as one layer's: reading a bank of instructions leaves them out,
    and who wants them has fewer rows at once."""
    ship, widths = ship_of(), []

    def kept(self: Any, *given: Any, **options: Any) -> Any:
        widths.append(options["without_states"])
        return forward(self, *given, **options)

    forward = type(ship.encoder).forward
    monkeypatch.setattr(type(ship.encoder), "forward", kept)
    mean_TZ = ship.encode(WORDINGS)
    ship.adapt(mean_TZ, WORDINGS)
    assert widths == [True, False]
    assert ship.encoder.state_bytes == 3 * 5 * 128 * 8
    taken = list(ship._encoder_batches(WORDINGS, gives_states=True))
    assert len(taken) == 1
    monkeypatch.setattr(budget, "bytes_free", lambda device: ship.encoder.state_bytes * 12)
    assert len(list(ship._encoder_batches(WORDINGS, gives_states=True))) == 3


def readings_of(ship: ShipModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with a length for each text that the encoder reads from now on."""
    read: list[int] = []

    def counted(self: Any, batch: TokenBatch, *given: Any, **options: Any) -> Any:
        read.extend(batch.lengths)
        return forward(self, batch, *given, **options)

    forward = type(ship.encoder).forward
    monkeypatch.setattr(type(ship.encoder), "forward", counted)
    return read


@pytest.mark.parametrize("kept", ["all", "the first", "none"])
def test_what_was_read_once_is_not_read_again(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as there was room for its states; texts that were not stand beside it as before."""
    ship = ship_of()
    num_tokens = [len(ship.encoder_prompts.encoder_prompt(WORDINGS[row])) for row in (2, 0)]
    size = 8 * ship.encoder.state_width  # in fp64
    room = {"all": size * sum(num_tokens), "the first": size * sum(num_tokens) - 1, "none": 0}
    monkeypatch.setattr(budget, "bytes_to_keep", lambda device: room[kept])
    encoded = ship.read_once([WORDINGS[2], WORDINGS[0]])
    assert [one.reading for one in encoded] == [WORDINGS[2], WORDINGS[0]]
    has_states = {"all": [True, True], "the first": [True, False], "none": [False, False]}[kept]
    assert [one.states_SH is not None for one in encoded] == has_states
    # A copy: a slice would hold the batch that it is of.
    states = [one.states_SH for one in encoded if one.states_SH is not None]
    owned = [one.untyped_storage().nbytes() for one in states]
    assert owned == [size * tokens for tokens in num_tokens[: sum(has_states)]]
    latent_TZ = ship.encode(WORDINGS)
    torch.testing.assert_close(torch.stack([one.mean_Z for one in encoded]), latent_TZ[[2, 0]])
    plain = ship.adapt(latent_TZ, WORDINGS).tensors()

    read = readings_of(ship, monkeypatch)
    mixed = ship.adapt(latent_TZ, [encoded[1], WORDINGS[1], encoded[0]]).tensors()
    for name, tensor in plain.items():
        torch.testing.assert_close(mixed[name], tensor)
    assert len(read) == {"all": 1, "the first": 2, "none": 3}[kept]
    assert ship.adapter_bytes_of(encoded) == ship.adapter_bytes_of([WORDINGS[2], WORDINGS[0]])
    assert ship.num_before(encoded[0]) == ship.num_before(WORDINGS[2])
    # No text is no reading, however it was read: z alone makes the adapter.
    empty, alone = (
        ship.adapt(latent_TZ[:1], [one]).tensors() for one in (ship.read_once([""])[0], "")
    )
    for name, tensor in alone.items():
        torch.testing.assert_close(empty[name], tensor)
    assert ship.read_once([]) == []


def test_batches_leave_room_for_what_is_kept_of_those_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nothing is kept they may take it all."""
    ship = ship_of()
    calls: list[int] = []
    forward = type(ship.encoder).forward

    def counted(self: Any, batch: TokenBatch, *given: Any, **options: Any) -> Any:
        calls.append(len(batch.lengths))
        return forward(self, batch, *given, **options)

    monkeypatch.setattr(type(ship.encoder), "forward", counted)
    monkeypatch.setattr(budget, "bytes_beside_kept", lambda device: 1)
    ship.read_once(WORDINGS)
    assert calls == [1, 1, 1]
    monkeypatch.setattr(budget, "bytes_to_keep", lambda device: 0)
    ship.read_once(WORDINGS)
    assert calls == [1, 1, 1, 3]


def test_answers_and_their_losses_read_each_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ship, inputs = ship_of(), [INPUTS[:2], INPUTS[1:], INPUTS[:1]]
    latent_TZ = ship.encode(WORDINGS)
    answers = answer_latents(ship, latent_TZ, WORDINGS, inputs, 4, keeps_cut_off=True)
    asked = [[Example(text, "5") for text in texts] for texts in inputs]
    fits = [
        fit_of_latents(ship, latent_TZ[row : row + 1], [text], [examples])
        for row, (text, examples) in enumerate(zip(WORDINGS, asked, strict=True))
    ]
    read = readings_of(ship, monkeypatch)
    assert answer_read(ship, WORDINGS, WORDINGS, inputs, 4, keeps_cut_off=True) == answers
    assert len(read) == len(WORDINGS)
    read.clear()
    found = losses_under_adapters(ship, WORDINGS, asked)
    assert len(read) == len(WORDINGS)
    num_tokens = len(ship.prompts.target("5"))
    for losses, fit in zip(found, fits, strict=True):
        torch.testing.assert_close(torch.tensor(losses) * num_tokens, fit.loss_CM[0])
    assert answer_read(ship, [], [], [], 4) == [] == losses_under_adapters(ship, [], [])


def test_bases_of_other_sizes_are_one_line() -> None:
    model = tiny_lm("llama")
    target = replace(Target.of(language_model(model), {}), state_size=64, state_blocks=4)
    config: Any = small().model.hypernetwork.parts[1]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="2 blocks of width 64 and the encoder 4 of 64"):
        BlockFusionHypernetwork(config, 16, target)
    target = replace(Target.of(language_model(tiny_t5()), {}), state_size=64, state_blocks=2)
    with pytest.raises(UserError, match="give both one base, by model.encoder.base"):
        BlockFusionHypernetwork(config, 16, target)
