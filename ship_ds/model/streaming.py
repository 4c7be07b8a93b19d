"""A 4-bit base read one matrix at a time: no rank ever holds the model whole in 16 bits, nor in 4
where it is sharded.

transformers' own loading ends with the whole quantised model on every rank, and only then can
DeepSpeed shard it. Here the model is built without weights; each tensor is read from its
safetensors file through a memory map, quantised, and given to `shard` before the next is read. The
bits are those of transformers' loading.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.auto import AutoHfQuantizer

from ship_ds.errors import UserError
from ship_ds.model import nf4
from ship_ds.model.language_model import auto_class
from ship_ds.model.nf4 import Nf4, pieces_of
from ship_ds.weights_folder import WeightsFolder

Shard = Callable[[nn.Module], None]
"""Takes a module whose own parameters have just been loaded and leaves this rank's share of
them."""


def empty_nf4_lm(settings: PreTrainedConfig, dtype: torch.dtype, attention: str) -> Any:
    """The model with its linears for 4 bits and no weights; its buffers are computed."""
    with init_empty_weights(include_buffers=False):
        model = auto_class(settings).from_config(
            settings, dtype=dtype, attn_implementation=attention
        )
    quantiser = AutoHfQuantizer.from_config(nf4.config(dtype), pre_quantized=False)
    quantiser.preprocess_model(model, device_map=None)
    quantiser.postprocess_model(model)
    return model


def why_whole(folder: Path, model: Any) -> str | None:
    """Why this model has to be loaded as a whole; None: it can be read one matrix at a time."""
    if not WeightsFolder.is_one(folder):
        return "it has no safetensors files"
    if getattr(model.config, "quantization_config", None) is None:
        return "it is not to be quantised"
    if get_model_conversion_mapping(model, add_legacy=False):
        return f"transformers converts the weights of {type(model).__name__} while it reads them"
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        return f"{type(model).__name__} keeps some weights in fp32"
    return None


def fill(
    model: Any, folder: Path, dtype: torch.dtype, device: torch.device, shard: Shard | None = None
) -> None:
    """Read, quantise and shard the weights of `empty_nf4_lm`, module after module.

    The input embeddings are left whole for the engine to shard, since the decoder looks at their
    spread. Raises UserError for a missing or damaged file, and for a weight that is missing or of
    another shape.
    """
    files = WeightsFolder(folder)
    tied = _tied(model, files)
    for path, module in list(model.named_modules()):
        names = [name for name in module._parameters if module._parameters[name] is not None]
        for name in names:
            whole = f"{path}.{name}"
            if whole not in tied:
                module._parameters[name] = _loaded(
                    module, name, _read(files, whole, module._parameters[name]), dtype, device
                )
        if (
            shard is not None
            and names
            and module is not model.get_input_embeddings()
            and f"{path}.{names[0]}" not in tied
        ):
            shard(module)
    for name, buffer in model.named_buffers():
        if name in files.entries and name in model.state_dict():
            buffer.copy_(files.read(name))
    model.tie_weights(missing_keys=set(tied), recompute_mapping=False)


def _tied(model: Any, files: WeightsFolder) -> dict[str, str]:
    """Weights that are another one: those that the files lack or repeat."""
    return {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if target not in files.entries
        or (source in files.entries and torch.equal(files.read(target), files.read(source)))
    }


def _read(files: WeightsFolder, path: str, expected: Tensor) -> Tensor:
    if path not in files.entries:
        raise UserError(
            f"{files.folder}: no weight {path} in its safetensors files; its "
            "config.json describes another model"
        )
    tensor = files.read(path)
    if tensor.shape != expected.shape:
        raise UserError(
            f"{files.folder / files.entries[path].file}: {path} is {tuple(tensor.shape)}, "
            f"and config.json says {tuple(expected.shape)}"
        )
    return tensor


def _loaded(
    module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device
) -> nn.Parameter:
    """On `device`, in 4 bits where the module wants it, and no longer backed by the file."""
    empty: Any = module._parameters[name]
    if not isinstance(empty, bnb.nn.Params4bit):
        return nn.Parameter(tensor.to(device=device, dtype=dtype, copy=True), requires_grad=False)
    pieces = pieces_of(tensor, dtype, device)
    return Nf4.of(tensor.shape, dtype, pieces, device).parameter(empty)
