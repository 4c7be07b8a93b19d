"""The grouped products against one product a task."""

import pytest
import torch
from torch import Tensor

from ship_ds.model.adapters.segment_lora import segment_lora

NUM_IN, NUM_OUT = 16, 8


def _per_task(x: Tensor, a_TRI: Tensor, b_TOR: Tensor, lengths: list[int]) -> Tensor:
    parts = x.reshape(-1, x.shape[-1]).split(lengths)
    return torch.cat(
        [part @ a.T @ b.T for part, a, b in zip(parts, a_TRI, b_TOR, strict=True)]
    ).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("rank", [1, 3, 4, 6])
@pytest.mark.parametrize(
    ("shape", "lengths"), [((6, 5), [10, 10, 10]), ((1, 30), [2, 17, 11]), ((1, 30), [0, 29, 1])]
)
def test_equals_a_loop_over_tasks_with_its_gradients(
    shape: tuple[int, int], lengths: list[int], rank: int
) -> None:
    torch.manual_seed(0)
    tensors = [
        torch.randn(*shape, NUM_IN),
        torch.randn(3, rank, NUM_IN),
        torch.randn(3, NUM_OUT, rank),
    ]
    offsets = None if len(set(lengths)) == 1 else torch.tensor(lengths).cumsum(0).to(torch.int32)
    weights = torch.randn(*shape, NUM_OUT)
    results = []
    for function in (lambda *t: segment_lora(*t, offsets), lambda *t: _per_task(*t, lengths)):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = function(*leaves)
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for ours, loop in zip(*results, strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offsets", [None, torch.tensor([10, 16], dtype=torch.int32)])
def test_takes_the_dtype_of_the_tokens(offsets: Tensor | None) -> None:
    torch.manual_seed(0)
    x, a, b = (
        torch.randn(1, 16, NUM_IN).bfloat16(),
        torch.randn(2, 3, NUM_IN),
        torch.randn(2, NUM_OUT, 3),
    )
    out = segment_lora(x, a, b, offsets)
    assert out.dtype == torch.bfloat16
    expected = _per_task(x.float(), a, b, [8, 8] if offsets is None else [10, 6])
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.3)
