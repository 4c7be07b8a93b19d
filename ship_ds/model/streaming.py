"""A 4-bit base read one matrix at a time: no rank ever holds the model whole in 16 bits, nor in 4
where it is sharded.

transformers' own loading ends with the whole quantised model on every rank, and only then can
DeepSpeed shard it. Here the model is built without weights; each tensor is read from its
safetensors file through a memory map, quantised, and given to `shard` before the next is read. The
bits are those of transformers' loading.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.auto import AutoHfQuantizer

from ship_ds.errors import UserError

Shard = Callable[[nn.Module], None]
"""Takes a module whose own parameters have just been loaded and leaves this rank's share of
them."""
_BLOCKS_A_SLICE = 1 << 14
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightFiles:
    """The tensors of a model folder by name: one safetensors file, or several with an index."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError for a file that is missing or cut short; the headers are read, the
        weights are not."""
        self.folder = folder
        self.file_of: dict[str, str] = {}
        self._open: tuple[str, Any] | None = None
        index = folder / _INDEX
        names = (
            set(json.loads(index.read_text())["weight_map"].values())
            if index.is_file()
            else {_SINGLE}
        )
        for name in sorted(names):
            self.file_of |= dict.fromkeys(self._file(name).keys(), name)

    @staticmethod
    def are_in(folder: Path) -> bool:
        return (folder / _SINGLE).is_file() or (folder / _INDEX).is_file()

    def read(self, name: str) -> Tensor:
        """Backed by the file's pages until it is copied."""
        tensor: Tensor = self._file(self.file_of[name]).get_tensor(name)
        return tensor

    def _file(self, name: str) -> Any:
        """One file is open at a time."""
        if self._open is None or self._open[0] != name:
            path = self.folder / name
            try:
                self._open = name, safe_open(path, framework="pt")
            except FileNotFoundError:
                raise UserError(
                    f"{path}: missing, and {_INDEX} lists it; download the model again"
                ) from None
            except SafetensorError as error:
                raise UserError(
                    f"{path}: damaged or cut short ({error}); download it again"
                ) from None
        return self._open[1]


def empty_nf4_lm(
    settings: PreTrainedConfig, dtype: torch.dtype, attention: str, quantisation: BitsAndBytesConfig
) -> Any:
    """The model with its linears for 4 bits and no weights; its buffers are computed."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            settings, dtype=dtype, attn_implementation=attention
        )
    quantiser = AutoHfQuantizer.from_config(quantisation, pre_quantized=False)
    quantiser.preprocess_model(model, device_map=None)
    quantiser.postprocess_model(model)
    return model


def why_whole(folder: Path, model: Any) -> str | None:
    """Why this model has to be loaded as a whole; None: it can be read one matrix at a time."""
    if not WeightFiles.are_in(folder):
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
    files = WeightFiles(folder)
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
        if name in files.file_of and name in model.state_dict():
            buffer.copy_(files.read(name))
    model.tie_weights(missing_keys=set(tied), recompute_mapping=False)


def _tied(model: Any, files: WeightFiles) -> dict[str, str]:
    """Weights that are another one: those that the files lack or repeat."""
    return {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if target not in files.file_of
        or (source in files.file_of and torch.equal(files.read(target), files.read(source)))
    }


def _read(files: WeightFiles, path: str, expected: Tensor) -> Tensor:
    if path not in files.file_of:
        raise UserError(
            f"{files.folder}: no weight {path} in its safetensors files; its "
            "config.json describes another model"
        )
    tensor = files.read(path)
    if tensor.shape != expected.shape:
        raise UserError(
            f"{files.folder / files.file_of[path]}: {path} is {tuple(tensor.shape)}, "
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
    packed, state = _four_bits(tensor, empty, dtype, device)
    settings = empty.__dict__ | {"quant_state": state, "bnb_quantized": True}
    if settings["module"] is not None:
        settings["module"].quant_state = state
    quantised: nn.Parameter = bnb.nn.Params4bit(packed, requires_grad=False, **settings)
    return quantised


def _four_bits(
    tensor: Tensor, settings: Any, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, bnb.functional.QuantState]:
    """The bits and constants of `bnb.functional.quantize_4bit`, in slices: on a CPU that takes
    seven times the 16-bit matrix for its temporaries.

    Blocks do not reach over slices, and the constants are quantised in turn when all of them are
    there.
    """
    pieces = [
        bnb.functional.quantize_4bit(
            piece.to(device=device, dtype=dtype),
            blocksize=settings.blocksize,
            compress_statistics=False,
            quant_type=settings.quant_type,
            quant_storage=settings.quant_storage,
        )
        for piece in tensor.reshape(-1).split(_BLOCKS_A_SLICE * settings.blocksize)
    ]
    state = pieces[0][1]
    state.shape, state.absmax = tensor.shape, torch.cat([own.absmax for _, own in pieces])
    if settings.compress_statistics:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = bnb.functional.quantize_blockwise(
            state.absmax - state.offset, blocksize=256
        )
        state.nested = True
    return torch.cat([packed for packed, _ in pieces]), state
