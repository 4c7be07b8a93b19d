"""What a base model and an adapter can become. Each target is a type here.

- original: the base's own weights, W + (alpha / R) B A in fp32, rounded once. Where training saw
  the base in NF4, these lack its quantisation error, and their logits drift from the live model's:
  around SmolLM2 by most of what an adapter of 330 steps does.
- dequantised: the NF4 base that training saw, as plain weights; least drift, but 16-bit rounding of
  what was 4-bit. The default after such a training, as `original` is after any other.
- nf4: that base plus the adapter, in NF4 again; small, and part of the adapter is lost in rounding.

Letters: I inputs of a linear, O outputs of a linear.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ship_ds.errors import UserError
from ship_ds.model import nf4
from ship_ds.model.language_model import without_weights
from ship_ds.model.loading import read_settings
from ship_ds.model.nf4 import Nf4, Pieces, pieces_of, spans
from ship_ds.tensor_file import TensorFile

TargetName = Literal["original", "dequantised", "nf4"]


@dataclass
class RoundingError:
    """What rounding to NF4 lost, over the matrices that the adapter changes.

    Args:
        lost: Squared Frobenius norm of what is stored less what it should be.
        update: Squared Frobenius norm of the adapter's update.
    """

    lost: float = 0.0
    update: float = 0.0

    def __add__(self, other: "RoundingError") -> "RoundingError":
        return RoundingError(self.lost + other.lost, self.update + other.update)

    def clear(self) -> None:
        """Start anew."""
        self.lost = self.update = 0.0

    def count(self, stored: Pieces, merged: Pieces, delta_OI: Tensor) -> None:
        """Add one matrix: as it is stored, as it should be, and its update.

        Args:
            stored: The weights that a reader of the file computes with.
            merged: The base's weights with the update, before they were rounded.
            delta_OI: The adapter's update in fp32.
        """
        flat = delta_OI.reshape(-1)
        for start, end in spans(flat.numel()):
            self.lost += float((stored(start, end) - merged(start, end)).double().square().sum())
            self.update += float(flat[start:end].double().square().sum())


@dataclass(frozen=True)
class Original:
    """The base's own weights."""

    rounding: RoundingError = field(default_factory=RoundingError)

    def pieces(self, name: str, weight: Tensor) -> Pieces:
        """What the adapter is added to, in fp32."""
        return pieces_of(weight, torch.float32)

    def write(
        self,
        file: TensorFile,
        name: str,
        weight: Tensor,
        dtype: torch.dtype,
        delta_OI: Tensor | None,
    ) -> None:
        """Write one tensor of the merged model.

        Args:
            file: Where to.
            name: Of the tensor.
            weight: The base's.
            dtype: What the result is rounded to.
            delta_OI: The adapter's update in fp32; None where no adapter acts.
        """
        pieces = _sum(self.pieces(name, weight), delta_OI)
        file.add_pieces(
            name,
            dtype,
            weight.shape,
            (pieces(start, end).to(dtype) for start, end in spans(weight.numel())),
        )

    def names(self, name: str) -> list[str]:
        """What `write` adds to the file for a tensor."""
        return [name]

    def num_bytes(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> int:
        """How many bytes `write` adds to the file for a tensor, about.

        Args:
            name: Of the tensor.
            shape: Of the base's tensor.
            dtype: What the result is rounded to.
        """
        return math.prod(shape) * dtype.itemsize

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """What the merged model's config.json has beside the base's.

        Args:
            dtype: Of its weights, dequantised.
        """
        return {"dtype": str(dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class Dequantised(Original):
    """What training saw as NF4, in plain weights.

    Args:
        quantised: The names of the weights that are in NF4 there.
    """

    quantised: frozenset[str] = frozenset()

    def pieces(self, name: str, weight: Tensor) -> Pieces:
        pieces = super().pieces(name, weight)
        if name not in self.quantised:
            return pieces
        return _nf4(name, weight, weight.dtype, pieces).pieces()


@dataclass(frozen=True)
class Requantised(Original):
    """NF4 once more.

    Args:
        quantised: The names of the weights that are in NF4.
        seen: The base that training saw, to which the adapter is added.
    """

    quantised: frozenset[str] = frozenset()
    seen: Original = Original()

    def write(
        self,
        file: TensorFile,
        name: str,
        weight: Tensor,
        dtype: torch.dtype,
        delta_OI: Tensor | None,
    ) -> None:
        if name not in self.quantised:
            return super().write(file, name, weight, dtype, delta_OI)
        # Weights without an update keep their codes: to quantise a dequantised matrix once more
        # would move its scales.
        base = Original() if delta_OI is None else self.seen
        merged = _sum(base.pieces(name, weight), delta_OI)
        stored = _nf4(name, weight, dtype, merged)
        if delta_OI is not None:
            self.rounding.count(stored.pieces(), merged, delta_OI)
        for key, tensor in stored.tensors(name).items():
            file.add(key, tensor)

    def names(self, name: str) -> list[str]:
        return nf4.file_names(name) if name in self.quantised else [name]

    def num_bytes(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> int:
        if name in self.quantised:
            return nf4.file_bytes(math.prod(shape))
        return super().num_bytes(name, shape, dtype)

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        return super().settings(dtype) | {"quantization_config": nf4.config(dtype).to_dict()}


def default_target(quantisation: str) -> TargetName:
    """The target whose weights are those that training saw, so that a merge keeps what was learnt.

    Args:
        quantisation: Of the Task LLM in training.
    """
    return "dequantised" if quantisation == "nf4" else "original"


def build_target(name: TargetName, base: Path, quantisation: str) -> Original:
    """The target of a name.

    Args:
        name: Which.
        base: The base model's folder.
        quantisation: Of the Task LLM in training.

    Raises:
        UserError: It makes no sense after that training.
    """
    match name:
        case "original":
            return Original()
        case "dequantised":
            if quantisation != "nf4":
                raise UserError(
                    "--target dequantised: this adapter was trained on a base that was "
                    "not quantised; use original"
                )
            return Dequantised(quantised=quantised_names(base))
        case "nf4":
            names = quantised_names(base)
            seen = Dequantised(quantised=names) if quantisation == "nf4" else Original()
            return Requantised(quantised=names, seen=seen)


def quantised_names(base: Path) -> frozenset[str]:
    """The weights of a model folder that transformers puts in NF4, asked of a model without
    weights."""
    return frozenset(f"{path}.weight" for path in nf4.quantised_linears(_without_weights(base)))


def transposed_names(base: Path) -> frozenset[str]:
    """The linears of a model folder whose weights are (I, O), as GPT-2's are."""
    modules = _without_weights(base).named_modules()
    return frozenset(path for path, module in modules if isinstance(module, Conv1D))


def _without_weights(base: Path) -> Any:
    with torch.device("meta"):
        return without_weights(read_settings(base))


def _nf4(name: str, weight: Tensor, dtype: torch.dtype, pieces: Pieces) -> Nf4:
    if weight.shape[-1] % nf4.BLOCK:
        raise UserError(
            f"{name}: has {weight.shape[-1]} inputs; nf4 needs a multiple of {nf4.BLOCK}: use "
            "--target original"
        )
    return Nf4.of(weight.shape, dtype, pieces)


def _sum(base: Pieces, delta_OI: Tensor | None) -> Pieces:
    if delta_OI is None:
        return base
    flat = delta_OI.reshape(-1)
    return lambda start, end: base(start, end) + flat[start:end]
