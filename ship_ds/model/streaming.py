"""A 4-bit base model read one matrix at a time: no rank ever holds it whole in 16 bits, nor in 4
where it is sharded.

transformers' own loading ends with the whole quantised model on every rank, and only then can
DeepSpeed shard it. Here the model is built without weights; each tensor is read from its
safetensors file through a memory map, quantised, and given to `shard` before the next is read. The
bits are those of transformers' loading.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from ship_ds.model import nf4
from ship_ds.model.bitsandbytes_import import bitsandbytes
from ship_ds.model.language_model import auto_class
from ship_ds.model.nf4 import Nf4, pieces_of
from ship_ds.safetensors_header import missing_weight, other_shape
from ship_ds.weights_folder import WeightsFolder

Shard = Callable[[nn.Module], None]
"""Takes a module whose own parameters have just been loaded, and keeps this rank's share of them
alone."""


def empty_nf4_lm(settings: PreTrainedConfig, dtype: torch.dtype, attention: str) -> Any:
    """A language model whose linears are for 4 bits, without weights.

    Args:
        settings: Its transformers config.
        dtype: Of all that is not quantised.
        attention: The name of an attention function of transformers.
    """
    # Buffers, such as rotary frequencies, are in no file and have to be computed.
    with init_empty_weights(include_buffers=False):
        model = auto_class(settings).from_config(
            settings, dtype=dtype, attn_implementation=attention
        )
    quantiser = AutoHfQuantizer.from_config(nf4.config(dtype), pre_quantized=False)
    quantiser.preprocess_model(model, device_map=None)
    quantiser.postprocess_model(model)
    return model


def why_whole(folder: Path, model: Any) -> str | None:
    """Why transformers has to load this model as a whole; None where `fill` can read it one matrix
    at a time.

    Args:
        folder: Of the model.
        model: What `empty_nf4_lm` made of its config.
    """
    if not WeightsFolder.is_one(folder):
        return "it has no safetensors files"
    if getattr(model.config, "quantization_config", None) is None:
        return "it is not to be quantised"
    if get_model_conversion_mapping(model, add_legacy=False):
        return f"transformers converts the weights of {type(model).__name__} while it reads them"
    if any(getattr(module, "source_cls", None) is Conv1D for module in model.modules()):
        return f"the weights of {type(model).__name__} lie transposed in its files"
    # transformers' own rule; T5's feed-forward outputs overflow in fp16 alone.
    kept = model._keep_in_fp32_modules if model.dtype == torch.float16 else ()
    if kept or (model._keep_in_fp32_modules_strict and model.dtype != torch.float32):
        return f"{type(model).__name__} keeps some weights in fp32"
    return None


def fill(
    model: Any, folder: Path, dtype: torch.dtype, device: torch.device, shard: Shard | None = None
) -> None:
    """Read, quantise and shard the weights of `empty_nf4_lm`, module after module.

    Args:
        model: Gets its weights in place.
        folder: Where they are.
        dtype: Of all that is not quantised.
        device: Where the weights go.
        shard: Called on each module once it is loaded; None leaves all of it here.

    Raises:
        UserError: A file is missing or damaged, or a weight is missing, of another shape or no
            number.
    """
    weights = WeightsFolder(folder)
    tied = _tied(model, weights)
    for path, module in list(model.named_modules()):
        names = [name for name, parameter in module._parameters.items() if parameter is not None]
        for name in names:
            if f"{path}.{name}" not in tied:
                empty = module._parameters[name]
                tensor = _read(weights, f"{path}.{name}", empty)
                module._parameters[name] = _load(empty, tensor, dtype, device)
        # The decoder looks at the spread of the input embeddings: the engine shards them later.
        is_whole = not names or module is model.get_input_embeddings()
        if shard is not None and not is_whole and f"{path}.{names[0]}" not in tied:
            shard(module)
    for name, buffer in model.named_buffers():
        if name in weights.entries and name in model.state_dict():
            buffer.copy_(weights.read(name))
    model.tie_weights(missing_keys=set(tied), recompute_mapping=False)


def _tied(model: Any, weights: WeightsFolder) -> dict[str, str]:
    """Parameter -> the one that it is the same as: where the files lack it or repeat the other.

    A config may say that two weights are tied while the files hold different ones, as after a
    fine-tune of the output layer alone; transformers then keeps both.
    """
    return {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if target not in weights.entries
        or (source in weights.entries and torch.equal(weights.read(target), weights.read(source)))
    }


def _read(weights: WeightsFolder, path: str, expected: Tensor) -> Tensor:
    if path not in weights.entries:
        raise missing_weight(weights.folder, path)
    tensor = weights.read_numbers(path)
    if tensor.shape != expected.shape:
        file = weights.folder / weights.entries[path].file
        raise other_shape(file, path, tensor.shape, expected.shape)
    return tensor


def _load(empty: Any, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A parameter in the place of `empty`: on `device`, in 4 bits where that one is for them, and
    no longer backed by the file."""
    if not isinstance(empty, bitsandbytes.nn.Params4bit):
        return nn.Parameter(tensor.to(device=device, dtype=dtype, copy=True), requires_grad=False)
    pieces = pieces_of(tensor, dtype, device)
    return Nf4.of(tensor.shape, dtype, pieces, device).parameter(empty)
