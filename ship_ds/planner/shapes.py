"""SHIP on the meta device: every weight has its shape and takes no memory.

A base is a folder with a config.json (weights are not needed), "embedded", or the name of a public
shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from ship_ds.config import (
    Config,
    EncoderConfig,
    LoraTuning,
    ModelConfig,
    override_config,
)
from ship_ds.errors import UserError
from ship_ds.model import nf4
from ship_ds.model.adapters import wrap_sites
from ship_ds.model.backbone import add_static_lora, base_folder, freeze
from ship_ds.model.decoder import Decoder
from ship_ds.model.encoder import Encoder
from ship_ds.model.hypernetwork import Hypernetwork, build_hypernetwork, targets_of
from ship_ds.planner.attention import PLANNED


def _llama(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
    )


def public_shapes() -> Mapping[str, PreTrainedConfig]:
    """As in the config.json that each model is published with."""
    return {
        "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
        "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000),
        "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
        "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
        "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128256),
        "mistral-7b": MistralConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32000,
        ),
        "qwen2.5-7b": Qwen2Config(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            tie_word_embeddings=False,
        ),
    }


@dataclass(frozen=True)
class Weight:
    """One parameter: how many values, whether it is trained, and whether it lies in NF4."""

    path: str
    numel: int
    is_trained: bool
    is_nf4: bool

    def stored_bytes(self, dtype_bytes: int) -> int:
        return nf4.packed_bytes(self.numel) if self.is_nf4 else self.numel * dtype_bytes

    @property
    def stored_elements(self) -> int:
        """As DeepSpeed counts them: two 4-bit values are one uint8."""
        return nf4.packed_bytes(self.numel) if self.is_nf4 else self.numel

    @property
    def quant_state_bytes(self) -> int:
        """Scales (a byte a block, scaled in turn) and code books; never sharded."""
        return nf4.constants_bytes(self.numel) if self.is_nf4 else 0


@dataclass(frozen=True, eq=False)
class Shapes:
    """The parts of SHIP on the meta device, as `ShipModel` puts them together."""

    config: ModelConfig
    dtype: torch.dtype
    encoder: Encoder
    decoder: Decoder
    task_lm: nn.Module
    hypernetwork: Hypernetwork
    nf4_paths: frozenset[str]

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {
            "encoder": self.encoder,
            "hypernetwork": self.hypernetwork,
            "decoder": self.decoder,
            "task LLM": self.task_lm,
        }

    def weights(self, part: str) -> list[Weight]:
        return [
            Weight(
                path, parameter.numel(), parameter.requires_grad, f"{part}.{path}" in self.nf4_paths
            )
            for path, parameter in self.parts[part].named_parameters()
        ]


@lru_cache(maxsize=4)
def build_shapes(config: ModelConfig, dtype: torch.dtype) -> Shapes:
    """Raises UserError for what the real model would refuse too: a missing base or target, sizes
    that do not fit."""
    with torch.device("meta"):
        task_lm = freeze(meta_lm(config.task_llm.base, dtype))
        quantised = {
            "task LLM": _quantised(task_lm) if config.task_llm.quantisation == "nf4" else []
        }
        sites = wrap_sites(task_lm, targets_of(config.hypernetwork))
        hypernetwork = build_hypernetwork(
            config.hypernetwork, config.latent_size, sites, hidden_size(task_lm)
        )
        encoder_lm, quantised["encoder"] = _role_lm(config.encoder, dtype)
        encoder = Encoder(encoder_lm, hidden_size(encoder_lm), config.latent_size)
        encoder_lm.lm_head = nn.Identity()
        decoder_lm, quantised["decoder"] = _role_lm(config.decoder, dtype)
        decoder = Decoder(
            decoder_lm,
            hidden_size(decoder_lm),
            config.latent_size,
            config.decoder.num_soft_tokens,
            config.decoder.fusion,
        )
    parts: dict[str, nn.Module] = {"encoder": encoder, "decoder": decoder, "task LLM": task_lm}
    marked = {id(weight) for weights in quantised.values() for weight in weights}
    paths = {
        f"{part}.{path}"
        for part, module in parts.items()
        for path, parameter in module.named_parameters()
        if id(parameter) in marked
    }
    for module in (*parts.values(), hypernetwork):
        module.to(dtype)
    return Shapes(config, dtype, encoder, decoder, task_lm, hypernetwork, frozenset(paths))


def with_shapes(config: Config, name: str) -> Config:
    """The config with a public shape in place of the Task LLM's base, and of every base that is the
    same one."""
    if name not in public_shapes():
        raise UserError(f"--shapes {name}: unknown; known are {', '.join(public_shapes())}")
    model = config.model
    same = [
        role
        for role in ("encoder", "decoder", "task_llm")
        if getattr(model, role).base == model.task_llm.base
    ]
    return override_config(config, [f"model.{role}.base={name}" for role in same])


def base_config(base: str) -> PreTrainedConfig:
    if base in public_shapes():
        return public_shapes()[base]
    try:
        return AutoConfig.from_pretrained(base_folder(base), local_files_only=True)
    except UserError as error:
        raise UserError(
            f"{error}; or plan with --shapes and one of {', '.join(public_shapes())}"
        ) from None


def meta_lm(base: str, dtype: torch.dtype) -> nn.Module:
    return AutoModelForCausalLM.from_config(
        base_config(base), dtype=dtype, attn_implementation=PLANNED
    )


def hidden_size(lm: Any) -> int:
    size: int = lm.get_input_embeddings().embedding_dim
    return size


def _quantised(lm: Any) -> list[torch.Tensor]:
    return [linear.weight for linear in nf4.quantised_linears(lm).values()]


def _role_lm(config: EncoderConfig, dtype: torch.dtype) -> tuple[nn.Module, list[torch.Tensor]]:
    lm = meta_lm(config.base, dtype)
    quantised = _quantised(lm) if config.quantisation == "nf4" else []
    return (
        add_static_lora(lm, config.tuning) if isinstance(config.tuning, LoraTuning) else lm
    ), quantised
