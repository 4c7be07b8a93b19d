"""The adapted linear's low-rank part over task-major tokens, with its own backward pass.

    low = scaling * A x          R numbers a token
    out += B low                 into what the base linear gave; no second tensor of its size

Kept for the backward pass: x, A, B and low. The gradients are products of the same kind
(segments.py), and scaling is folded into the R numbers, so that neither B nor a gradient is copied
for it.

Letters: T tasks, R LoRA rank, I inputs of a linear, O outputs of a linear, N packed tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ship_ds.model.adapters.segments import Segments, TaskEnds, segments


@dataclass(frozen=True)
class LowRank:
    """What a low-rank adapter adds to one linear: scaling * B A x.

    a_TRI, b_TOR: the factors of T tasks. ends: where each task's tokens end; None: every task has
    equally many.
    """

    a_TRI: Tensor
    b_TOR: Tensor
    scaling: float
    ends: TaskEnds | None = None

    def delta(self, x: Tensor) -> Tensor:
        """scaling * B A x, (..., O), for x (..., I) whose tokens lie task after task."""
        return self.add_to(x.new_zeros(*x.shape[:-1], self.b_TOR.shape[1]), x)

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """`out` with scaling * B A x added in place.

        Args:
            out: (..., O), contiguous; what it held before is lost.
            x: (..., I), its tokens task-major.
        """
        x = x.to(out.dtype).contiguous()
        products, a_TRI, b_TOR = self.operands(x)
        result: Tensor = _AddLowRank.apply(out, x, a_TRI, b_TOR, self.scaling, products)
        return result

    def operands(self, x: Tensor) -> tuple[Segments, Tensor, Tensor]:
        """The products for tokens such as x, and the factors as they take them."""
        products = segments(x, self.a_TRI, self.b_TOR, self.ends)
        return products, *products.aligned(self.a_TRI.to(x.dtype), self.b_TOR.to(x.dtype))


def add_low_rank(
    products: Segments,
    out_NO: Tensor,
    x_NI: Tensor,
    a_TRI: Tensor,
    b_TOR: Tensor,
    scaling: float,
) -> Tensor:
    """Add scaling * B A x to `out_NO` in place, outside of autograd.

    Returns:
        low_NR, which the backward pass needs.
    """
    low_NR = products.keep_own(products.times(x_NI, a_TRI.mT))
    if scaling != 1:
        low_NR.mul_(scaling)
    products.add_times(out_NO, low_NR, b_TOR.mT)
    return low_NR


def low_gradient(products: Segments, grad_NO: Tensor, b_TOR: Tensor, scaling: float) -> Tensor:
    """The gradient of A x, (N, R).

    Args:
        products: as in the forward.
        grad_NO: of the output.
        b_TOR: as the products take it (`Segments.aligned`).
        scaling: of the update.
    """
    return products.keep_own(products.times(grad_NO, b_TOR)).mul_(scaling)


def factor_gradients(
    products: Segments, grad_NO: Tensor, grad_low_NR: Tensor, x_NI: Tensor, low_NR: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of A and B, as they lie.

    Args:
        products: as in the forward.
        grad_NO: of the output.
        grad_low_NR: see `low_gradient`.
        x_NI: the input.
        low_NR: what `add_low_rank` gave.
    """
    return products.outer(grad_low_NR, x_NI), products.outer(low_NR, grad_NO).mT


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        x: Tensor,
        a_TRI: Tensor,
        b_TOR: Tensor,
        scaling: float,
        products: Segments,
    ) -> Tensor:
        out_NO, x_NI = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
        low_NR = add_low_rank(products, out_NO, x_NI, a_TRI, b_TOR, scaling)
        ctx.mark_dirty(out)
        ctx.save_for_backward(x, a_TRI, b_TOR, low_NR)
        ctx.scaling, ctx.products = scaling, products
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a_TRI, b_TOR, low_NR = ctx.saved_tensors
        # The gradient of a sum has strides of zero, which no product takes.
        grad_NO = grad.reshape(-1, grad.shape[-1]).contiguous()
        grad_low_NR = low_gradient(ctx.products, grad_NO, b_TOR, ctx.scaling)
        grad_x = grad_a_TRI = grad_b_TOR = None
        if any(ctx.needs_input_grad[2:4]):
            x_NI = x.reshape(-1, x.shape[-1])
            grad_a_TRI, grad_b_TOR = factor_gradients(
                ctx.products, grad_NO, grad_low_NR, x_NI, low_NR
            )
        if ctx.needs_input_grad[1]:
            grad_x = ctx.products.times(grad_low_NR, a_TRI).view_as(x)
        return grad, grad_x, grad_a_TRI, grad_b_TOR, None, None
