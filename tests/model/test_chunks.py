"""Long texts in chunks: what the encoder makes of them, beside each chunk read by itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ship_ds.config import Config, load_config
from ship_ds.data.sampler import TaskDraw
from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.flops import chunk_lengths, deduction_flops
from ship_ds.inference.checks import check_instruction
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.batch import TokenBatch
from ship_ds.model.decoder_only import DecoderOnly
from ship_ds.model.encoder import Encoder
from ship_ds.model.ship import ShipModel
from ship_ds.model.sizes import step_rows
from ship_ds.planner.plan import Machines, make_plan
from tests.model.models import wake_up

LONG = "keep the numbers greater than 4 and then reverse the list and then add 2 to each element"
WORDINGS = [LONG, "reverse the list", LONG.replace("reverse", "rotate")]
POOLINGS: dict[str, str] = {"last": "last", "attention": "{kind: attention, num_queries: 2}"}


def small(pooling: str, chunk_tokens: int | None, *overrides: str) -> Config:
    chunks = [] if chunk_tokens is None else [f"model.encoder.chunk_tokens={chunk_tokens}"]
    shape = ["model.latent_size=16", "model.hypernetwork={kind: lora, rank: 2, width: 8}"]
    pool = f"model.encoder.pooling={POOLINGS[pooling]}"
    return load_config("quickstart-smoke", [*shape, pool, *chunks, *overrides])


def ship_of(pooling: str, chunk_tokens: int | None, *overrides: str) -> ShipModel:
    torch.manual_seed(0)
    ship = build_ship(small(pooling, chunk_tokens, *overrides).model, LoadedWeights())
    wake_up(ship)
    return ship.eval().double()


def prompts_of(ship: ShipModel, texts: list[str]) -> TokenBatch:
    prompts = ship.encoder_prompts
    return TokenBatch.build([prompts.encoder_prompt(text) for text in texts], None, prompts.pad_id)


def test_chunks_are_as_few_and_as_equal_as_can_be() -> None:
    assert chunk_lengths(9, 9) == [9] and chunk_lengths(10, 9) == [5, 5]
    assert chunk_lengths(23, 8) == [7, 8, 8] and chunk_lengths(1, 8) == [1]
    for length in range(1, 60):
        parts = chunk_lengths(length, 7)
        assert sum(parts) == length and len(parts) == -(-length // 7)
        assert max(parts) <= 7 and max(parts) - min(parts) <= 1


def test_a_batch_in_chunks_has_the_same_tokens() -> None:
    batch = TokenBatch.build([[5, 6, 7, 8, 9], [3], [1, 2, 3, 4]], None, 0)
    chunks = batch.in_chunks(2)
    assert chunks.lengths == (1, 2, 2, 1, 2, 2)
    assert chunks.ids_ES.tolist() == [[5, 0], [6, 7], [8, 9], [3, 0], [1, 2], [3, 4]]
    assert chunks.packed.position_N.tolist() == [0, 0, 1, 0, 1, 0, 0, 1, 0, 1]
    assert chunks.packed.ends.tolist() == [0, 1, 3, 5, 6, 8, 10]


def states_of_chunks(ship: ShipModel, text: str, most: int) -> list[Tensor]:
    """Of each chunk, (S, H), read in a pass of its own."""
    encoder, ids = ship.encoder, list(ship.encoder_prompts.encoder_prompt(text))
    states, start = [], 0
    for length in chunk_lengths(len(ids), most):
        batch = TokenBatch.build([ids[start : start + length]], None, 0)
        states.append(encoder.language_model.states(batch, adapter=encoder.own_adapter)[0])
        start += length
    return states


def posterior_by_hand(encoder: Encoder, chunks: list[Tensor]) -> Tensor:
    """The mean of the last states, or what the queries gather of all, through the head."""
    if encoder.pooling is None:
        pooled = torch.stack([states_SH[-1] for states_SH in chunks]).mean(0)[None]
    else:
        all_1SH = torch.cat(chunks)[None]
        pooled = encoder.pooling(all_1SH, torch.ones(all_1SH.shape[:2], dtype=torch.bool))
    mean_1Z: Tensor = encoder.head(pooled).float().chunk(2, -1)[0]
    return mean_1Z[0]


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("pooling", list(POOLINGS))
def test_each_chunk_is_read_by_itself(
    pooling: str, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else is in the batch; a short text stays whole, and embeddings are read alike."""
    ship = ship_of(pooling, 8)
    monkeypatch.setattr(DecoderOnly, "packs", packs)
    batch, encoder = prompts_of(ship, WORDINGS), ship.encoder
    assert max(batch.lengths) > 2 * 8 > 8 >= min(batch.lengths)
    with torch.no_grad():
        found_TZ = encoder(batch)[0]
        for row_Z, text in zip(found_TZ, WORDINGS, strict=True):
            expected_Z = posterior_by_hand(encoder, states_of_chunks(ship, text, 8))
            torch.testing.assert_close(row_Z, expected_Z, rtol=1e-5, atol=1e-5)
        embeddings_TSH = encoder.language_model.embed(batch)
        torch.testing.assert_close(encoder(batch, embeddings_TSH)[0], found_TZ)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", list(POOLINGS))
def test_texts_that_fit_are_read_as_without(pooling: str) -> None:
    """To the bit."""
    with torch.no_grad():
        whole, fits = (ship_of(pooling, most).encode(WORDINGS) for most in (None, 64))
        cut = ship_of(pooling, 8).encode(WORDINGS)
    assert torch.equal(whole, fits)
    assert torch.equal(cut[1], whole[1]) and (cut - whole)[[0, 2]].abs().amax(1).min() > 0.01


def test_states_that_are_fused_are_those_of_all_chunks() -> None:
    """In the places of the text's own tokens."""
    ship = ship_of("last", 8)
    ship.encoder.gives_states = True
    batch = prompts_of(ship, WORDINGS)
    with torch.no_grad():
        mean_TZ, _, states_TSH = ship.encoder(batch)
        for row, text in enumerate(WORDINGS):
            expected_SH = torch.cat(states_of_chunks(ship, text, 8))
            length = len(expected_SH)
            torch.testing.assert_close(states_TSH[row, :length], expected_SH.to(states_TSH))
            assert not states_TSH[row, length:].any()
        ship.encoder.gives_states = False
        torch.testing.assert_close(mean_TZ, ship.encoder(batch)[0])


@pytest.mark.slow
def test_a_text_may_be_longer_than_the_context() -> None:
    """Which is what chunks are for; without them it is refused in one line."""
    whole, cut = ship_of("last", None), ship_of("last", 64)
    context: Any = whole.encoder.language_model.context_length
    text = " ".join(["reverse the list and then"] * context)
    with pytest.raises(UserError, match=f"the encoder reads at most {context}"):
        check_instruction(whole, text)
    check_instruction(cut, text)
    # Nor are examples left out for want of room.
    assert (whole.collator.encoder_context, cut.collator.encoder_context) == (context, None)
    assert torch.isfinite(cut.encode([text])).all()
    with pytest.raises(UserError, match=rf"chunk_tokens \({context + 1}\): the base reads at most"):
        ship_of("last", context + 1)


@pytest.mark.slow
def test_a_plan_and_the_flops_count_chunks() -> None:
    """Attention within them, all else as without."""
    machines = Machines(1, 1, 10**12)
    whole, cut = (make_plan(small("last", most), machines) for most in (None, 8))
    assert whole.parameters == cut.parameters and whole.forecast != cut.forecast
    ship = ship_of("last", 8)
    draws = [TaskDraw(text, text, (Example("3", "3"),), (), True) for text in WORDINGS]
    batch = ship.collate(draws, 0, 0)
    rows, of_chunks = (step_rows(batch, size) for size in (None, ship.flop_size().encoder))
    parts = [part for length in batch.instructions.lengths for part in chunk_lengths(length, 8)]
    assert of_chunks.encoder.num_tokens == rows.encoder.num_tokens == sum(parts)
    assert of_chunks.encoder.sum_of_squares == sum(part**2 for part in parts)
    assert rows.encoder.sum_of_squares == sum(n**2 for n in batch.instructions.lengths)
    assert of_chunks.task_llm == rows.task_llm and of_chunks.decoder == rows.decoder
    # Of 64 tokens: eight times eight squared, where one text has 64 squared.
    sizes = [one.flop_size() for one in (ship_of("last", None), ship)]
    one_piece, in_chunks = (deduction_flops(size, 64) for size in sizes)
    assert one_piece - in_chunks == 4 * sizes[0].encoder.attention * (64**2 - 8 * 8**2)
