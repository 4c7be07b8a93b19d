"""Tiny random language models of several families, and batches for them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.model.attention import SDPA
from ship_ds.model.batch import TokenBatch
from ship_ds.model.generation import greedy
from ship_ds.model.language_model import Stream, language_model

VOCABULARY, HIDDEN, EOS = 61, 64, 1
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2")


def tiny_lm(family: str, attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    """Random weights large enough that logits tell mistakes apart; sliding windows of 4 tokens,
    Gemma tied and capped."""
    torch.manual_seed(seed)
    sliding = {"sliding_window": 4}
    attention = attention or ("eager" if family == "gemma2" else SDPA)
    sizes = {**_SIZES, "initializer_range": 0.2, "attn_implementation": attention}
    match family:
        case "llama":
            model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**sizes))
        case "qwen2":
            sizes.pop("head_dim")
            model = Qwen2ForCausalLM(
                Qwen2Config(**sizes, use_sliding_window=True, max_window_layers=1, **sliding)
            )
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**sizes))
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**sizes, **sliding))
        case _:
            model = Gemma2ForCausalLM(
                Gemma2Config(
                    **sizes,
                    **sliding,
                    query_pre_attn_scalar=16,
                    attn_logit_softcapping=2.0,
                    final_logit_softcapping=3.0,
                    tie_word_embeddings=True,
                )
            )
    return model.eval()


def tiny_t5(version: str = "1.1", seed: int = 0, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """Two blocks a stack, large biases by distance. Version 1.0: ReLU, tied and scaled output
    layer; 1.1, Flan-T5's too: gated GELU and an output layer of its own."""
    torch.manual_seed(seed)
    is_old = version == "1.0"
    config = T5Config(
        vocab_size=vocabulary,
        d_model=HIDDEN,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="relu" if is_old else "gated-gelu",
        tie_word_embeddings=is_old,
        initializer_factor=1.5,
        pad_token_id=0,
        eos_token_id=EOS,
        decoder_start_token_id=0,
        attn_implementation=SDPA,
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_(std=1.0)
            elif (not is_old and ".q." in name) or ".k." in name:
                parameter.mul_(2.0)
    if not is_old:
        model.lm_head.weight = nn.Parameter(0.3 * torch.randn(vocabulary, HIDDEN))
    return model.eval()


def random_lora(
    sites: Mapping[str, tuple[int, int]], num_tasks: int, rank: int = 3, seed: int = 1
) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.2).requires_grad_()

    return LoraAdapter(
        {
            path: (draw(num_tasks, rank, num_in), draw(num_tasks, num_out, rank))
            for path, (num_in, num_out) in sites.items()
        },
        2.0,
    )


def random_rows(lengths: Sequence[int], seed: int = 2) -> list[list[int]]:
    """Token ids without padding and end-of-sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths
    ]


def label_logits(
    model: nn.Module,
    batch: TokenBatch,
    soft: Tensor | None = None,
    adapter: Adapter | None = None,
    *,
    num_tasks: int = 1,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`score` of the port around a transformers model."""
    return language_model(model).score(batch, adapter, num_tasks, soft=soft, **options)


def stream_of(
    model: nn.Module,
    prompts: TokenBatch,
    soft: Tensor | None = None,
    adapter: Adapter | None = None,
) -> Stream:
    """`stream` of the port around a transformers model."""
    return language_model(model).stream(prompts, adapter, soft=soft)


def greedy_rows(
    model: nn.Module,
    prompts: TokenBatch,
    soft: Tensor | None,
    adapter: Adapter | None,
    eos_id: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy continuations of prompts."""
    return greedy(stream_of(model, prompts, soft, adapter), eos_id, max_new_tokens)


def wake_up(ship: nn.Module) -> None:
    """No factor that starts at zero is zero any more, so every gradient can show."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in ship.named_parameters():
            if "lora_b" in name or "to_b" in name or "without_latent" in name:
                parameter.normal_(std=0.1)
