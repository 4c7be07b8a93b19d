"""Language models from a folder: the embedded tiny LM or the user's own, plain or in NF4; never looked up on a hub."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from ship_ds.config import LoraTuning
from ship_ds.errors import UserError

Quantisation = Literal["nf4", "none"]


def base_folder(base: str) -> Path:
    """Where the model is; raises UserError when it is not a model folder."""
    folder = Path(str(resources.files("ship_ds") / "assets" / "tiny_lm")) if base == "embedded" else Path(base)
    if not (folder / "config.json").is_file():
        raise UserError(f"{base}: expected a model folder with a config.json; download the model first and give its folder")
    return folder


def load_tokenizer(base: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base_folder(base), local_files_only=True)


def load_lm(base: str, quantisation: Quantisation, dtype: torch.dtype) -> nn.Module:
    """The causal LM in `dtype`; with "nf4" its linears in 4 bits with double quantisation (Dettmers et al. 2023).

    The 4-bit storage stays uint8: DeepSpeed casts every floating-point parameter to the engine's dtype, which would
    destroy a floating-point storage of another width.
    """
    extra: dict[str, Any] = {}
    if quantisation == "nf4":
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(
        base_folder(base), local_files_only=True, dtype=dtype, attn_implementation="sdpa", **extra
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # A no-grad forward on a CPU with AVX512-BF16 repacks the weight in place; the next training step is then wrong.
            module.support_avx512bf16_for_cpu = False
    return model


def freeze(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False).eval()


def add_static_lora(model: nn.Module, tuning: LoraTuning) -> nn.Module:
    """The frozen model with a trained LoRA of its own, through `peft`."""
    from peft import LoraConfig, inject_adapter_in_model

    freeze(model)
    config = LoraConfig(
        r=tuning.rank, lora_alpha=tuning.alpha, lora_dropout=tuning.dropout,  # type: ignore[arg-type]
        target_modules=list(tuning.targets),
    )
    return inject_adapter_in_model(config, model)


LmLoader = Callable[[], nn.Module]
