"""Label logits and greedy decoding against the stock model, family by family."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ship_ds.model.adapters.sites import wrap_sites
from ship_ds.model.batch import TokenBatch
from ship_ds.model.language_model import language_model
from tests.model.models import (
    EOS,
    FAMILIES,
    HIDDEN,
    VOCABULARY,
    greedy_rows,
    label_logits,
    random_lora,
    random_rows,
    tiny_lm,
)

TARGETS = ("q_proj", "o_proj", "up_proj", "down_proj")
PROMPTS, ANSWERS = [9, 4, 7, 12], [2, 5, 1, 3]
NUM_VIRTUAL = 3


def _setting(
    family: str, with_adapter: bool, with_soft: bool
) -> tuple[Any, TokenBatch, Tensor | None, Any]:
    model = tiny_lm(family)
    sites = wrap_sites(model, TARGETS)
    batch = TokenBatch.build(
        random_rows(PROMPTS), random_rows(ANSWERS, 5), 0, NUM_VIRTUAL if with_soft else 0
    )
    soft = (
        torch.randn(4, NUM_VIRTUAL, HIDDEN, generator=torch.Generator().manual_seed(9))
        if with_soft
        else None
    )
    return model, batch, soft, random_lora(sites, 2) if with_adapter else None


def _merged(family: str, adapter: Any, task: int) -> Any:
    """A stock model with the task's update added to its weights."""
    model = tiny_lm(family)
    with torch.no_grad():
        for path, (a_TRI, b_TOR) in (adapter.factors if adapter is not None else {}).items():
            model.get_submodule(path).weight += adapter.scaling * b_TOR[task] @ a_TRI[task]
    return model


def _stock_label_logits(
    family: str, batch: TokenBatch, soft: Tensor | None, adapter: Any
) -> Tensor:
    """Each row alone through the stock model, without padding; all its logits."""
    found = []
    for e, length in enumerate(batch.lengths_E.tolist()):
        model = _merged(family, adapter, e // 2)
        hidden = model.get_input_embeddings()(batch.ids_ES[e : e + 1, :length])
        if soft is not None:
            hidden = torch.cat([soft[e : e + 1], hidden[:, NUM_VIRTUAL:]], 1)
        logits = model(inputs_embeds=hidden).logits[0]
        found.append(logits[length - 1 - batch.target_lengths[e] : length - 1])
    return torch.cat(found)


@pytest.mark.slow
@pytest.mark.parametrize("with_soft", [False, True])
@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_label_logits_padded_and_packed_are_the_stock_models(
    family: str, with_adapter: bool, with_soft: bool
) -> None:
    model, batch, soft, adapter = _setting(family, with_adapter, with_soft)
    expected = _stock_label_logits(family, batch, soft, adapter)
    assert len(expected) == sum(ANSWERS) and expected.std() > 0.1
    for packed in (False, True):
        logits, labels = label_logits(model, batch, soft, adapter, packed=packed, num_tasks=2)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)
        assert labels.tolist() == [token for row in random_rows(ANSWERS, 5) for token in row]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_samples_do_not_see_each_other(family: str) -> None:
    model = tiny_lm(family)
    targets = random_rows(ANSWERS, 5)
    changed = [
        row if e != 1 else random_rows([4], 99)[0] for e, row in enumerate(random_rows(PROMPTS))
    ]
    logits, moved = (
        label_logits(model, TokenBatch.build(prompts, targets, 0), packed=True)[0]
        for prompts in (random_rows(PROMPTS), changed)
    )
    own = slice(2, 7)  # the labels of sequence 1
    assert not torch.allclose(logits[own], moved[own], atol=1e-2)
    assert torch.equal(logits[:2], moved[:2])
    torch.testing.assert_close(logits[7:], moved[7:], rtol=1e-5, atol=1e-6)


def _generate(model: Any, batch: TokenBatch, soft: Tensor | None, length: int) -> list[list[int]]:
    """transformers' own greedy search over left-padded prompts."""
    hidden = language_model(model).embed(batch, soft)
    width = hidden.shape[1]
    rows = torch.zeros_like(hidden)
    mask = torch.zeros(rows.shape[:2], dtype=torch.long)
    for e, n in enumerate(batch.lengths_E.tolist()):
        rows[e, width - n :] = hidden[e, :n]
        mask[e, width - n :] = 1
    out = model.generate(
        inputs_embeds=rows,
        attention_mask=mask,
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=EOS,
    ).tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in out]


@pytest.mark.slow
@pytest.mark.parametrize("with_soft", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_is_transformers_greedy_with_finished_rows(family: str, with_soft: bool) -> None:
    """A biased end-of-sequence logit ends rows at different lengths; the longest outlives the
    sliding window."""
    prompts = TokenBatch.build(
        random_rows([9, 4, 7, 12, 5, 6]), None, 0, NUM_VIRTUAL if with_soft else 0
    )
    soft = (
        torch.randn(6, NUM_VIRTUAL, HIDDEN, generator=torch.Generator().manual_seed(9))
        if with_soft
        else None
    )
    lengths: set[int] = set()
    for seed in range(4):
        model = tiny_lm(family, seed=seed)
        model.get_output_embeddings().weight[EOS] *= 3
        expected = _generate(model, prompts, soft, 12)
        assert greedy_rows(model, prompts, soft, None, EOS, 12) == expected
        lengths |= {len(row) for row in expected}
    assert len(lengths) > 2, "rows have to finish at different steps for this test to mean anything"


@torch.no_grad()
def test_greedy_under_an_adapter_is_the_merged_models() -> None:
    model = tiny_lm("llama")
    adapter = random_lora(wrap_sites(model, TARGETS), 2)
    batch = TokenBatch.build(random_rows(PROMPTS), None, 0)
    ours = greedy_rows(model, batch, None, adapter, EOS, 8)
    for task in (0, 1):
        own = slice(2 * task, 2 * task + 2)
        assert (
            ours[own]
            == greedy_rows(_merged("llama", adapter, task), batch, None, None, EOS, 8)[own]
        )


@torch.no_grad()
def test_instruction_tokens_from_the_table_equal_their_ids_and_can_be_replaced() -> None:
    model = tiny_lm("gemma2")  # whose embedding layer scales what it looks up
    prompts, targets, before = random_rows([4, 6]), random_rows([2, 3], 5), random_rows([3, 3], 8)
    batch = TokenBatch.build(prompts, targets, 0, NUM_VIRTUAL, instructions=before)
    soft = torch.randn(2, NUM_VIRTUAL, HIDDEN)
    as_ids = TokenBatch.build(
        [b + p for b, p in zip(before, prompts, strict=True)], targets, 0, NUM_VIRTUAL
    )
    expected, _ = label_logits(model, as_ids, soft)
    assert torch.equal(label_logits(model, batch, soft)[0], expected)
    table = model.get_input_embeddings()(torch.tensor(before))
    for packed in (False, True):
        same, _ = label_logits(model, batch, soft, instruction=table, packed=packed)
        torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-5)
        moved, _ = label_logits(model, batch, soft, instruction=table + 1.0, packed=packed)
        assert not torch.allclose(moved, expected, atol=1e-2)


def test_gradients_reach_the_soft_tokens_and_the_instruction() -> None:
    batch = TokenBatch.build(
        random_rows([4, 6]),
        random_rows([2, 3], 5),
        0,
        NUM_VIRTUAL,
        instructions=random_rows([3, 3], 8),
    )
    soft, instruction = (
        torch.randn(2, NUM_VIRTUAL, HIDDEN, requires_grad=True),
        torch.randn(2, 3, HIDDEN, requires_grad=True),
    )
    logits, labels = label_logits(tiny_lm("llama"), batch, soft, instruction=instruction)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    for leaf in (soft, instruction):
        assert leaf.grad is not None and (leaf.grad.abs().amax(-1) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2"])
def test_label_logits_run_on_the_meta_device(family: str, packed: bool) -> None:
    """Shapes alone, as the planner needs them: an adapter of two tasks, virtual tokens, gradients
    back to both."""
    with torch.device("meta"):
        model = tiny_lm(family)
        adapter = random_lora(wrap_sites(model, TARGETS), 2)
    soft = torch.empty(4, NUM_VIRTUAL, HIDDEN, device="meta", requires_grad=True)
    batch = TokenBatch.of_lengths(4, 7, 3, NUM_VIRTUAL)
    logits, labels = label_logits(model, batch, soft, adapter, packed=packed, num_tasks=2)
    assert logits.is_meta and logits.shape == (12, VOCABULARY) and labels.shape == (12,)
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    leaves = [factor for factors in adapter.factors.values() for factor in factors]
    for leaf in (soft, *leaves):
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2"])
def test_hidden_states_run_on_the_meta_device(family: str) -> None:
    with torch.device("meta"):
        model = tiny_lm(family)
    batch = TokenBatch.of_lengths(4, 7, 0)
    assert language_model(model).hidden(batch).shape == (4, 7, HIDDEN)
    embeddings = torch.empty(4, 7, HIDDEN, device="meta")
    assert language_model(model).hidden(batch, embeddings).shape == (4, 7, HIDDEN)
    unequal = TokenBatch.build(random_rows([3, 7]), None, 0, device="meta")
    assert language_model(model).states(unequal).shape == (2, 7, HIDDEN)
