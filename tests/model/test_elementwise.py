"""What is computed between the matrix products, eager and compiled, against fp64 and autograd."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ship_ds.errors import UserError
from ship_ds.model import elementwise
from ship_ds.model.elementwise import EAGER, Kernels, compiled

EPSILON = 1e-5


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight


def plain_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def expected(plain: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Tensor], Tensor]:
    """In fp64: the output and the gradient of each input; and the output's gradient."""
    leaves = [one.double().requires_grad_() for one in inputs]
    out = plain(*leaves)
    grad = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)], grad


# In 32 bits what is compiled is the same; each kind of input takes seconds to compile.
both_ways = pytest.mark.parametrize(
    ("kernels", "dtype", "tolerance"),
    [
        pytest.param(lambda: EAGER, torch.float32, 2e-6, id="eager, 32 bits"),
        pytest.param(lambda: EAGER, torch.bfloat16, 2e-2, id="eager, 16 bits"),
        pytest.param(
            compiled, torch.bfloat16, 2e-2, id="compiled, 16 bits", marks=pytest.mark.slow
        ),
    ],
    indirect=["kernels"],
)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Kernels:
    made: Kernels = request.param()
    return made


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def agree(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype, tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        scale = other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * scale)


@both_ways
def test_rms_norm(kernels: Kernels, dtype: torch.dtype, tolerance: float) -> None:
    x, weight = drawn(2, 5, 48, dtype=dtype) * 3, drawn(48, dtype=dtype) + 1
    kept = x.clone()
    wanted, grad = expected(plain_norm, x, weight)
    out, scale = kernels.rms_norm(x, weight, EPSILON)
    operands = grad.to(dtype), x, weight, scale
    found = [out, kernels.rms_norm_gradient(*operands)]
    found.append(elementwise.rms_norm_weight_gradient(*operands))
    agree(found, wanted, dtype, tolerance)
    assert scale.dtype == torch.float32 and x.equal(kept)


@both_ways
def test_turning_and_turning_back(kernels: Kernels, dtype: torch.dtype, tolerance: float) -> None:
    angle = drawn(3, 1, 7, 8, dtype=torch.float32).repeat(1, 1, 1, 2)
    x = drawn(3, 2, 7, 16, dtype=dtype)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    (out, grad_x, *_), grad = expected(plain_turned, x, cos, sin)
    found = [kernels.turned(x, cos, sin, 1), kernels.turned(grad.to(dtype), cos, sin, -1)]
    agree(found, [out, grad_x], dtype, tolerance)


@both_ways
def test_swiglu(kernels: Kernels, dtype: torch.dtype, tolerance: float) -> None:
    gate, up = drawn(2, 5, 32, dtype=dtype) * 4, drawn(5, 2, 32, dtype=dtype).view(2, 5, 32)
    wanted, grad = expected(plain_swiglu, gate, up)
    found = [kernels.swiglu(gate, up), *kernels.swiglu_gradients(grad.to(dtype), gate, up)]
    agree(found, wanted, dtype, tolerance)


def test_nothing_is_compiled_of_shapes() -> None:
    """A plan runs the model on them."""
    gate = torch.empty(3, 8, device="meta")
    seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled().swiglu(gate, gate).shape == gate.shape
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == seen


def test_a_machine_that_cannot_compile_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "compiled", elementwise.compiled.__wrapped__)
    torch._dynamo.reset()
    settings = {"cpp.cxx": (os.devnull,), "force_disable_caches": True}
    # Not by monkeypatch, which leaves a setting of torch's deleted.
    with torch._inductor.config.patch(settings), pytest.raises(UserError) as raised:
        elementwise.check_compiler(torch.device("cpu"))
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("model.elementwise=compiled: torch.compile: ")
