"""Sampling, beam search and the rows of a stream, against transformers' own generate."""

from typing import Any

import pytest
import torch

from ship_ds.model.adapters import wrap_sites
from ship_ds.model.batch import TokenBatch
from ship_ds.model.generation import Stream, beam_search, greedy, sample
from tests.model.models import EOS, FAMILIES, random_lora, random_rows, tiny_lm

TARGETS = ("q_proj", "o_proj", "down_proj")
LENGTHS = [9, 4, 7, 12]


def _ending(family: str, seed: int = 0) -> Any:
    model = tiny_lm(family, seed=seed)
    model.get_output_embeddings().weight.data[EOS] *= 3
    return model


def _transformers_beams(
    model: Any, row: list[int], num_beams: int, length: int, penalty: float
) -> list[tuple[float, list[int]]]:
    out = model.generate(
        torch.tensor([row]),
        attention_mask=torch.ones(1, len(row), dtype=torch.long),
        max_new_tokens=length,
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        length_penalty=penalty,
        early_stopping=False,
        eos_token_id=EOS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = []
    for ids, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        new = ids[len(row) :]
        found.append((score, new[: new.index(EOS) + 1] if EOS in new else new))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("penalty", [1.0, 0.0])
def test_beam_search_is_transformers_own(family: str, penalty: float) -> None:
    model, rows = _ending(family), random_rows(LENGTHS)
    ours = beam_search(Stream(model, TokenBatch.build(rows, None, 0)), 4, EOS, 9, penalty)
    lengths = set()
    for row, found in zip(rows, ours, strict=True):
        expected = _transformers_beams(model, row, 4, 9, penalty)
        assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]
        assert [score for score, _ in found] == pytest.approx(
            [score for score, _ in expected], rel=1e-4
        )
        lengths |= {len(tokens) for _, tokens in found}
    assert len(lengths) > 2, (
        "hypotheses have to end at different steps for this test to mean anything"
    )


def test_one_beam_is_greedy() -> None:
    model, batch = _ending("llama"), TokenBatch.build(random_rows(LENGTHS), None, 0)
    assert [found[0][1] for found in beam_search(Stream(model, batch), 1, EOS, 9)] == greedy(
        model, batch, None, None, EOS, 9
    )


def test_beams_under_an_adapter_are_each_tasks_own() -> None:
    """Two tasks of two prompts each; a prompt alone under its task's adapter finds the same
    beams."""
    model, rows = tiny_lm("llama"), random_rows(LENGTHS)
    adapter = random_lora(wrap_sites(model, TARGETS), 2)
    model.get_output_embeddings().weight.data[EOS] *= 3
    together = beam_search(
        Stream(model, TokenBatch.build(rows, None, 0), adapter=adapter), 3, EOS, 8
    )
    for e, row in enumerate(rows):
        alone = Stream(
            model, TokenBatch.build([row], None, 0), adapter=adapter.rows(torch.tensor([e // 2]))
        )
        assert [tokens for _, tokens in beam_search(alone, 3, EOS, 8)[0]] == [
            tokens for _, tokens in together[e]
        ]


@torch.no_grad()
def test_rows_that_end_at_different_steps_leave_an_uneven_adapter_right() -> None:
    model, rows = tiny_lm("llama"), random_rows([5, 6, 7, 5, 8, 4], seed=4)
    adapter = random_lora(wrap_sites(model, TARGETS), 2)
    model.get_output_embeddings().weight.data[EOS] *= 3
    together = greedy(model, TokenBatch.build(rows, None, 0), None, adapter, EOS, 12)
    assert len({len(row) for row in together}) > 2
    for e, row in enumerate(rows):
        one = adapter.rows(torch.tensor([e // 3]))
        assert greedy(model, TokenBatch.build([row], None, 0), None, one, EOS, 12) == [together[e]]


def test_a_samples_draw_does_not_depend_on_the_batch() -> None:
    model, rows = _ending("llama"), random_rows(LENGTHS)
    uniform = torch.rand(4, 10, generator=torch.Generator().manual_seed(3))
    together = sample(Stream(model, TokenBatch.build(rows, None, 0)), uniform, 1.0, EOS)
    for e, row in enumerate(rows):
        assert sample(
            Stream(model, TokenBatch.build([row], None, 0)), uniform[e : e + 1], 1.0, EOS
        ) == [together[e]]
    assert together != greedy(model, TokenBatch.build(rows, None, 0), None, None, EOS, 10)


def test_samples_follow_the_models_probabilities() -> None:
    model, row = tiny_lm("llama"), random_rows([5])
    stream = Stream(model, TokenBatch.build(row, None, 0))
    expected = (stream.logits_EV[0] / 0.7).softmax(-1)
    stream.select(torch.zeros(4000, dtype=torch.long))
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
    assert sample(Stream(model, batch), torch.full((4, 9), 0.5), 1e-4, EOS) == greedy(
        model, batch, None, None, EOS, 9
    )
