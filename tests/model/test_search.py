"""Beam search against transformers' own generate, and its scorers against recorded searches.

recorded_searches.json holds what the searches for group decoding and for known instructions gave
when each had a loop of its own: the same ones have to come out of this one.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ship_ds.model.adapters.sites import wrap_sites
from ship_ds.model.batch import TokenBatch
from ship_ds.model.search import TokenTrie, beam_search, likeliest_known, vote
from tests.model.models import (
    EOS,
    FAMILIES,
    greedy_rows,
    random_lora,
    random_rows,
    stream_of,
    tiny_lm,
)

TARGETS = ("q_proj", "o_proj", "down_proj")
LENGTHS = [9, 4, 7, 12]
RECORDED = json.loads(Path(__file__).with_name("recorded_searches.json").read_text())


def _ending(family: str, seed: int = 0) -> Any:
    model = tiny_lm(family, seed=seed)
    model.get_output_embeddings().weight.data[EOS] *= 3
    return model


def _transformers_beams(
    model: Any, row: list[int], num_beams: int, length: int
) -> list[tuple[float, list[int]]]:
    out = model.generate(
        torch.tensor([row]),
        attention_mask=torch.ones(1, len(row), dtype=torch.long),
        max_new_tokens=length,
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        early_stopping=False,
        eos_token_id=EOS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = []
    for ids, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        new = ids[len(row) :]
        beams.append((score, new[: new.index(EOS) + 1] if EOS in new else new))
    return beams


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_is_transformers_own(family: str) -> None:
    model, rows = _ending(family), random_rows(LENGTHS)
    ours = beam_search(stream_of(model, TokenBatch.build(rows, None, 0)), 4, EOS, 9)
    lengths = set()
    for row, beams in zip(rows, ours, strict=True):
        expected = _transformers_beams(model, row, 4, 9)
        assert [list(beam.tokens) for beam in beams] == [tokens for _, tokens in expected]
        assert [beam.score for beam in beams] == pytest.approx(
            [score for score, _ in expected], rel=1e-4
        )
        lengths |= {len(beam.tokens) for beam in beams}
    assert len(lengths) > 2, (
        "hypotheses have to end at different steps for this test to mean anything"
    )


def test_one_beam_is_greedy() -> None:
    model, batch = _ending("llama"), TokenBatch.build(random_rows(LENGTHS), None, 0)
    assert [
        list(beams[0].tokens) for beams in beam_search(stream_of(model, batch), 1, EOS, 9)
    ] == greedy_rows(model, batch, None, None, EOS, 9)


def test_beams_under_an_adapter_are_each_tasks_own() -> None:
    """Two tasks of two prompts each; a prompt alone under its task's adapter finds the same
    beams."""
    model, rows = tiny_lm("llama"), random_rows(LENGTHS)
    adapter = random_lora(wrap_sites(model, TARGETS), 2)
    model.get_output_embeddings().weight.data[EOS] *= 3
    together = beam_search(
        stream_of(model, TokenBatch.build(rows, None, 0), adapter=adapter), 3, EOS, 8
    )
    for e, row in enumerate(rows):
        alone = stream_of(
            model, TokenBatch.build([row], None, 0), adapter=adapter.rows(torch.tensor([e // 2]))
        )
        assert [beam.tokens for beam in beam_search(alone, 3, EOS, 8)[0]] == [
            beam.tokens for beam in together[e]
        ]


@pytest.mark.parametrize("case", RECORDED["group"])
def test_votes_of_several_prompts_are_the_recorded_ones(case: str) -> None:
    family, seed, length = case.split()
    model = tiny_lm(family, seed=int(seed))
    adapter = random_lora(wrap_sites(model, TARGETS), 1)
    model.get_output_embeddings().weight.data[EOS] *= 3
    prompts = TokenBatch.build(random_rows([9, 4, 7, 12, 5, 6]), None, 0)
    texts = vote(stream_of(model, prompts, adapter=adapter), 3, 4, EOS, int(length))
    without_end = [
        [[token for token in beam.tokens if token != EOS] for beam in beams] for beams in texts
    ]
    assert without_end == RECORDED["group"][case]


@pytest.mark.parametrize("case", RECORDED["trie"])
def test_likeliest_known_texts_are_the_recorded_ones(case: str) -> None:
    family, seed, num_beams = case.split()
    rng = random.Random(int(seed))
    drawn = {(*(rng.randrange(2, 8) for _ in range(rng.randint(1, 5))), EOS) for _ in range(60)}
    texts = sorted(drawn)
    rng.shuffle(texts)
    trie = TokenTrie(texts)
    stream = stream_of(
        _ending(family, int(seed)), TokenBatch.build(random_rows([9, 4, 7]), None, 0)
    )
    beams = likeliest_known(stream, trie, int(num_beams))
    assert [[trie.index(beam.tokens) for beam in own] for own in beams] == RECORDED["trie"][case]


def test_a_beam_as_wide_as_the_trie_orders_all_texts_by_their_likelihood() -> None:
    model, prompt = _ending("llama"), random_rows([6])
    texts = [(5, 8, EOS), (5, 9, EOS), (6, EOS), (6, 5, 5, EOS)]
    trie = TokenTrie(texts)
    beams = likeliest_known(stream_of(model, TokenBatch.build(prompt, None, 0)), trie, 4)[0]
    with torch.no_grad():
        for beam in beams:
            ids = torch.tensor([prompt[0] + list(beam.tokens)])
            log_probs = model(ids).logits[0].log_softmax(-1)[len(prompt[0]) - 1 : -1]
            exact = log_probs.gather(1, torch.tensor(beam.tokens)[:, None]).sum()
            assert beam.score == pytest.approx(float(exact), rel=1e-4)
    assert sorted(trie.index(beam.tokens) for beam in beams) == [0, 1, 2, 3]
    assert [beam.score for beam in beams] == sorted((b.score for b in beams), reverse=True)


def test_a_trie_gives_the_tokens_that_follow() -> None:
    trie = TokenTrie([(5, 8, 1), (5, 9, 1), (6, 1)])
    assert trie.next_tokens(()) == (5, 6) and trie.next_tokens((5,)) == (8, 9)
    assert trie.next_tokens((5, 8, 1)) == () and trie.index((6, 1)) == 2


def test_as_many_beams_go_on_where_ends_are_the_likeliest() -> None:
    """A base may name several ends; each beam can have all of them in front of what goes on."""
    torch.manual_seed(0)
    model = tiny_lm("llama").eval()
    stream = stream_of(model, TokenBatch.build([[3, 4, 5]], None, 0))
    ends = stream.logits_EV[0].topk(6).indices.tolist()
    assert EOS not in ends
    (beams,) = beam_search(stream, 2, EOS, 4, other_ends=ends)
    assert [beam.tokens for beam in beams] == [(EOS,), (EOS,)]
