"""Language models from a folder: the embedded tiny LM or the user's own, plain or in NF4; never
looked up on a hub."""

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ship_ds.config import base_folder
from ship_ds.errors import UserError
from ship_ds.model import nf4
from ship_ds.model.attention import Choice, resolve, this_machine
from ship_ds.model.language_model import auto_class
from ship_ds.model.nf4_linear import use_nf4_linears
from ship_ds.model.streaming import Shard, empty_nf4_lm, fill, why_whole
from ship_ds.parsing import read_json_object
from ship_ds.prompt import PromptFormat

Quantisation = Literal["nf4", "none"]


_FROM_FOLDER: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is looked up on a hub, and no code of a model folder runs: None, transformers' default,
would ask on the terminal whether to run it."""


def read_settings(folder: Path) -> PreTrainedConfig:
    """The transformers config of a model folder, whose own code is never run.

    Raises:
        UserError: this transformers does not know the model without that code, or the file is none.
    """
    try:
        settings: PreTrainedConfig = AutoConfig.from_pretrained(folder, **_FROM_FOLDER)
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder / 'config.json'}: {reason}") from None
    return settings


def load_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base. Raises UserError where there is no such folder."""
    return AutoTokenizer.from_pretrained(base_folder(base), **_FROM_FOLDER)


def load_prompts(base: str, system_message: str | None) -> PromptFormat:
    """The prompt format of a base: its tokenizer, its template, and how its answers end.

    Raises:
        UserError: the folder or its tokenizer is missing or broken, or a prompt cannot be made.
    """
    folder = base_folder(base)
    settings = read_settings(folder)
    size = getattr(settings.get_text_config(decoder=True), "vocab_size", None)
    return PromptFormat(load_tokenizer(base), system_message, _ends(folder), size)


def _ends(folder: Path) -> tuple[int, ...]:
    """Tokens that end an answer, as generation_config.json lists them."""
    path = folder / "generation_config.json"
    ids = read_json_object(path).get("eos_token_id") if path.is_file() else None
    ids = ids if isinstance(ids, list) else [ids]
    return tuple(one for one in ids if isinstance(one, int))


def load_lm(
    base: str,
    quantisation: Quantisation,
    dtype: torch.dtype,
    attention: Choice = "auto",
    device: torch.device | None = None,
    shard: Shard | None = None,
) -> nn.Module:
    """The causal LM in `dtype`; with "nf4" its linears in 4 bits with double quantisation (Dettmers
    et al. 2023).

    device: where it will run (None: on CUDA if this machine has it); it decides the attention. 16-
    and 32-bit weights load on the CPU, 4-bit ones are made on the device. shard: see streaming.py;
    for 4-bit weights alone.
    """
    folder, device = base_folder(base), device or this_machine()
    settings = read_settings(folder)
    caps_scores = getattr(settings, "attn_logit_softcapping", None) is not None
    kernel = resolve(attention, device, dtype, caps_scores)
    if quantisation == "none":
        model = auto_class(settings).from_pretrained(
            folder, dtype=dtype, attn_implementation=kernel, **_FROM_FOLDER
        )
    else:
        model = _load_nf4(folder, settings, dtype, kernel, device, shard)
    use_nf4_linears(model, device, base)
    return model


def _load_nf4(
    folder: Path,
    settings: PreTrainedConfig,
    dtype: torch.dtype,
    kernel: str,
    device: torch.device,
    shard: Shard | None,
) -> Any:
    """One matrix at a time where the files allow it, else through transformers, which holds the
    model whole."""
    reason: str | None = "it is quantised already"
    if getattr(settings, "quantization_config", None) is None:
        model = empty_nf4_lm(settings, dtype, kernel)
        reason = why_whole(folder, model)
        if reason is None:
            fill(model, folder, dtype, device, shard)
            return model.eval()
    if shard is not None:
        warnings.warn(
            f"{folder}: every rank loads the model whole before it is sharded: {reason}",
            stacklevel=2,
        )
    return auto_class(settings).from_pretrained(
        folder,
        **_FROM_FOLDER,
        dtype=dtype,
        attn_implementation=kernel,
        quantization_config=nf4.config(dtype),
    )


def stored_bytes(base: str, quantisation: Quantisation, dtype: torch.dtype) -> int:
    """Of the weights as they are held, by their shapes alone; without the scales of 4-bit ones."""
    with torch.device("meta"):
        settings = read_settings(base_folder(base))
        model = auto_class(settings).from_config(settings, dtype=dtype)
    linears = nf4.quantised_linears(model).values() if quantisation == "nf4" else ()
    packed = {id(linear.weight) for linear in linears}
    return sum(
        nf4.packed_bytes(p.numel()) if id(p) in packed else p.numel() * dtype.itemsize
        for p in model.parameters()
    )


def freeze(model: nn.Module) -> nn.Module:
    """The same model, without gradients and in evaluation mode."""
    return model.requires_grad_(False).eval()
