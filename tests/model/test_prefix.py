"""An adapter's prefix: what a block attends to is what it would read before the prompt."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import StableLmConfig, StableLmForCausalLM

from ship_ds.model import attention
from ship_ds.model.adapters.prefix import PrefixAdapter
from ship_ds.model.adapters.sites import wrap_sites
from ship_ds.model.batch import TokenBatch
from ship_ds.model.generation import greedy
from ship_ds.model.language_model import LanguageModel, language_model
from tests.model.models import EOS, random_rows, tiny_lm

LENGTH, TASKS = 3, 2


def _wrapped(family: str) -> LanguageModel:
    model = tiny_lm(family)
    wrap_sites(model, ())
    return language_model(model)


@torch.no_grad()
def _as_read(lm: LanguageModel, rows: list[list[int]]) -> PrefixAdapter:
    """Keys and values of real tokens before position 0, one row a task: rotations depend on
    distances alone, so a prompt that starts at 0 sees them as it would see the tokens."""
    positions = torch.arange(-LENGTH, 0)[None].expand(len(rows), -1)
    cache = lm.module(
        input_ids=torch.tensor(rows), position_ids=positions, use_cache=True
    ).past_key_values
    return PrefixAdapter(
        {
            path: torch.stack([layer.keys, layer.values], 1)
            for path, layer in zip(lm.blocks(), cache.layers, strict=True)
        }
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_prefix_of_a_texts_states_acts_as_the_text(family: str) -> None:
    lm, prefixes = _wrapped(family), random_rows([LENGTH] * TASKS, 8)
    adapter = _as_read(lm, prefixes)
    prompts, targets = random_rows([5, 2, 4, 6], 3), random_rows([2, 3, 1, 2], 4)
    logits, labels = lm.score(TokenBatch.build(prompts, targets, 0), adapter, TASKS)
    longer = [[*prefixes[e // 2], *prompt] for e, prompt in enumerate(prompts)]
    expected, same = lm.score(TokenBatch.build(longer, targets, 0))
    assert torch.equal(labels, same)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    bare, _ = lm.score(TokenBatch.build(prompts, targets, 0))
    assert float((bare - expected).detach().abs().max()) > 0.1
    answers = greedy(lm.stream(TokenBatch.build(prompts, None, 0), adapter), EOS, 6)
    assert answers == greedy(lm.stream(TokenBatch.build(longer, None, 0)), EOS, 6)


def test_two_prefixes_alive_keep_their_gradients_under_checkpointing() -> None:
    """Both forwards, then both backwards: the recomputation sees the adapter of its own forward."""
    lm = _wrapped("llama")
    batch = TokenBatch.build(random_rows([5, 3], 3), random_rows([2, 2], 4), 0)

    def gradients(checkpointing: bool) -> list[Tensor]:
        made = [_as_read(lm, random_rows([LENGTH] * TASKS, seed)) for seed in (5, 6)]
        alive = [
            replace(one, states={k: v.clone().requires_grad_() for k, v in one.states.items()})
            for one in made
        ]
        sums = [
            torch.nn.functional.cross_entropy(
                *lm.score(batch, one, TASKS, checkpointing=checkpointing)
            )
            for one in alive
        ]
        for total in sums:
            total.backward()
        return [state.grad for one in alive for state in one.states.values()]  # type: ignore[misc]

    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        assert float(plain.abs().max()) > 0
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_prefix_leaves_the_kernel_of_a_gpu_for_sdpa(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA in bf16: whole rows, no mask, and lengths for the kernel."""
    prompts, targets = random_rows([5, 2, 4, 6], 3), random_rows([2, 3, 1, 2], 4)
    batch = TokenBatch.build(prompts, targets, 0)
    logits = []
    for implementation in (None, attention.VARLEN):
        model = tiny_lm(family, implementation)
        wrap_sites(model, ())
        lm = language_model(model)
        adapter = _as_read(lm, random_rows([LENGTH] * TASKS, 8))
        if implementation is not None:
            monkeypatch.setattr(attention, "kernel_runs", lambda device, dtype: True)
        logits.append(lm.score(batch, adapter, TASKS)[0])
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_a_model_whose_attention_takes_no_prefix_says_so() -> None:
    reason = language_model(tiny_lm("gemma2")).missing("prefix")
    assert reason is not None and reason.count("\n") == 0 and "eager" in reason
    assert language_model(tiny_lm("llama")).missing("prefix") is None
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    stablelm = StableLmForCausalLM(
        StableLmConfig(vocab_size=9, intermediate_size=8, num_key_value_heads=2, **sizes)
    )
    reason = language_model(stablelm).missing("prefix")
    assert reason is not None and "do not hand a prefix on" in reason
