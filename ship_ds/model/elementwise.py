"""What a block computes number by number between its matrix products, forward and backward.

Each of these reads its inputs and writes its results. In eager mode every operation in it is a pass
over memory of its own; `torch.compile` makes one loop of each function (C++ on a CPU, Triton on a
GPU). Compiled, sums are in another order and what is between the operations is not rounded to 16
bits, so that results agree up to rounding alone.

    RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467)
        scale = 1 / sqrt(mean(x^2) + epsilon)      in fp32
        y = weight * (scale * x)                   scale * x rounded to the input's dtype first
    rotary embedding (Su et al. 2021, arXiv 2104.09864), halves (x1, x2) of a head's numbers
        y = (x1 cos - x2 sin, x2 cos + x1 sin)     its gradient is turned back by the same angle
    SwiGLU (Shazeer 2020, arXiv 2002.05202), s the logistic function
        y = gate s(gate) up
        gradients: grad up s(gate) (1 + gate (1 - s(gate))), grad gate s(gate)

Letters: H hidden size, X other letters flattened, E sequences, A attention heads, S padded length,
F size of an attention head.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ship_ds.errors import UserError, first_line

ElementwiseMode = Literal["eager", "compiled"]


def rms_norm(x: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm of x and its scale; see the top of this file.

    Args:
        x: (..., H).
        weight_H: of the norm, in the dtype of x.
        epsilon: added to the mean square.

    Returns:
        The norm, (..., H), in the dtype of x, and the scale, (..., 1), in fp32.
    """
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    scale = scale.div_(x.shape[-1]).add_(epsilon).rsqrt_()
    # `wide` is x itself where that has 32 bits, and may not be written over.
    scaled = wide * scale if wide is x else wide.mul_(scale).to(x.dtype)
    return scaled.mul_(weight_H), scale


def rms_norm_gradient(grad: Tensor, x: Tensor, weight_H: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x.

    Args:
        grad: of the norm, (..., H).
        x: what `rms_norm` was given, (..., H).
        weight_H: of the norm, in the dtype of x.
        scale: what `rms_norm` gave, (..., 1).

    Returns:
        (..., H), in the dtype of x.
    """
    wide = x.float()
    # The scale's own derivative is -scale^3 x / H.
    weighted = (grad * weight_H).float()
    shared = torch.linalg.vecdot(weighted, wide)[..., None]
    shared = shared.mul_(scale).mul_(scale).mul_(scale).div_(-x.shape[-1])
    return weighted.mul_(scale).addcmul_(wide, shared).to(x.dtype)


def rms_norm_weight_gradient(grad: Tensor, x: Tensor, weight_H: Tensor, scale: Tensor) -> Tensor:
    """The gradient of the weight; never compiled, since few train it.

    Args:
        grad: of the norm, (..., H).
        x: what `rms_norm` was given, (..., H).
        weight_H: of the norm, in the dtype of x.
        scale: what `rms_norm` gave, (..., 1).

    Returns:
        (H,), in the dtype of the weight.
    """
    products_XH = (grad.float() * x.float()).reshape(-1, x.shape[-1])
    return (scale.flatten()[None] @ products_XH)[0].to(weight_H.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x turned by the angles of cos and sin.

    Args:
        x: queries or keys of all heads, (E, A, S, F).
        cos, sin: of each token's angles, (E, 1, S, F), whose halves are equal.
        sign: 1, or -1 to turn it back.

    Returns:
        (E, A, S, F).
    """
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


def _turned_at_once(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """The same, with no slice written to: torch.compile would copy the whole for each."""
    half = x.shape[-1] // 2
    first, second, cos_half, sin_half = (
        x[..., :half],
        x[..., half:],
        cos[..., :half],
        sin[..., :half],
    )
    sin_half = sign * sin_half
    return torch.cat(
        (first * cos_half - second * sin_half, second * cos_half + first * sin_half), -1
    )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate s(gate) up, of gate and up of one shape."""
    return torch.nn.functional.silu(gate) * up


def swiglu_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up; all of one shape.

    Args:
        grad: of what `swiglu` gave.
        gate, up: what `swiglu` was given.

    Returns:
        That of gate and that of up, in their dtypes.
    """
    wide, share = gate.float(), gate.float().sigmoid()
    slope = share * (1 + wide * (1 - share))
    of_gate, of_up = grad.float() * up.float() * slope, grad.float() * wide * share
    return of_gate.to(gate.dtype), of_up.to(up.dtype)


class Kernels(NamedTuple):
    """The functions above, or what is compiled of them."""

    rms_norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = rms_norm
    rms_norm_gradient: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = rms_norm_gradient
    turned: Callable[[Tensor, Tensor, Tensor, int], Tensor] = turned
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu
    swiglu_gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = swiglu_gradients


EAGER = Kernels()


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(one, memory_format=torch.contiguous_format) for one in tensors)


def _normed_like(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(x)[0], x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


_SHAPES = Kernels(
    rms_norm=_normed_like,
    rms_norm_gradient=lambda grad, x, *_: _like(x)[0],
    turned=lambda x, *_: _like(x)[0],
    swiglu=lambda gate, up: _like(gate)[0],
    swiglu_gradients=lambda grad, gate, up: _like(gate, up),  # type: ignore[arg-type,return-value]
)
"""Of what is compiled the results alone, for a plan: one loop holds nothing else."""


@cache
def compiled() -> Kernels:
    """Each of them compiled when it is first called, for any size."""
    # Here: a second to import, and nothing for those who compile nothing.
    import torch._inductor.config

    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        # Otherwise torch starts a process a core for the compiler, which five loops do not need.
        torch._inductor.config.compile_threads = 1
    kernels = EAGER._replace(turned=_turned_at_once)
    return Kernels(
        *[_compiled(getattr(kernels, name), getattr(_SHAPES, name)) for name in Kernels._fields]
    )


def _compiled(function: Callable[..., Any], shapes: Callable[..., Any]) -> Callable[..., Any]:
    # dynamic: hardly two steps have as many tokens, and each would compile anew.
    made = torch.compile(function, dynamic=True)

    def run(*inputs: Any) -> Any:
        if inputs[0].is_meta:
            return shapes(*inputs)
        # A tensor that wants a gradient, one that is a view of such a one and a parameter, whose
        # sizes are taken for fixed, would each be compiled for, up to torch's limit, and computed
        # in eager mode after that.
        return made(*[one.detach() if isinstance(one, Tensor) else one for one in inputs])

    return run


@torch.no_grad()
def compile_all(device: torch.device, dtype: torch.dtype) -> None:
    """Compile each of them, so that what cannot be compiled is known before the first step.

    Raises:
        UserError: torch.compile cannot, or has nowhere to keep what it makes.
    """
    x = torch.zeros(3, 2, 5, 16, device=device, dtype=dtype)
    try:
        kernels = compiled()
        _, scale = kernels.rms_norm(x, x[0, 0, 0], 1e-5)
        kernels.rms_norm_gradient(x, x, x[0, 0, 0], scale)
        for sign in (1, -1):
            kernels.turned(x, x[:, :1], x[:, :1], sign)
        kernels.swiglu(x, x)
        kernels.swiglu_gradients(x, x, x)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds: no compiler, no Triton
        cause = error.__cause__ or error
        if isinstance(cause, OSError):
            raise UserError(
                f"TORCHINDUCTOR_CACHE_DIR: {first_line(cause)}: set it to a folder of your own on "
                "a disk with room"
            ) from None
        raise UserError(
            f"model.elementwise=compiled: torch.compile: {first_line(cause)}: install what it "
            "misses, or set model.elementwise=eager"
        ) from None
