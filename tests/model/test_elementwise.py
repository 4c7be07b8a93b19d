"""What is computed between the matrix products, eager and compiled, against fp64 and autograd."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from ship_ds.errors import UserError
from ship_ds.model import elementwise
from ship_ds.model.elementwise import EAGER, ElementwiseMode, Kernels, compiled
from ship_ds.model.loading import Quantisation, load_lm

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
    x = drawn(3, 7, 2, 16, dtype=dtype).transpose(1, 2)  # as an attention has it
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_all_three_on_cuda(way: ElementwiseMode) -> None:
    kernels = compiled() if way == "compiled" else EAGER
    draw = partial(drawn, dtype=torch.bfloat16)

    def check(
        plain: Callable[..., Tensor], ours: Callable[..., list[Tensor]], *inputs: Tensor
    ) -> None:
        wanted, grad = expected(plain, *inputs)
        found = ours(grad.bfloat16().cuda(), *[one.cuda() for one in inputs])
        agree([one.cpu() for one in found], wanted[: len(found)], torch.bfloat16, 2e-2)

    def norm(grad: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
        out, scale = kernels.rms_norm(x, weight, EPSILON)
        return [out, kernels.rms_norm_gradient(grad, x, weight, scale)]

    def turned(grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        return [kernels.turned(x, cos, sin, 1), kernels.turned(grad, cos, sin, -1)]

    def swiglu(grad: Tensor, gate: Tensor, up: Tensor) -> list[Tensor]:
        return [kernels.swiglu(gate, up), *kernels.swiglu_gradients(grad, gate, up)]

    for length in (5, 700):  # the second of a size that was not compiled for
        check(plain_norm, norm, draw(2, length, 576) * 3, draw(576) + 1)
        angle = draw(2, 1, length, 32).repeat(1, 1, 1, 2)
        check(plain_turned, turned, draw(2, 9, length, 64), angle.cos(), angle.sin())
        check(plain_swiglu, swiglu, draw(2, length, 1536), draw(length, 2, 1536).transpose(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_every_block_of_a_base_takes_what_is_asked_for(quantisation: Quantisation) -> None:
    """Its norms, its attention and its feed-forward layer; in eager mode not the last."""
    for way, expected, number in (("eager", EAGER, 3), ("compiled", compiled(), 4)):
        lm = load_lm(
            "embedded", quantisation, torch.float32, elementwise=cast(ElementwiseMode, way)
        )
        layers = [module for name, module in lm.named_modules() if ".layers." in name]
        taken = [module.kernels for module in layers if hasattr(module, "kernels")]
        assert len(taken) == number * lm.config.num_hidden_layers
        assert all(kernels is expected for kernels in taken)


def test_a_plan_holds_the_results_alone() -> None:
    """Of the same shapes, dtypes and layout as are computed; nothing is compiled."""
    x, weight, scale = drawn(2, 3, 8, dtype=torch.bfloat16), drawn(8, dtype=torch.bfloat16), 1e-5
    turning = x[:, None].transpose(1, 2), x[:, :, None], x[:, :, None], -1
    norm_scale = drawn(2, 3, 1, dtype=torch.float32)
    calls: dict[str, tuple[Any, ...]] = {
        "rms_norm": (x, weight, scale),
        "rms_norm_gradient": (x, x, weight, norm_scale),
        "turned": turning,
        "swiglu": (x, x),
        "swiglu_gradients": (x, x, x),
    }
    assert tuple(calls) == Kernels._fields
    for name, inputs in calls.items():
        on_meta = [one.to("meta") if isinstance(one, Tensor) else one for one in inputs]
        planned, real = getattr(compiled(), name)(*on_meta), getattr(EAGER, name)(*inputs)
        if isinstance(real, Tensor):
            planned, real = (planned,), (real,)
        assert [(one.shape, one.dtype) for one in planned] == [
            (one.shape, one.dtype) for one in real
        ]
        assert all(one.is_meta and one.is_contiguous() for one in planned)


@pytest.mark.slow
def test_few_kinds_of_input_are_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond torch's limit of eight a function is computed as in eager mode. Any number of tokens,
    any width, gradients or none, views or not: few."""
    graphs: list[str] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    compile_ = partial(torch.compile, backend=count)
    monkeypatch.setattr("ship_ds.model.elementwise.torch.compile", compile_)
    kernels = elementwise.compiled.__wrapped__()
    numbers: dict[str, int] = {}
    for width in (16, 24):
        weight = nn.Parameter(torch.ones(width), requires_grad=False)
        for num_sequences, num_tokens in ((1, 5), (3, 7), (4, 2)):
            for wants in (False, True):
                x = drawn(num_sequences, num_tokens, width, dtype=torch.float32)
                x.requires_grad_(wants)
                heads = x.unflatten(2, (2, -1)).transpose(1, 2)
                angle = drawn(num_sequences, 1, num_tokens, width // 2, dtype=torch.float32)
                for name, inputs in {
                    "rms_norm": (x, weight, EPSILON),
                    "rms_norm_gradient": (x, x, weight, x[..., :1]),
                    "turned": (heads, angle, angle, 1),
                    "turned ": (heads, angle, angle, -1),
                    "swiglu": (x, x.detach()),
                    "swiglu_gradients": (x, x, x.detach()),
                }.items():
                    before = len(graphs)
                    getattr(kernels, name.strip())(*inputs)
                    numbers[name.strip()] = numbers.get(name.strip(), 0) + len(graphs) - before
    assert max(numbers.values()) <= 5 and min(numbers.values()) >= 1, numbers


def refused(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said as a base loads where torch compiles with these settings, and has compiled
    nothing yet."""
    monkeypatch.setattr(elementwise, "compiled", elementwise.compiled.__wrapped__)
    torch._dynamo.reset()
    # Not by monkeypatch, which leaves a setting of torch's deleted.
    with torch._inductor.config.patch(settings), pytest.raises(UserError) as raised:
        load_lm("embedded", "none", torch.float32, elementwise="compiled")
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.slow
def test_a_machine_that_cannot_compile_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"cpp.cxx": (os.devnull,), "force_disable_caches": True}
    said = refused(settings, monkeypatch)
    assert said.startswith("model.elementwise=compiled: torch.compile: ")


def test_a_folder_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch._dynamo.reset()  # imported before, which makes the folder, too
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "folder"))
    said = refused({"force_disable_caches": True}, monkeypatch)
    assert said.startswith("TORCHINDUCTOR_CACHE_DIR: NotADirectoryError: ")
