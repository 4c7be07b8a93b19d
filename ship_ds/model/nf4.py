"""Everything about NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314): what is
quantised, how many bytes it takes, and the codes themselves, bit for bit as bitsandbytes makes
them.

bitsandbytes makes several fp32 copies of the matrix that it quantises, seven times its 16-bit size
on a CPU. Blocks of 64 weights are independent of each other, so pieces of whole blocks give the
same codes; only the second level, over the blocks' scales, needs all of them, and they are 1/64 as
many.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from bitsandbytes import functional as bnb
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ship_ds.errors import UserError

BLOCK = 64
"""Weights that share a scale."""
_SUPERBLOCK = 256
"""Scales that share a scale of their own."""
_TABLE_BYTES = (16 + 256 + 1 + 1) * 4
"""The code books of the weights and of their scales, the offset and a scalar, in fp32."""
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


def guard_linears(model: nn.Module, device: torch.device, base: str) -> None:
    """Keep bitsandbytes from computing wrongly on a CPU.

    Raises:
        UserError: A linear's inputs do not split into blocks; bitsandbytes raises nothing there.
    """
    for path, module in model.named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        # A no-grad forward on a CPU with AVX512-BF16 repacks the weight in place, and the next
        # training step computes with what it takes for the old layout.
        module.support_avx512bf16_for_cpu = False
        if device.type == "cpu" and module.in_features % BLOCK:
            raise UserError(
                f"{base}: {path} has {module.in_features} inputs, and in nf4 bitsandbytes computes "
                f"wrongly on a CPU unless they are a multiple of {BLOCK}: set quantisation=none"
            )


def spans(num_weights: int) -> Iterator[tuple[int, int]]:
    """(start, end) of pieces of whole blocks; the last may be shorter."""
    return ((start, min(start + _PIECE, num_weights)) for start in range(0, num_weights, _PIECE))


def pieces_of(weight: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Pieces:
    """A matrix, perhaps backed by a file's pages, piece by piece in another dtype."""
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
