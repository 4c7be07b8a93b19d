"""The adapted linear's low-rank part over task-major tokens, with its own backward pass.

    low = scaling * A x          R numbers a token
    out += B low                 into what the base linear gave; no second tensor of its size

Kept for the backward pass: x, A, B and low. The gradients are products of the same kind
(segments.py), and scaling is folded into the R numbers, so that neither B nor a gradient is copied
for it.

Where several texts lie end to end, each under an adapter of its own, the part has a term for each,
over its tokens alone.

Letters: T tasks, R LoRA rank, I inputs of a linear, O outputs of a linear, N packed tokens, X other
letters flattened.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ship_ds.model.adapters.segments import Segments, TaskEnds, segments


class Term(NamedTuple):
    """How scaling * B A x is computed: the products, and the tokens that it is of; None: all."""

    products: Segments
    scaling: float
    tokens: slice | None = None

    def rows(self, x_NX: Tensor) -> Tensor:
        """The rows of these tokens, a view."""
        return x_NX if self.tokens is None else x_NX[self.tokens]


class Addition(ABC):
    """What is added to the output of one linear, in place."""

    @abstractmethod
    def terms(self, x: Tensor) -> tuple[list[Term], list[Tensor]]:
        """How it is computed for tokens such as x, and A and B of each, one after the other, as the
        products take them."""

    @abstractmethod
    def matrices(self) -> list[Tensor]:
        """A and B of each term, as they were generated."""

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """`out` with every term added in place.

        Args:
            out: (..., O), contiguous; what it held before is lost.
            x: (..., I), its tokens task-major.
        """
        x = x.to(out.dtype).contiguous()
        terms, factors = self.terms(x)
        if not torch.is_grad_enabled():
            # For a token of a decoding the function's own bookkeeping takes as long as a product.
            add_terms(terms, out.view(-1, out.shape[-1]), x.view(-1, x.shape[-1]), factors)
            return out
        result: Tensor = _AddLowRank.apply(out, x, terms, *factors)
        return result


@dataclass(frozen=True)
class LowRank(Addition):
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

    def operands(self, x: Tensor) -> tuple[Segments, Tensor, Tensor]:
        """The products for tokens such as x, and the factors as they take them."""
        products = segments(x, self.a_TRI, self.b_TOR, self.ends)
        return products, *products.aligned(self.a_TRI.to(x.dtype), self.b_TOR.to(x.dtype))

    def matrices(self) -> list[Tensor]:
        return [self.a_TRI, self.b_TOR]

    def terms(self, x: Tensor) -> tuple[list[Term], list[Tensor]]:
        products, *factors = self.operands(x)
        return [Term(products, self.scaling)], factors


@dataclass(frozen=True)
class EndToEnd(Addition):
    """Of texts that lie one after the other: what is added to each, and how many tokens it has."""

    parts: tuple[tuple[LowRank | None, int], ...]

    def matrices(self) -> list[Tensor]:
        return [one for part, _ in self.parts if part is not None for one in part.matrices()]

    def terms(self, x: Tensor) -> tuple[list[Term], list[Tensor]]:
        start = 0
        terms: list[Term] = []
        all_factors: list[Tensor] = []
        for part, num_tokens in self.parts:
            tokens = slice(start, start + num_tokens)
            start += num_tokens
            if part is not None:
                products, *factors = part.operands(x)
                terms.append(Term(products, part.scaling, tokens))
                all_factors += factors
        return terms, all_factors


def add_low_rank(
    products: Segments,
    out_NO: Tensor,
    x_NI: Tensor,
    a_TRI: Tensor,
    b_TOR: Tensor,
    scaling: float,
) -> Tensor:
    """Add scaling * B A x to `out_NO` in place, outside of autograd.

    Args:
        products: of these tokens with these factors.
        out_NO: what the base linear gave, contiguous.
        x_NI: the input, contiguous, its tokens task-major.
        a_TRI: as the products take it (`Segments.aligned`).
        b_TOR: as the products take it (`Segments.aligned`).
        scaling: of the update.

    Returns:
        low_NR, scaling * A x, which the backward pass needs.
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


def add_terms(
    terms: Sequence[Term], out_NO: Tensor, x_NI: Tensor, factors: Sequence[Tensor]
) -> list[Tensor]:
    """Add every term to `out_NO` in place, outside of autograd.

    Args:
        terms: see `Addition.terms`.
        out_NO: what the base linear gave, contiguous.
        x_NI: the input, contiguous, its tokens task-major.
        factors: A and B of each term, one after the other, as its products take them.

    Returns:
        low_NR of each, over its own tokens, which the backward pass needs.
    """
    return [
        add_low_rank(term.products, term.rows(out_NO), term.rows(x_NI), *pair, term.scaling)
        for term, pair in zip(terms, _pairs(factors), strict=True)
    ]


def term_gradients(
    terms: Sequence[Term], grad_NO: Tensor, x_NI: Tensor | None, kept: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gradients of every A x, (N, R), and of the factors, as they lie.

    Args:
        terms: as in the forward.
        grad_NO: of the output.
        x_NI: the input; None: no gradient of a factor is wanted.
        kept: what `add_terms` gave, then the factors.
    """
    lows, pairs = kept[: len(terms)], _pairs(kept[len(terms) :])
    grad_lows: list[Tensor] = []
    grad_factors: list[Tensor | None] = []
    for term, low_NR, (_, b_TOR) in zip(terms, lows, pairs, strict=True):
        grad_own_NO = term.rows(grad_NO)
        grad_low_NR = low_gradient(term.products, grad_own_NO, b_TOR, term.scaling)
        grad_lows.append(grad_low_NR)
        if x_NI is None:
            grad_factors += [None, None]
            continue
        grad_factors.append(term.products.outer(grad_low_NR, term.rows(x_NI)))
        grad_factors.append(term.products.outer(low_NR, grad_own_NO).mT)
    return grad_lows, grad_factors


def add_input_gradients(
    terms: Sequence[Term], grad_NI: Tensor, grad_lows: Sequence[Tensor], kept: Sequence[Tensor]
) -> None:
    """Add what each term says to the gradient of the input, in place.

    Args:
        terms: as in the forward.
        grad_NI: of the input, contiguous.
        grad_lows: of every A x, (N, R), the first that `term_gradients` gives.
        kept: what `add_terms` gave, then the factors.
    """
    pairs = _pairs(kept[len(terms) :])
    for term, grad_low_NR, (a_TRI, _) in zip(terms, grad_lows, pairs, strict=True):
        term.products.add_times(term.rows(grad_NI), grad_low_NR, a_TRI)


def _pairs(factors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(factors[::2], factors[1::2], strict=True))


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, terms: list[Term], *factors: Tensor) -> Tensor:
        out_NO, x_NI = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
        lows = add_terms(terms, out_NO, x_NI, factors)
        ctx.mark_dirty(out)
        ctx.save_for_backward(x, *lows, *factors)
        ctx.terms = terms
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        _, wants_x, _, *wants_factors = ctx.needs_input_grad
        # The gradient of a sum has strides of zero, which no product takes.
        grad_NO = grad.reshape(-1, grad.shape[-1]).contiguous()
        x_NI = x.reshape(-1, x.shape[-1]) if any(wants_factors) else None
        lows, grad_factors = term_gradients(ctx.terms, grad_NO, x_NI, kept)
        grad_x = None
        if wants_x and len(ctx.terms) == 1 and ctx.terms[0].tokens is None:
            grad_x = ctx.terms[0].products.times(lows[0], kept[1]).view_as(x)
        elif wants_x:
            grad_NI = torch.zeros_like(x).view(-1, x.shape[-1])
            add_input_gradients(ctx.terms, grad_NI, lows, kept)
            grad_x = grad_NI.view_as(x)
        return grad, grad_x, None, *grad_factors
