"""Sampling and the rows of a stream."""

from typing import Any

import torch

from ship_ds.model.adapters.sites import wrap_sites
from ship_ds.model.batch import TokenBatch
from ship_ds.model.generation import continue_rows, sample
from tests.model.models import EOS, greedy_rows, random_lora, random_rows, stream_of, tiny_lm

TARGETS = ("q_proj", "o_proj", "down_proj")
LENGTHS = [9, 4, 7, 12]


def _ending(family: str, seed: int = 0) -> Any:
    model = tiny_lm(family, seed=seed)
    model.get_output_embeddings().weight.data[EOS] *= 3
    return model


@torch.no_grad()
def test_rows_that_end_at_different_steps_leave_an_uneven_adapter_right() -> None:
    model, rows = tiny_lm("llama"), random_rows([5, 6, 7, 5, 8, 4], seed=4)
    adapter = random_lora(wrap_sites(model, TARGETS), 2)
    model.get_output_embeddings().weight.data[EOS] *= 3
    together = greedy_rows(model, TokenBatch.build(rows, None, 0), None, adapter, EOS, 12)
    assert len({len(row) for row in together}) > 2
    for e, row in enumerate(rows):
        one = adapter.rows(torch.tensor([e // 3]))
        assert greedy_rows(model, TokenBatch.build([row], None, 0), None, one, EOS, 12) == [
            together[e]
        ]


@torch.no_grad()
def test_a_token_is_written_in_place_and_rows_leave_by_the_quarter() -> None:
    stream = stream_of(tiny_lm("llama"), TokenBatch.build(random_rows([6, 3, 5, 4, 6, 2]), None, 0))
    ends_at = {1: 1, 4: 2, 0: 2}  # row -> step; of six rows 5 are no quarter less, 3 are

    def choose(logits_EV: torch.Tensor, running_E: torch.Tensor, step: int) -> torch.Tensor:
        return torch.tensor(
            [EOS if ends_at.get(row, 9) <= step else 7 for row in running_E.tolist()]
        )

    selected: list[list[int]] = []
    select, places = stream.select, set()

    def noted(rows: list[int]) -> None:
        selected.append(list(rows))
        select(rows)

    stream.select = noted  # type: ignore[method-assign, assignment]
    advance = stream.advance

    def advanced(next_E: torch.Tensor) -> None:
        advance(next_E)
        places.add(stream.cache.layers[0].buffers[0].data_ptr())  # type: ignore[attr-defined]

    stream.advance = advanced  # type: ignore[method-assign]
    rows = continue_rows(stream, choose, EOS, 6)
    assert [len(row) for row in rows] == [3, 2, 6, 6, 3, 6]
    assert selected == [[2, 3, 5]] and len(places) == 1


@torch.no_grad()
def test_beams_of_one_prompt_take_along_what_was_written_alone() -> None:
    """Row by row the cache is what reading prompt and tokens at once makes."""
    model, prompts = tiny_lm("llama"), random_rows([5, 5, 5])
    stream = stream_of(model, TokenBatch.build(prompts, None, 0))
    stream.reserve(4)
    texts = [list(prompt) for prompt in prompts]
    moves = ([0, 0, 1, 1, 2, 2], [1, 0, 2, 2, 5, 4], [0, 2, 3, 3, 3, 5], [4, 5])
    for step, rows in enumerate(moves):
        stream.select(rows)
        texts = [[*texts[row], 10 + 7 * step + e] for e, row in enumerate(rows)]
        stream.advance(torch.tensor([text[-1] for text in texts]))
    torch.testing.assert_close(
        stream.logits_EV, model(torch.tensor(texts)).logits[:, -1], rtol=1e-4, atol=1e-4
    )


def test_a_samples_draw_does_not_depend_on_the_batch() -> None:
    model, rows = _ending("llama"), random_rows(LENGTHS)
    uniform = torch.rand(4, 10, generator=torch.Generator().manual_seed(3))
    together = sample(stream_of(model, TokenBatch.build(rows, None, 0)), uniform, 1.0, EOS)
    for e, row in enumerate(rows):
        assert sample(
            stream_of(model, TokenBatch.build([row], None, 0)), uniform[e : e + 1], 1.0, EOS
        ) == [together[e]]
    assert together != greedy_rows(model, TokenBatch.build(rows, None, 0), None, None, EOS, 10)


def test_samples_follow_the_models_probabilities() -> None:
    model, row = tiny_lm("llama"), random_rows([5])
    stream = stream_of(model, TokenBatch.build(row, None, 0))
    expected = (stream.logits_EV[0] / 0.7).softmax(-1)
    stream.select([0] * 4000)
    drawn = sample(
        stream, torch.rand(4000, 1, generator=torch.Generator().manual_seed(0)), 0.7, EOS
    )
    counts = (
        torch.bincount(torch.tensor([tokens[0] for tokens in drawn]), minlength=len(expected))
        / 4000
    )
    assert (counts - expected).abs().max() < 0.03 and expected.max() > 0.05


def test_a_cold_sample_is_greedy() -> None:
    model, batch = _ending("llama"), TokenBatch.build(random_rows(LENGTHS), None, 0)
    assert sample(stream_of(model, batch), torch.full((4, 9), 0.5), 1e-4, EOS) == greedy_rows(
        model, batch, None, None, EOS, 9
    )
