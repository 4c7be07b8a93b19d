"""Everything about NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314): what is
quantised, how many bytes it takes, and the codes themselves, bit for bit as bitsandbytes makes
them.

bitsandbytes makes several fp32 copies of the matrix that it quantises, seven times its 16-bit size
on a CPU. Blocks of 64 weights are independent of each other, so pieces of whole blocks give the
same codes; only the second level, over the blocks' scales, needs all of them, and they are 1/64 as
many.
"""

import ctypes
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ship_ds.model.bitsandbytes_import import bitsandbytes

# isort: split
from bitsandbytes import functional as bnb
from bitsandbytes.cextension import lib as native_library

BLOCK = 64
"""Weights that share a scale."""
_SUPERBLOCK = 256
"""Scales that share a scale of their own."""
_TABLE_BYTES = (16 + 256 + 1 + 1) * 4
"""The code books of the weights and of their scales, the offset and a scalar, in fp32."""
_OUTPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PIECE = 1 << 20
"""Weights that are quantised at once; a multiple of BLOCK."""

Pieces = Callable[[int, int], Tensor]
"""(start, end) -> weights start..end of the matrix in row-major order, as a flat tensor."""


def config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers and bitsandbytes are told; dtype: of the products.

    The 4-bit storage stays uint8: DeepSpeed casts every floating-point parameter to the engine's
    dtype, which would destroy a floating-point storage of another width.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def quantised_linears(model: Any) -> dict[str, nn.Linear]:
    """The linears that transformers would put in NF4, by module path; by its own rule, which
    leaves out the output layer and weights that are tied."""
    quantisation = config(torch.float32)
    skipped = AutoHfQuantizer.from_config(quantisation).get_modules_to_not_convert(
        model, quantisation.llm_int8_skip_modules, model._keep_in_fp32_modules
    )
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(path, skipped)
    }


def packed_bytes(num_weights: int) -> int:
    """Of the codes, two a byte."""
    return (num_weights + 1) // 2


def constants_bytes(num_weights: int) -> int:
    """Of what stands beside the codes: a byte a block, a float for 256 of those, the code books."""
    num_blocks = -(-num_weights // BLOCK)
    return num_blocks + 4 * -(-num_blocks // _SUPERBLOCK) + _TABLE_BYTES


def file_bytes(num_weights: int) -> int:
    """What one matrix takes in a safetensors file, about."""
    return packed_bytes(num_weights) + constants_bytes(num_weights) + 1024


def file_names(name: str) -> list[str]:
    """The tensors of a file that hold the weight `name`."""
    keys = (
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state.bitsandbytes__nf4",
    )
    return [name, *(f"{name}.{key}" for key in keys)]


def dequantised(packed: Tensor, state: bnb.QuantState, dtype: torch.dtype) -> Tensor:
    """The matrix behind 4-bit codes, as training and serving compute with it.

    On a CPU it lies in a buffer that the next call of this thread writes over: fresh memory of that
    size comes page by page from the system, which takes as long as the codes.

    Args:
        packed: two codes a byte.
        state: their scales; of one level or of two.
        dtype: of the result.
    """
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(scales, state.state2) + state.offset
    kernel = _KERNELS.get(dtype) if packed.device.type == "cpu" else None
    is_usual = state.quant_type == "nf4" and state.blocksize < 2048 and not state.shape[1] % BLOCK
    if kernel is None or not is_usual:
        made = dtype if dtype in _OUTPUT_DTYPES else torch.float32
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            packed.reshape(-1, 1), scales, state.blocksize, state.quant_type, state.shape, made
        )
        return weight.to(dtype)
    rows, columns = state.shape
    out = _scratch.matrix(rows, columns, dtype)
    packed, scales = packed.contiguous(), scales.float().contiguous()
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (packed, scales, out)]
    kernel(*pointers, *map(ctypes.c_longlong, (state.blocksize, rows, columns)))
    return out


def _cpu_kernels() -> dict[torch.dtype, Any]:
    """What bitsandbytes' operator calls on a CPU, which itself can only give fresh memory."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    # Its wrapper has every name, as a function that raises where it is called.
    library = vars(native_library).get("_lib")
    functions = {
        dtype: getattr(library, f"cdequantize_blockwise_cpu_nf4_{name}", None)
        for dtype, name in names.items()
    }
    return {dtype: function for dtype, function in functions.items() if function is not None}


class _Scratch(threading.local):
    """A buffer a dtype, as large as the largest matrix so far."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        size = rows * columns
        buffer = self.buffers.get(dtype)
        if buffer is None or len(buffer) < size:
            buffer = self.buffers[dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(rows, columns)


_KERNELS, _scratch = _cpu_kernels(), _Scratch()


def spans(num_weights: int) -> Iterator[tuple[int, int]]:
    """(start, end) of pieces of whole blocks; the last may be shorter."""
    return ((start, min(start + _PIECE, num_weights)) for start in range(0, num_weights, _PIECE))


def pieces_of(weight: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Pieces:
    """A matrix, perhaps backed by a file's pages, piece by piece in another dtype.

    Args:
        weight: the matrix; no more of it than the piece that is asked for is copied.
        dtype: of the pieces.
        device: where they are wanted; None: where the matrix is.
    """
    flat = weight.reshape(-1)
    return lambda start, end: flat[start:end].to(device=device, dtype=dtype)


@dataclass(frozen=True)
class Nf4:
    """A matrix in NF4.

    Args:
        packed: Two codes a byte, of shape (number of weights / 2, 1).
        state: bitsandbytes' scales and code books.
    """

    packed: Tensor
    state: bnb.QuantState

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        pieces: Pieces,
        device: torch.device | None = None,
    ) -> "Nf4":
        """Quantise a matrix piece by piece.

        Args:
            shape: Of the matrix.
            dtype: What a reader will dequantise to.
            pieces: The weights, on `device`.
            device: Where the codes are wanted; None for the CPU.
        """
        size = math.prod(shape)
        packed = torch.empty((packed_bytes(size), 1), dtype=torch.uint8, device=device)
        scales = torch.empty(-(-size // BLOCK), device=device)
        for start, end in spans(size):
            codes, state = bnb.quantize_4bit(pieces(start, end), quant_type="nf4", blocksize=BLOCK)
            packed[start // 2 : packed_bytes(end)] = codes
            scales[start // BLOCK : -(-end // BLOCK)] = state.absmax
        offset = scales.mean()
        absmax, second = bnb.quantize_blockwise(scales - offset, blocksize=_SUPERBLOCK)
        return cls(
            packed,
            bnb.QuantState(
                absmax=absmax,
                shape=torch.Size(shape),
                dtype=dtype,
                blocksize=BLOCK,
                code=state.code,
                quant_type="nf4",
                offset=offset,
                state2=second,
            ),
        )

    def pieces(self) -> Pieces:
        """The weights that training and serving compute with, in fp32."""
        scales = bnb.dequantize_blockwise(self.state.absmax, self.state.state2) + self.state.offset

        def piece(start: int, end: int) -> Tensor:
            state = bnb.QuantState(
                absmax=scales[start // BLOCK : -(-end // BLOCK)].contiguous(),
                shape=torch.Size((end - start,)),
                dtype=torch.float32,
                blocksize=BLOCK,
                code=self.state.code,
                quant_type="nf4",
            )
            weights: Tensor = bnb.dequantize_4bit(
                self.packed[start // 2 : packed_bytes(end)], state
            ).reshape(-1)
            return weights

        return piece

    def parameter(self, empty: bitsandbytes.nn.Params4bit) -> nn.Parameter:
        """What a Linear4bit computes with, in the place of the parameter that it was built with."""
        settings: dict[str, Any] = empty.__dict__ | {
            "quant_state": self.state,
            "bnb_quantized": True,
        }
        if settings["module"] is not None:
            settings["module"].quant_state = self.state
        parameter: nn.Parameter = bitsandbytes.nn.Params4bit(
            self.packed, requires_grad=False, **settings
        )
        return parameter

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As bitsandbytes saves them: the codes as `name`, the constants beside them."""
        saved = self.state.as_dict(packed=True)
        tensors = {name: self.packed} | {f"{name}.{key}": value for key, value in saved.items()}
        blob = f"{name}.quant_state.bitsandbytes__nf4"
        # JSON ignores trailing spaces, and whole multiples of 8 bytes keep what follows in the file
        # aligned.
        missing = -len(tensors[blob]) % 8
        tensors[blob] = nn.functional.pad(tensors[blob], (0, missing), value=ord(" "))
        return tensors
