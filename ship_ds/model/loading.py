"""Language models from a folder: the embedded tiny LM or the user's own, plain or in NF4; never
looked up on a hub."""

import contextlib
import copy
import warnings
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoQuantizationConfig

from ship_ds.config import ModelConfig, base_folder
from ship_ds.console import log
from ship_ds.errors import UserError, first_line
from ship_ds.kinds import ADAPTERS
from ship_ds.model import nf4
from ship_ds.model.attention import Choice, resolve, this_machine
from ship_ds.model.bitsandbytes_import import bitsandbytes
from ship_ds.model.elementwise import ElementwiseMode, compile_all
from ship_ds.model.language_model import (
    TEXT_MODEL,
    LanguageModel,
    auto_class,
    fills_in_words,
    implementation,
    language_model,
    reads_more_than_texts,
    without_weights,
)
from ship_ds.model.lean_modules import make_lean
from ship_ds.model.nf4_linear import use_nf4_linears
from ship_ds.model.streaming import Shard, empty_nf4_lm, fill, why_whole
from ship_ds.parsing import read_json_object
from ship_ds.prompt import ROLES, PromptFormat
from ship_ds.safetensors_header import missing_weight, other_shape
from ship_ds.weights_folder import WeightsFolder, is_finite

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
    # transformers' checks of a config raise classes of many kinds, huggingface_hub's among them,
    # which say on the second line what was expected.
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{folder / 'config.json'}: {text}; correct it, or download it again"
        ) from None
    # A file may name a kernel of the hub, which transformers would fetch and run.
    settings._attn_implementation = None
    settings._experts_implementation_internal = None
    return settings


def load_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base. Raises UserError where there is none that can be read."""
    folder = base_folder(base)
    try:
        return AutoTokenizer.from_pretrained(folder, **_FROM_FOLDER)
    # The Rust library behind it raises Exception itself.
    except Exception as error:
        raise UserError(
            f"{folder}: its tokenizer cannot be read: {first_line(error)}; download its files again"
        ) from None


def load_prompts(base: str, system_message: str | None) -> PromptFormat:
    """The prompt format of a base: its tokenizer, its template, and how its answers end.

    Raises:
        UserError: the folder or its tokenizer is missing or broken, or a prompt cannot be made.
    """
    folder = base_folder(base)
    settings = read_settings(folder)
    size = getattr(settings.get_text_config(decoder=True), "vocab_size", None)
    two_stacks = bool(getattr(settings, "is_encoder_decoder", False))
    return PromptFormat(load_tokenizer(base), system_message, _ends(folder), size, two_stacks)


def check_models(model: ModelConfig) -> Collection[PromptFormat]:
    """What can be known of a config's bases before a weight is loaded and before ranks meet: that
    their prompts can be made, and their models of their configs.

    Args:
        model: the run's `model` section.

    Returns:
        The prompt formats, one a base.

    Raises:
        UserError: one cannot be used; the message names the role.
    """
    formats: dict[str, PromptFormat] = {}
    ports: dict[str, LanguageModel] = {}
    adapts = "adapters" in ADAPTERS.implementation(model.hypernetwork).features(model.hypernetwork)
    for role in ROLES:
        base = getattr(model, role).base
        try:
            if base not in formats:
                formats[base] = load_prompts(base, model.system_message)
                ports[base] = _check_made(base_folder(base))
            if reason := _unfit(ports[base], role, adapts):
                raise UserError(f"{base}: {reason}")
        except UserError as error:
            raise UserError(f"model.{role}.base: {error}") from None
    return formats.values()


def _unfit(port: LanguageModel, role: str, adapts: bool) -> str | None:
    """Why a language model cannot be in a role, the Task LLM with adapters or without; None where
    it can."""
    settings: Any = port.module.config
    if not port.blocks() and reads_more_than_texts(settings):
        return "reads more than texts, and its blocks are in a model inside it; " + TEXT_MODEL
    reason = port.missing("adapters")
    if reason is not None and ((adapts and role == "task_llm") or not port.blocks()):
        return reason
    name = type(port.module).__name__
    try:
        num_heads = getattr(settings.get_text_config(decoder=True), "num_attention_heads", None)
    except RuntimeError:  # transformers' own, of a config with settings by layer
        return f"{name}: its layers have other numbers of heads each; give another base"
    if num_heads is None:
        return f"{name}: has no attention, which is counted on here; give another base"
    if role != "encoder" and fills_in_words(settings):
        return (
            f"{name}: reads a text in both directions (an encoder), and this role continues one: "
            "give a decoder-only model"
        )
    return None


def _check_made(folder: Path) -> LanguageModel:
    """The port around a folder's model on the meta device; raise UserError where transformers makes
    nothing of config.json or generation_config.json."""
    settings = read_settings(folder)
    with torch.device("meta"):
        port = language_model(without_weights(settings))
    how = getattr(settings, "quantization_config", None)
    if isinstance(how, dict):
        try:
            AutoQuantizationConfig.from_dict(how)
        except Exception as error:
            raise UserError(
                f"{folder / 'config.json'}: quantization_config: {first_line(error)}; correct it, "
                "or download it again"
            ) from None
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            GenerationConfig.from_pretrained(folder, **_FROM_FOLDER)
        except Exception as error:
            raise UserError(
                f"{path}: {first_line(error)}; correct it, or remove the file"
            ) from None
    return port


@contextlib.contextmanager
def _said_of_files(folder: Path) -> Iterator[None]:
    """Say in one line what of the folder's settings made its loading fail, if anything did."""
    try:
        yield
    except UserError:
        raise
    except Exception:
        _check_made(folder)
        raise


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
    elementwise: ElementwiseMode = "eager",
) -> nn.Module:
    """The language model in `dtype`; with "nf4" its linears in 4 bits with double quantisation
    (Dettmers et al. 2023).

    16- and 32-bit weights load on the CPU, 4-bit ones are made on the device.

    Args:
        base: a model folder, or "embedded".
        quantisation: "nf4", or "none", which leaves its linears as the folder has them.
        dtype: of all that is not quantised, and of the products.
        attention: the config's choice of a kernel, see `resolve`.
        device: where it will run, which decides the attention; None: on CUDA if this machine has
            it.
        shard: see streaming.py, for 4-bit weights alone; None: all of them stay here.
        elementwise: see lean_modules.py.

    Raises:
        UserError: there is no such folder, or its config or its weights cannot be taken; a kernel
            cannot run on the device, or NF4 with a linear of it on a CPU; or there is no compiler.
    """
    folder, device = base_folder(base), device or this_machine()
    if elementwise == "compiled":
        compile_all(device, dtype)
    settings = read_settings(folder)
    caps_scores = getattr(settings, "attn_logit_softcapping", None) is not None
    by_lengths = implementation(settings).goes_by_lengths
    kernel = resolve(attention, device, dtype, caps_scores, _runs_sdpa(settings), by_lengths)
    if quantisation == "none":
        is_packed = getattr(settings, "quantization_config", None) is not None
        where = {"device_map": {"": device}} if is_packed else {}
        with _said_of_files(folder):
            model = _load_whole(folder, settings, dtype=dtype, attn_implementation=kernel, **where)
    else:
        with _said_of_files(folder):
            model = _load_nf4(folder, settings, dtype, kernel, device, shard)
        if (share := _share_in_16_bits(model)) > _MOST_UNSAID:
            reason = (
                "transformers leaves the feed-forward outputs of a T5 as they are"
                if getattr(settings, "is_encoder_decoder", False)
                else "NF4 is for linears, and its experts are none"
            )
            _log_once(
                f"{base}: {100 * share:.0f} % of the weights in its blocks stay in 16 bits: "
                f"{reason}"
            )
    use_nf4_linears(model, device, base)
    return make_lean(model, elementwise)


_MOST_UNSAID = 0.05
_log_once = cache(log)
"""A base is loaded for each role."""


def _share_in_16_bits(model: Any) -> float:
    """Of the weights in the blocks of a model that was put into NF4, how many are as they were."""
    sizes = {True: 0, False: 0}
    for block in language_model(model).blocks().values():
        for one in block.parameters():
            if isinstance(one, bitsandbytes.nn.Params4bit):
                sizes[True] += 2 * one.numel()
            else:
                sizes[False] += one.numel()
    return sizes[False] / max(1, sum(sizes.values()))


def _runs_sdpa(settings: PreTrainedConfig) -> bool:
    """Whether transformers' class for this model takes other attention than its own."""
    chosen = auto_class(settings)._model_mapping[type(settings)]
    return bool(getattr(chosen, "_supports_sdpa", True))


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
        # It notes in its settings how it is quantised, and is not always the one that is loaded.
        model = empty_nf4_lm(copy.deepcopy(settings), dtype, kernel)
        reason = why_whole(folder, model)
        if reason is None:
            fill(model, folder, dtype, device, shard)
            return model.eval()
    if shard is not None:
        warnings.warn(
            f"{folder}: every rank loads the model whole before it is sharded: {reason}",
            stacklevel=2,
        )
    return _load_whole(
        folder,
        settings,
        dtype=dtype,
        attn_implementation=kernel,
        quantization_config=nf4.config(dtype),
        device_map={"": device},
    )


def _load_whole(folder: Path, settings: PreTrainedConfig, **how: Any) -> Any:
    """The model as transformers loads it, which fills up what the files lack with random weights.

    Args:
        folder: of the model.
        settings: what `read_settings` made of its config.json.
        how: for `from_pretrained`. With 4-bit weights a `device_map`: without, bitsandbytes takes
            the current GPU, whatever device the model is to be on.

    Raises:
        UserError: they lack a weight, or have one of another shape or that is no number.
    """
    model, loading_info = auto_class(settings).from_pretrained(
        folder,
        **_FROM_FOLDER,
        **how,
        # As `read_settings` left it: from the file again, it would name its own attention.
        config=settings,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    if missing := loading_info["missing_keys"]:
        raise missing_weight(folder, min(missing))
    for name, there, expected in sorted(loading_info["mismatched_keys"]):
        raise other_shape(folder, name, there, expected)
    # Codes of 4 bits do not tell, and to read the files once more for them takes too long.
    if "quantization_config" not in how and not all(map(is_finite, model.parameters())):
        _check_numbers(folder)
    return model


def _check_numbers(folder: Path) -> None:
    """Raise UserError for a tensor of the files that has no numbers; none has where they became
    infinite as they were cast."""
    if WeightsFolder.is_one(folder):
        weights = WeightsFolder(folder)
        for name in weights.entries:
            weights.read_numbers(name)


def stored_bytes(base: str, quantisation: Quantisation, dtype: torch.dtype) -> int:
    """The bytes that a base's weights take as they are held, by their shapes alone; without the
    scales of 4-bit ones.

    Args:
        base: a model folder, or "embedded".
        quantisation: "nf4", or "none", with which all are in `dtype`.
        dtype: of all that is not quantised.

    Raises:
        UserError: there is no such folder, or ship_ds knows no model with its config.
    """
    with torch.device("meta"):
        settings = read_settings(base_folder(base))
        model = without_weights(settings, dtype=dtype)
    linears = nf4.quantised_linears(model).values() if quantisation == "nf4" else ()
    packed = {id(linear.weight) for linear in linears}
    return sum(
        nf4.packed_bytes(p.numel()) if id(p) in packed else p.numel() * dtype.itemsize
        for p in model.parameters()
    )


def freeze(model: nn.Module) -> nn.Module:
    """The same model, without gradients and in evaluation mode."""
    return model.requires_grad_(False).eval()
