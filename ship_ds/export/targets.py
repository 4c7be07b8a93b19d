"""What base + adapter can become. Each target is a type here; a new one is a new class.

- original: the base's own weights, W + (alpha / R) B A in fp32, rounded once. Training saw another
  base where it saw NF4, so this one's logits drift from the live model's by the quantisation error.
- dequantised: the NF4 base that training saw, as plain weights; least drift, but 16-bit rounding of
  what was 4-bit.
- nf4: that base plus the adapter, in NF4 again; small, and part of the adapter is lost in rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ship_ds.errors import UserError
from ship_ds.model import nf4
from ship_ds.model.nf4 import Nf4, Pieces, pieces_of, spans
from ship_ds.tensor_file import TensorFile

TargetName = Literal["original", "dequantised", "nf4"]


@dataclass
class Loss:
    """Squared Frobenius norms, over the matrices that the adapter changes: what rounding to NF4
    lost, and the update."""

    lost: float = 0.0
    update: float = 0.0

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.lost + other.lost, self.update + other.update)

    def clear(self) -> None:
        self.lost = self.update = 0.0

    def count(self, rounded: Pieces, merged: Pieces, delta: Tensor) -> None:
        for start, end in spans(delta.numel()):
            self.lost += float((rounded(start, end) - merged(start, end)).double().square().sum())
            self.update += float(delta.reshape(-1)[start:end].double().square().sum())


@dataclass(frozen=True)
class Original:
    """The base's own weights."""

    loss: Loss = field(default_factory=Loss)

    def pieces(self, name: str, weight: Tensor) -> Pieces:
        """What the adapter is added to."""
        return pieces_of(weight, torch.float32)

    def write(
        self, file: TensorFile, name: str, weight: Tensor, dtype: torch.dtype, delta: Tensor | None
    ) -> None:
        """The tensor `name` of the merged model. weight: the base's; delta: fp32 (O, I), or None
        where no adapter acts."""
        pieces = _sum(self.pieces(name, weight), delta)
        file.add_pieces(
            name,
            dtype,
            weight.shape,
            (pieces(start, end).to(dtype) for start, end in spans(weight.numel())),
        )

    def names(self, name: str) -> list[str]:
        """What `write` adds to the file for this tensor."""
        return [name]

    def num_bytes(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> int:
        """How much that is on disk, about."""
        return math.prod(shape) * dtype.itemsize

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """What the merged model's config.json has beside the base's. dtype: of its weights,
        dequantised."""
        return {"dtype": str(dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class Dequantised(Original):
    """What training saw as NF4, in plain weights. quantised: names of the weights that are in NF4
    there."""

    quantised: frozenset[str] = frozenset()

    def pieces(self, name: str, weight: Tensor) -> Pieces:
        if name not in self.quantised:
            return pieces_of(weight, torch.float32)
        return _nf4(name, weight, weight.dtype, pieces_of(weight, torch.float32)).pieces()


@dataclass(frozen=True)
class Requantised(Original):
    """NF4 once more. seen: the base that training saw."""

    quantised: frozenset[str] = frozenset()
    seen: Original = Original()

    def write(
        self, file: TensorFile, name: str, weight: Tensor, dtype: torch.dtype, delta: Tensor | None
    ) -> None:
        if name not in self.quantised:
            return super().write(file, name, weight, dtype, delta)
        # Untouched weights keep their codes: to quantise a dequantised matrix once more would move
        # its scales.
        base = Original() if delta is None else self.seen
        merged = _sum(base.pieces(name, weight), delta)
        stored = _nf4(name, weight, dtype, merged)
        if delta is not None:
            self.loss.count(stored.pieces(), merged, delta)
        for key, tensor in stored.tensors(name).items():
            file.add(key, tensor)

    def names(self, name: str) -> list[str]:
        return nf4.file_names(name) if name in self.quantised else [name]

    def num_bytes(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> int:
        return (
            nf4.file_bytes(math.prod(shape))
            if name in self.quantised
            else super().num_bytes(name, shape, dtype)
        )

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        return super().settings(dtype) | {"quantization_config": nf4.config(dtype).to_dict()}


def build_target(name: TargetName, base: Path, quantisation: str) -> Original:
    """quantisation: of the Task LLM in training. Raises UserError for a target that makes no sense
    with it."""
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
            return Requantised(
                quantised=names,
                seen=Dequantised(quantised=names) if quantisation == "nf4" else Original(),
            )


def quantised_names(base: Path) -> frozenset[str]:
    """The weights that transformers puts in NF4, asked of transformers itself on a model without
    weights."""
    config = AutoConfig.from_pretrained(base, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return frozenset(f"{path}.weight" for path in nf4.quantised_linears(model))


def _nf4(name: str, weight: Tensor, dtype: torch.dtype, pieces: Pieces) -> Nf4:
    if weight.shape[-1] % nf4.BLOCK:
        raise UserError(
            f"{name}: has {weight.shape[-1]} inputs; nf4 needs a multiple of {nf4.BLOCK}: use "
            "--target original"
        )
    return Nf4.of(weight.shape, dtype, pieces)


def _sum(base: Pieces, delta: Tensor | None) -> Pieces:
    if delta is None:
        return base
    flat = delta.reshape(-1)
    return lambda start, end: base(start, end) + flat[start:end]
