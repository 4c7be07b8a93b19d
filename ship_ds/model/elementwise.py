"""What a block computes number by number between its matrix products, forward and backward.

Each of these reads its inputs and writes its results. In eager mode every operation in it is a pass
over memory of its own; `torch.compile` makes one loop of each function (C++ on a CPU, Triton on a
GPU), which for an RMS norm of 1,703 tokens of 576 numbers takes a fifth of the time. Compiled, sums
are in another order and what is between the operations is not rounded to 16 bits, so that results
agree up to rounding alone.

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

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ship_ds.errors import UserError, first_line

Way = Literal["eager", "compiled"]


def rms_norm(x: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm of x (..., H), and its scale (..., 1) in fp32."""
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    scale = scale.div_(x.shape[-1]).add_(epsilon).rsqrt_()
    # `wide` is x itself where that has 32 bits, and may not be written over.
    scaled = wide * scale if wide is x else wide.mul_(scale).to(x.dtype)
    return scaled.mul_(weight_H), scale


def rms_norm_gradient(grad: Tensor, x: Tensor, weight_H: Tensor, scale: Tensor) -> Tensor:
    """Of x, where `grad` is that of the norm."""
    wide = x.float()
    # The scale's own derivative is -scale^3 x / H.
    weighted = (grad * weight_H).float()
    shared = torch.linalg.vecdot(weighted, wide)[..., None]
    shared = shared.mul_(scale).mul_(scale).mul_(scale).div_(-x.shape[-1])
    return weighted.mul_(scale).addcmul_(wide, shared).to(x.dtype)


def rms_norm_weight_gradient(grad: Tensor, x: Tensor, weight_H: Tensor, scale: Tensor) -> Tensor:
    """Of the weight (H,), where `grad` is that of the norm; never compiled, since few train it."""
    products_XH = (grad.float() * x.float()).reshape(-1, x.shape[-1])
    return (scale.flatten()[None] @ products_XH)[0].to(weight_H.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x (E, A, S, F) turned by the angles of cos and sin (E, 1, S, F), whose halves are equal.

    sign: 1, or -1 to turn it back.
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
    """Of gate and up, of one shape."""
    return torch.nn.functional.silu(gate) * up


def swiglu_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and up."""
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


@cache
def compiled() -> Kernels:
    """Each of them compiled when it is first called, for any size."""
    # Here: a second to import, and nothing for those who compile nothing.
    import torch._inductor.config

    # Otherwise torch starts a process a core for the compiler, which five loops do not need.
    torch._inductor.config.compile_threads = 1
    kernels = EAGER._replace(turned=_turned_at_once)
    return Kernels(*[_compiled(kernel) for kernel in kernels])


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # dynamic: hardly two steps have as many tokens, and each would compile anew.
    made = torch.compile(function, dynamic=True)

    def run(x: Tensor, *others: Any) -> Any:
        # A plan runs the model on shapes, of which there is nothing to compile.
        return function(x, *others) if x.is_meta else made(x, *others)

    return run


def check_compiler(device: torch.device) -> None:
    """Compile the smallest of them.

    Raises:
        UserError: torch.compile cannot, with what it misses.
    """
    few = torch.zeros(2, 16, device=device)
    try:
        compiled().swiglu(few, few)
    except Exception as error:  # of many kinds: no compiler, no Triton, a folder that is full
        cause = error.__cause__ or error
        raise UserError(
            f"model.elementwise=compiled: torch.compile: {first_line(cause)}: install what it "
            "misses, or set model.elementwise=eager"
        ) from None
