"""The 4-bit linear of our own: values and gradients of bitsandbytes, and nothing kept of the
weight."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ship_ds.errors import UserError
from ship_ds.model.adapters.segment_lora import LowRank
from ship_ds.model.adapters.segments import TaskEnds
from ship_ds.model.nf4_linear import Nf4Linear, unpack, unpacked, use_nf4_linears

CPU = torch.device("cpu")
NUM_IN, NUM_OUT, NUM_TOKENS = 128, 96, 12


def _linear(dtype: torch.dtype = torch.float32, bias: bool = False) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(NUM_IN, NUM_OUT, bias=bias, compute_dtype=dtype, quant_type="nf4")
    return linear.to(dtype).to("cpu").requires_grad_(False)


def _ours(dtype: torch.dtype = torch.float32, bias: bool = False) -> Nf4Linear:
    model = nn.ModuleList([_linear(dtype, bias)])
    use_nf4_linears(model, CPU, "base")
    linear = model[0]
    assert isinstance(linear, Nf4Linear)
    return linear


def _leaves(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, A and B of three tasks."""
    torch.manual_seed(1)
    shapes = (1, NUM_TOKENS, NUM_IN), (3, 4, NUM_IN), (3, NUM_OUT, 4)
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def _ends() -> TaskEnds:
    return TaskEnds(torch.tensor([5, 5, 12], dtype=torch.int32))


@pytest.mark.parametrize("ends", [None, _ends()])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_equals_bitsandbytes_and_the_low_rank_part(
    dtype: torch.dtype, tolerance: float, bias: bool, ends: TaskEnds | None, checkpointed: bool
) -> None:
    ours, theirs = _ours(dtype, bias), _linear(dtype, bias)
    theirs.support_avx512bf16_for_cpu = False

    def fused(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ours(x, low_rank=LowRank(a, b, 0.5, ends))

    def apart(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return theirs(x) + LowRank(a, b, 0.5, ends).delta(x)

    def run(function: Any) -> list[Tensor]:
        leaves = _leaves(dtype)
        if checkpointed:
            out = checkpoint(function, *leaves, use_reentrant=False)
        else:
            out = function(*leaves)
        assert out.dtype == dtype
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        return [out, *torch.autograd.grad((out * weights).sum(), leaves)]

    for mine, reference in zip(run(fused), run(apart), strict=True):
        scale = float(reference.detach().abs().max())
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance * scale)


def test_without_gradients_it_is_bitsandbytes_and_the_low_rank_part() -> None:
    ours, (x, a, b) = _ours(), _leaves()
    with torch.no_grad():
        # Four tokens a task, in products of their own: `delta` goes the way that is tested.
        update = 2.0 * x.view(3, 4, NUM_IN) @ a.mT @ b.mT
        expected = _linear()(x) + update.view(1, NUM_TOKENS, NUM_OUT)
        torch.testing.assert_close(ours(x, low_rank=LowRank(a, b, 2.0)), expected)
        torch.testing.assert_close(LowRank(a, b, 2.0).delta(x).view_as(update), update)


@pytest.mark.parametrize("ends", [None, _ends()])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacked_it_answers_and_learns_to_the_same_bits(
    dtype: torch.dtype, bias: bool, ends: TaskEnds | None
) -> None:
    ours = _ours(dtype, bias)
    names = set(ours.state_dict())

    def run() -> list[Tensor]:
        x, a, b = _leaves(dtype)
        with torch.no_grad():
            answers = [ours(x), ours(x, low_rank=LowRank(a, b, 0.5, ends)), ours(x[:, :1].float())]
        out = ours(x, low_rank=LowRank(a, b, 0.5, ends))
        return [*answers, out, *torch.autograd.grad(out.float().square().sum(), [x, a, b])]

    packed = run()
    # The same linear twice, as where roles share a base.
    unpack([ours, nn.ModuleList([ours])], NUM_IN * NUM_OUT * dtype.itemsize)
    kept = ours.unpacked
    assert kept is not None and kept.dtype == dtype and kept.shape == (NUM_OUT, NUM_IN)
    for now, before in zip(run(), packed, strict=True):
        assert now.dtype == before.dtype and now.equal(before)
    assert set(ours.state_dict()) == names and kept.equal(ours.dequantised(dtype))
    assert len(list(ours.parameters())) == 1 + bias


def test_what_would_take_too_much_stays_packed() -> None:
    one, other = _ours(), _ours()
    both = [nn.ModuleList([one]), other]
    assert unpack(both, 2 * NUM_IN * NUM_OUT * 4 - 1) == []
    assert one.unpacked is None and other.unpacked is None
    assert unpack(both, 2 * NUM_IN * NUM_OUT * 4) == [one, other]
    assert one.unpacked is not None and other.unpacked is not None


def test_between_steps_it_is_unpacked_for_a_while() -> None:
    """And packed again whatever happens, or the next step would hold what no plan counts."""
    linear = _ours()
    with pytest.raises(KeyError), unpacked([linear], NUM_IN * NUM_OUT * 4):
        assert linear.unpacked is not None
        raise KeyError
    assert linear.unpacked is None


def test_a_share_of_a_weight_stays_packed() -> None:
    linear: Any = _ours()
    linear.weight.ds_id = 0  # as ZeRO-3 marks what ranks hold shares of
    assert unpack([linear], NUM_IN * NUM_OUT * 4) == [] and linear.unpacked is None


def test_gradients_in_fp64() -> None:
    ours = _ours()
    ours.compute_dtype = torch.float64
    leaves = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((4, NUM_IN), (2, 1, NUM_IN), (2, NUM_OUT, 1))
    ]
    ends = TaskEnds(torch.tensor([3, 4], dtype=torch.int32))
    assert torch.autograd.gradcheck(
        lambda x, a, b: ours(x, low_rank=LowRank(a, b, 0.5, ends)), leaves, fast_mode=True
    )


def test_a_trained_bias_has_a_gradient() -> None:
    ours = _ours(bias=True)
    ours.bias.requires_grad_()
    ours(torch.ones(5, NUM_IN)).sum().backward()
    assert ours.bias.grad is not None and ours.bias.grad.eq(5).all()


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_weight_may_go_between_forward_and_backward(
    checkpointed: bool, with_adapter: bool
) -> None:
    """As ZeRO-3 does: gathered for the forward, released, gathered anew for the backward."""
    ours, leaves = _ours(), _leaves()
    x, a, b = leaves
    low_rank = LowRank(a, b, 0.5) if with_adapter else None
    expected = torch.autograd.grad(ours(x, low_rank=low_rank).square().sum(), x)[0]
    packed = ours.weight.data.clone()

    def gather(*_: Any) -> None:
        ours.weight.data = packed.clone()

    def release(*_: Any) -> None:
        ours.weight.data = torch.empty(0, dtype=torch.uint8)

    release()
    ours.register_forward_pre_hook(gather)
    gathered: list[StorageWeakRef] = []
    ours.register_forward_hook(
        lambda *_: gathered.append(StorageWeakRef(ours.weight.untyped_storage()))
    )
    ours.register_forward_hook(release)

    def run(x: Tensor) -> Tensor:
        return ours(x, low_rank=low_rank)

    out = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
    assert len(gathered) == 1 and gathered[0].expired()
    out.register_hook(gather)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], expected)


def test_training_leaves_the_packed_weight_as_it_was() -> None:
    ours, (x, a, b) = _ours(torch.bfloat16), _leaves(torch.bfloat16)
    before = ours.weight.data.clone()
    optimiser = torch.optim.SGD([a, b], 0.1)
    for _ in range(3):
        ours(x, low_rank=LowRank(a, b, 1.0)).float().square().mean().backward()
        optimiser.step()
        with torch.no_grad():
            ours.eval()(x)
    assert ours.weight.data.equal(before) and a.grad is not None and a.grad.abs().max() > 0


def test_inputs_that_do_not_split_into_blocks_are_refused() -> None:
    linear = bnb.nn.Linear4bit(96, 8, quant_type="nf4")
    with pytest.raises(UserError, match="base: 0 has 96 inputs"):
        use_nf4_linears(nn.Sequential(linear), CPU, "base")
