"""Modules of transformers' families with backward passes of their own, for training.

transformers writes its modules out in single operations. For each of them autograd keeps what it
might need, an RMS norm two fp32 tensors of its input's size, and goes back through them one by one;
on a CPU that takes longer than some of the matrix products. The two below keep the input that is
there anyway, and compute the same up to rounding. Without gradients transformers' own forward runs,
bit for bit: a checkpoint whose first pass has none (`use_reentrant=True`) would mix the two. A
module of such a class is deep-copied as ever, but cannot be pickled.

    RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467)
        scale = 1 / sqrt(mean(x^2) + epsilon)      in fp32
        y = weight * (scale * x)                   scale * x rounded to the input's dtype first
    rotary embedding (Su et al. 2021, arXiv 2104.09864), halves (x1, x2) of a head's numbers
        y = (x1 cos - x2 sin, x2 cos + x1 sin)     its gradient is turned back by the same angle

Letters: H hidden size, X other letters flattened, E sequences, A attention heads, S padded length,
F size of an attention head.
"""

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama import modeling_llama as llama

_ROTARY, _HALVES = "apply_rotary_pos_emb", "rotate_half"


def make_lean(model: nn.Module) -> nn.Module:
    """Let every module that computes as Llama's has a lean backward pass, in place: weights, names
    and results stay.

    Returns:
        The model.
    """
    for module in model.modules():
        kind = type(module)
        if kind not in _SUBCLASSES:
            _SUBCLASSES[kind] = _lean(kind)
        if _SUBCLASSES[kind] is not kind:
            # The same attributes and another forward, as nf4_linear.py does it.
            module.__class__ = _SUBCLASSES[kind]
    return model


_SUBCLASSES: dict[type[nn.Module], type[nn.Module]] = {}
"""For each class met the one to put in its place, which may be itself."""


def _lean(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass, so that what asks for the family's class still finds it; or the class itself."""
    body: dict[str, Any] = {"__module__": __name__, "__qualname__": kind.__name__}
    if _is_same(kind.forward, llama.LlamaRMSNorm.forward):
        return type(kind.__name__, (_LeanRmsNorm, kind), body)
    code = getattr(vars(kind).get("forward"), "__code__", None)
    if code and _ROTARY in code.co_names and _turns_as_llama(sys.modules[kind.__module__]):
        return type(kind.__name__, (kind,), body | {"forward": _with_rotary(kind.forward)})
    return kind


def _turns_as_llama(module: Any) -> bool:
    """By both functions: NanoChat copies the one and turns its halves the other way in the one that
    it calls."""
    return all(
        _is_same(getattr(module, name, None), getattr(llama, name)) for name in (_ROTARY, _HALVES)
    )


def _is_same(function: Any, other: Any) -> bool:
    """Whether two functions compute the same, by their code: families copy it, some with a change
    (Gemma's 1 + weight)."""
    return hasattr(function, "__code__") and _written(function) == _written(other)


def _written(function: Any) -> tuple[Any, ...]:
    code = function.__code__
    constants = [one for one in code.co_consts if one is None or one != function.__doc__]
    return code.co_code, code.co_names, code.co_varnames, constants


def _with_rotary(forward: Any) -> Callable[..., Any]:
    """An attention's own forward, which calls `_turn_both` where it would call its module's
    function: the same code over other globals, so that the module itself stays as it is."""
    names = {**forward.__globals__, _ROTARY: _turn_both(forward.__globals__[_ROTARY])}
    made = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)


class _LeanRmsNorm:
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """See the top of this file; the argument's name is transformers'."""
        x, weight = hidden_states, self.weight
        if x.dtype == weight.dtype and _wants_gradient(x, weight):
            normed: Tensor = _RmsNorm.apply(x, weight, self.variance_epsilon)
            return normed
        out: Tensor = super().forward(x)  # type: ignore[misc]
        return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = scale.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight_H, scale)
        # `wide` is x itself where that has 32 bits, and may not be written over.
        scaled = wide * scale if wide is x else wide.mul_(scale).to(x.dtype)
        return scaled.mul_(weight_H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_H, scale = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        wide = x.float()
        grad_x = grad_weight = None
        if wants_weight:
            products_XH = (grad.float() * wide).reshape(-1, x.shape[-1])
            grad_weight = (scale.flatten()[None] @ products_XH)[0].to(weight_H.dtype)
        if wants_x:
            # The scale's own derivative is -scale^3 x / H.
            weighted = (grad * weight_H).float()
            shared = torch.linalg.vecdot(weighted, wide)[..., None]
            shared = shared.mul_(scale).mul_(scale).mul_(scale).div_(-x.shape[-1])
            grad_x = weighted.mul_(scale).addcmul_(wide, shared).to(x.dtype)
        return grad_x, grad_weight, None


def _turn_both(plain: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """In place of `plain`, transformers' function, where there are gradients."""

    def turn_both(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if not _wants_gradient(q, k):
            return plain(q, k, cos, sin, unsqueeze_dim)
        angle = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _Turn.apply(q, *angle), _Turn.apply(k, *angle)

    return turn_both


class _Turn(torch.autograd.Function):
    """Of x (E, A, S, F) by cos and sin (E, 1, S, F), whose halves are equal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out
