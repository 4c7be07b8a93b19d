"""NF4 with double quantisation (Dettmers et al. 2023), a piece of a matrix at a time and bit for
bit as bitsandbytes does.

bitsandbytes makes several fp32 copies of what it quantises. Blocks of 64 weights are independent of
each other, so pieces of whole blocks give the same codes; only the second level, over the blocks'
scales, needs all of them, and that is 1/64 of it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from ship_ds.errors import UserError

BLOCK = 64
_PIECE = 1 << 20
"""Weights in a piece."""

Pieces = Callable[[int, int], Tensor]
"""(start, end) -> weights start..end of the matrix in row-major order, flat, in fp32."""


def spans(num_weights: int) -> Iterator[tuple[int, int]]:
    """Pieces of whole blocks."""
    return ((start, min(start + _PIECE, num_weights)) for start in range(0, num_weights, _PIECE))


def pieces_of(weight: Tensor) -> Pieces:
    flat = weight.reshape(-1)
    return lambda start, end: flat[start:end].float()


@dataclass(frozen=True)
class Nf4:
    """packed: two codes a byte, (num_weights / 2, 1)."""

    packed: Tensor
    state: bnb.QuantState

    @classmethod
    def of(cls, name: str, shape: Sequence[int], dtype: torch.dtype, pieces: Pieces) -> "Nf4":
        """dtype: what a reader will dequantise to. Raises UserError for a matrix that does not
        split into blocks by row."""
        if shape[-1] % BLOCK:
            raise UserError(
                f"{name}: has {shape[-1]} inputs; nf4 needs a multiple of {BLOCK}: use "
                "--target original"
            )
        size = math.prod(shape)
        packed = torch.empty((size // 2, 1), dtype=torch.uint8)
        scales = torch.empty(size // BLOCK)
        for start, end in spans(size):
            codes, state = bnb.quantize_4bit(pieces(start, end), quant_type="nf4", blocksize=BLOCK)
            packed[start // 2 : end // 2], scales[start // BLOCK : end // BLOCK] = (
                codes,
                state.absmax,
            )
        offset = scales.mean()
        absmax, second = bnb.quantize_blockwise(scales - offset, blocksize=256)
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
        """The weights that training and serving compute with."""
        scales = bnb.dequantize_blockwise(self.state.absmax, self.state.state2) + self.state.offset

        def piece(start: int, end: int) -> Tensor:
            part = bnb.QuantState(
                absmax=scales[start // BLOCK : end // BLOCK].contiguous(),
                shape=torch.Size((end - start,)),
                dtype=torch.float32,
                blocksize=BLOCK,
                code=self.state.code,
                quant_type="nf4",
            )
            out: Tensor = bnb.dequantize_4bit(self.packed[start // 2 : end // 2], part).reshape(-1)
            return out

        return piece

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As bitsandbytes saves them beside the packed weight."""
        found = {name: self.packed} | {
            f"{name}.{key}": value for key, value in self.state.as_dict(packed=True).items()
        }
        blob = f"{name}.quant_state.bitsandbytes__nf4"
        # JSON ignores trailing spaces, and whole multiples of 8 bytes keep what follows in the file
        # aligned.
        found[blob] = torch.nn.functional.pad(
            found[blob], (0, -len(found[blob]) % 8), value=ord(" ")
        )
        return found


def stored_bytes(num_weights: int) -> int:
    """What `tensors` take on disk, about."""
    return num_weights // 2 + num_weights // BLOCK + num_weights // BLOCK // 64 + 2048


def stored_names(name: str) -> list[str]:
    keys = (
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state.bitsandbytes__nf4",
    )
    return [name, *(f"{name}.{key}" for key in keys)]
