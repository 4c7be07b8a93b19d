"""Modules of transformers' families with backward passes of their own, for training.

transformers writes its modules out in single operations. For each of them autograd keeps what it
might need, an RMS norm two fp32 tensors of its input's size, and goes back through them one by one;
on a CPU that takes longer than some of the matrix products. Those below keep the input that is
there anyway, and compute the same up to rounding (elementwise.py, eager or compiled). Without
gradients transformers' own forward runs, bit for bit: a checkpoint whose first pass has none
(`use_reentrant=True`) would mix the two. A module of such a class is deep-copied as ever, but
cannot be pickled.

SwiGLU is taken where it is compiled alone: in eager mode its own backward pass keeps less and takes
longer than autograd's.

Letters: H hidden size.
"""

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from ship_ds.model.elementwise import (
    EAGER,
    ElementwiseMode,
    Kernels,
    compiled,
    rms_norm_weight_gradient,
)

_ROTARY, _HALVES = "apply_rotary_pos_emb", "rotate_half"


def make_lean(model: nn.Module, way: ElementwiseMode = "eager") -> nn.Module:
    """Let every module that computes as Llama's has a lean backward pass, in place: weights, names
    and results stay.

    Args:
        model: of any family; a second time nothing changes, whatever the way.
        way: how what stands between the matrix products is computed.

    Returns:
        The model.
    """
    for module in model.modules():
        kind = type(module)
        if (kind, way) not in _SUBCLASSES:
            _SUBCLASSES[kind, way] = _lean(kind, way)
        if _SUBCLASSES[kind, way] is not kind:
            # The same attributes and another forward, as nf4_linear.py does it.
            module.__class__ = _SUBCLASSES[kind, way]
    return model


_SUBCLASSES: dict[tuple[type[nn.Module], ElementwiseMode], type[nn.Module]] = {}
"""For each class met the one to put in its place, which may be itself."""


def _lean(kind: type[nn.Module], way: ElementwiseMode) -> type[nn.Module]:
    """A subclass, so that what asks for the family's class still finds it; or the class itself."""
    if issubclass(kind, _Lean):
        return kind
    kernels = compiled() if way == "compiled" else EAGER
    body: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": kind.__name__,
        "kernels": kernels,
    }
    if _is_same(kind.forward, llama.LlamaRMSNorm.forward):
        return type(kind.__name__, (_LeanRmsNorm, kind), body)
    if way == "compiled" and _is_same(kind.forward, llama.LlamaMLP.forward):
        return type(kind.__name__, (_LeanMlp, kind), body)
    code = getattr(vars(kind).get("forward"), "__code__", None)
    if code and _ROTARY in code.co_names and _turns_as_llama(sys.modules[kind.__module__]):
        forward = _with_rotary(kind.forward, kernels)
        return type(kind.__name__, (_Lean, kind), body | {"forward": forward})
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


def _with_rotary(forward: Any, kernels: Kernels) -> Callable[..., Any]:
    """An attention's own forward, which calls `_turn_both` where it would call its module's
    function: the same code over other globals, so that the module itself stays as it is."""
    names = {**forward.__globals__, _ROTARY: _turn_both(forward.__globals__[_ROTARY], kernels)}
    made = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)


class _Lean:
    kernels: Kernels


class _LeanRmsNorm(_Lean):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """See elementwise.py; the argument's name is transformers'."""
        x, weight = hidden_states, self.weight
        if x.dtype == weight.dtype and _wants_gradient(x, weight):
            normed: Tensor = _RmsNorm.apply(self.kernels, x, weight, self.variance_epsilon)
            return normed
        out: Tensor = super().forward(x)  # type: ignore[misc]
        return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        normed, scale = kernels.rms_norm(x, weight_H, epsilon)
        ctx.save_for_backward(x, weight_H, scale)
        ctx.kernels = kernels
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, wants_x, wants_weight, _ = ctx.needs_input_grad
        operands = (grad, *ctx.saved_tensors)
        grad_weight = rms_norm_weight_gradient(*operands) if wants_weight else None
        grad_x = ctx.kernels.rms_norm_gradient(*operands) if wants_x else None
        return None, grad_x, grad_weight, None


class _LeanMlp(_Lean):
    act_fn: nn.Module
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Down of SwiGLU of gate and up."""
        if not torch.is_grad_enabled():
            plain: Tensor = super().forward(x)  # type: ignore[misc]
            return plain
        gate, up = self.gate_proj(x), self.up_proj(x)
        is_swiglu = isinstance(self.act_fn, _SILU) and gate.dtype == up.dtype
        if is_swiglu and _wants_gradient(gate, up):
            out: Tensor = self.down_proj(_SwiGlu.apply(self.kernels, gate, up))
            return out
        out = self.down_proj(self.act_fn(gate) * up)
        return out


_SILU = (nn.SiLU, SiLUActivation)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        return kernels.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, *ctx.kernels.swiglu_gradients(grad, *ctx.saved_tensors)


def _turn_both(plain: Callable[..., tuple[Tensor, Tensor]], kernels: Kernels) -> Callable[..., Any]:
    """In place of `plain`, transformers' function, where there are gradients."""

    def turn_both(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if not _wants_gradient(q, k):
            return plain(q, k, cos, sin, unsqueeze_dim)
        angle = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _Turn.apply(kernels, q, *angle), _Turn.apply(kernels, k, *angle)

    return turn_both


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return kernels.turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        return None, ctx.kernels.turned(grad, *ctx.saved_tensors, -1), None, None
