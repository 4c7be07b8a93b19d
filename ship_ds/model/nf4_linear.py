"""A linear in 4 bits that keeps nothing of its weight between forward and backward.

bitsandbytes' own autograd function holds the packed weight as an attribute until the backward pass.
Under ZeRO-3 that weight was gathered from all ranks, and neither DeepSpeed's release nor
checkpointing can free what is held like that: the whole base stays in memory. Here the backward
pass reads the weight from the module again, where DeepSpeed's hook has gathered it by then, as
DeepSpeed's own LinearFunctionForZeroStage3 does.

    W = dequantised weight                 into a buffer that all linears share
    out = x W^T + bias + scaling * B A x   one tensor, the adapter's part added in place

Letters: T tasks, I inputs of a linear, O outputs of a linear, N packed tokens.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ship_ds.errors import UserError
from ship_ds.model.adapters.segment_lora import (
    Addition,
    Term,
    add_input_gradients,
    add_terms,
    term_gradients,
)
from ship_ds.model.bitsandbytes_import import bitsandbytes
from ship_ds.model.nf4 import BLOCK, dequantised


class Nf4Linear(bitsandbytes.nn.Linear4bit):
    """A frozen linear in 4 bits, perhaps with a low-rank part."""

    unpacked: Tensor | None = None
    """The dequantised weight (O, I), where `unpack` has kept it. No parameter and no buffer, since
    neither DeepSpeed nor a file is to have it."""

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) as training and serving compute with it; on a CPU the next call of any
        linear writes over it."""
        weight: Any = self.weight
        kept = self.unpacked
        if kept is not None and kept.dtype == dtype and kept.device == weight.device:
            return kept
        state: Any = weight.quant_state or self.quant_state
        return dequantised(weight, state, dtype)

    def forward(self, x: Tensor, low_rank: Addition | None = None) -> Tensor:
        """x W^T + bias, and what the low-rank part adds.

        Args:
            x: (..., I).
            low_rank: see segment_lora.py.
        """
        if not self._is_trained(x, low_rank):
            out = self._product(x)
            return out if low_rank is None else low_rank.add_to(out, x)
        inputs = x.to(self.compute_dtype or x.dtype).contiguous()
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        terms, factors = ([], []) if low_rank is None else low_rank.terms(inputs)
        out = _Nf4LowRank.apply(self, inputs, bias, terms, *factors)
        return out.to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        """x W^T + bias, outside of autograd."""
        inputs = x if self.unpacked is None else x.to(self.compute_dtype or x.dtype)
        if self.unpacked is None or not _are_alike(self.unpacked, inputs):
            # bitsandbytes has kernels for few rows, with which decoding reads the packed weight.
            out: Tensor = super().forward(x)
            return out
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return nn.functional.linear(inputs, self.unpacked, bias).to(x.dtype)

    def _is_trained(self, x: Tensor, low_rank: Addition | None) -> bool:
        """Whether anything that this linear computes from wants a gradient."""
        sources = [x] if self.bias is None else [x, self.bias]
        if low_rank is not None:
            sources += low_rank.matrices()
        return torch.is_grad_enabled() and any(source.requires_grad for source in sources)


def _are_alike(one: Tensor, other: Tensor) -> bool:
    """Of one dtype, on one device: a model that is moved takes its packed weights along alone."""
    return one.dtype == other.dtype and one.device == other.device


class _Nf4LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        module: Nf4Linear,
        x: Tensor,
        bias: Tensor | None,
        terms: list[Term],
        *factors: Tensor,
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        weight_IO = module.dequantised(x.dtype).T
        out_NO = x_NI @ weight_IO if bias is None else torch.addmm(bias, x_NI, weight_IO)
        lows = add_terms(terms, out_NO, x_NI, factors)
        # The input is wanted for the gradients of A and B alone.
        kept = x if any(ctx.needs_input_grad[4:]) else None
        ctx.save_for_backward(kept, *lows, *factors)
        ctx.module, ctx.terms = module, terms
        # What a custom function gives as a view may not be added to in place.
        return out_NO if x.dim() == 2 else out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        _, wants_x, wants_bias, _, *wants_factors = ctx.needs_input_grad
        # The gradient of a sum has strides of zero, which no product takes.
        grad_NO = grad.reshape(-1, grad.shape[-1]).contiguous()
        x_NI = x.reshape(-1, x.shape[-1]) if any(wants_factors) else None
        lows, grad_factors = term_gradients(ctx.terms, grad_NO, x_NI, kept)
        grad_x = None
        if wants_x:
            grad_NI = grad_NO @ ctx.module.dequantised(grad_NO.dtype)
            add_input_gradients(ctx.terms, grad_NI, lows, kept)
            grad_x = grad_NI.view(*grad.shape[:-1], -1)
        grad_bias = grad_NO.sum(0) if wants_bias else None
        return None, grad_x, grad_bias, None, *grad_factors


def unpack(roles: Iterable[nn.Module], most_bytes: int) -> list[Nf4Linear]:
    """Keep the dequantised weights of models that answer on a CPU, to the same bits: bitsandbytes
    has no product of 4-bit weights there, and dequantises a whole matrix for every token.

    Args:
        roles: the models, which may share their linears.
        most_bytes: that all weights may take (budget.bytes_to_unpack); where they take more, or
            where ranks hold shares of them, none is kept.

    Returns:
        The linears whose weights are kept.
    """
    modules = dict.fromkeys(module for role in roles for module in role.modules())
    linears = [module for module in modules if isinstance(module, Nf4Linear)]
    dtypes = [linear.compute_dtype or torch.float32 for linear in linears]
    sizes = [linear.in_features * linear.out_features for linear in linears]
    needed = sum(size * dtype.itemsize for size, dtype in zip(sizes, dtypes, strict=True))
    if needed > most_bytes or any(hasattr(linear.weight, "ds_id") for linear in linears):
        return []
    for linear, dtype in zip(linears, dtypes, strict=True):
        linear.unpacked = linear.dequantised(dtype).clone()
    return linears


@contextmanager
def unpacked(roles: Iterable[nn.Module], most_bytes: int) -> Iterator[None]:
    """As `unpack`, until the `with` ends: for models that are trained and answer in between."""
    linears = unpack(roles, most_bytes)
    try:
        yield
    finally:
        for linear in linears:
            linear.unpacked = None


def use_nf4_linears(model: nn.Module, device: torch.device, base: str) -> None:
    """Let every 4-bit linear of a model compute as an `Nf4Linear`, in place.

    Args:
        model: as transformers or streaming.py loads it.
        device: where it will run.
        base: its name, for the message.

    Raises:
        UserError: a linear's inputs do not split into blocks; bitsandbytes raises nothing there.
    """
    for path, module in model.named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        # The same attributes and another forward; DeepSpeed and peft keep seeing a Linear4bit.
        module.__class__ = Nf4Linear
        # A no-grad forward on a CPU with AVX512-BF16 repacks the weight in place, and the next
        # training step computes with what it takes for the old layout.
        module.support_avx512bf16_for_cpu = False
        if device.type == "cpu" and module.in_features % BLOCK:
            raise UserError(
                f"{base}: {path} has {module.in_features} inputs, and in nf4 bitsandbytes computes "
                f"wrongly on a CPU unless they are a multiple of {BLOCK}: set quantisation=none"
            )
