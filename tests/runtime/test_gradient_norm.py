"""The norm of all gradients at once, beside DeepSpeed's own; on two ranks test_two_ranks.py."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed import comm
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ship_ds.runtime.gradient_norm import take_norms_at_once

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_cuda])]
)


@pytest.fixture
def optimiser(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What of DeepSpeed's optimiser both ways read, on one rank."""
    monkeypatch.setattr(comm, "all_reduce", lambda *_, **__: None)
    made = SimpleNamespace(
        cpu_offload=False,
        compute_grad_norm=True,
        dp_process_group=None,
        model_parallel_rank=0,
        device="cpu",
        _model_parallel_all_reduce=lambda **_: None,
    )
    take_norms_at_once(made)
    return made


def drawn(device: str, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = [1, 7, 576, 9216, 3, 40_000] * 50
    return [(1e3 * torch.randn(n, generator=draw)).to(device, dtype) for n in sizes]


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_deepspeeds_norm_in_few_kernels(
    optimiser: SimpleNamespace, dtype: torch.dtype, device: str
) -> None:
    optimiser.device = device
    gradients = drawn(device, dtype)
    expected = DeepSpeedZeroOptimizer.get_grad_norm_direct(optimiser, gradients, gradients)
    with Counted() as counted:
        norm = optimiser.get_grad_norm_direct(gradients, gradients)
    assert norm.dtype == torch.float32 and norm.shape == () and norm > 1e5
    torch.testing.assert_close(norm, expected, rtol=1e-7, atol=0)
    assert counted.number < 20


@devices
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_is_said_as_deepspeed_says_it(
    optimiser: SimpleNamespace, dtype: torch.dtype, value: float, device: str
) -> None:
    optimiser.device = device
    gradients = drawn(device, dtype)
    gradients[40][0] = value
    assert optimiser.get_grad_norm_direct(gradients, gradients) == -1
    assert DeepSpeedZeroOptimizer.get_grad_norm_direct(optimiser, gradients, gradients) == -1


def test_padding_and_no_gradients_at_all(optimiser: SimpleNamespace) -> None:
    padding = torch.full((3,), math.nan)
    padding._zero_padding = True  # type: ignore[attr-defined]
    assert optimiser.get_grad_norm_direct([torch.tensor([3.0, 4.0]), padding], []) == 5
    assert optimiser.get_grad_norm_direct([], []) == 0


@pytest.mark.parametrize("other", [{"cpu_offload": True}, {"compute_grad_norm": False}])
def test_an_optimiser_that_makes_its_norms_elsewhere_is_left_as_it_is(
    other: dict[str, bool],
) -> None:
    made = SimpleNamespace(**{"cpu_offload": False, "compute_grad_norm": True} | other)
    before = dict(vars(made))
    take_norms_at_once(made)
    assert vars(made) == before
