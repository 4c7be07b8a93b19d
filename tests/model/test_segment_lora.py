"""The products over segments against one product a task, and the low-rank part against fp64."""

from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from ship_ds.model.adapters.bottleneck import BottleneckAdapter
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.model.adapters.segment_lora import EndToEnd, LowRank
from ship_ds.model.adapters.segments import (
    GroupedSegments,
    LoopedSegments,
    PaddedSegments,
    Segments,
    TaskEnds,
    TiledSegments,
    ragged_kind,
    segments,
)
from ship_ds.model.nf4_linear import Nf4Linear, use_nf4_linears

NUM_IN, NUM_OUT = 16, 8
RAGGED = [[2, 17, 11], [0, 29, 1], [30, 0, 0]]


def _ends(lengths: list[int]) -> TaskEnds:
    return TaskEnds(torch.tensor(lengths).cumsum(0).to(torch.int32))


def _per_task(x: Tensor, a_TRI: Tensor, b_TOR: Tensor, lengths: list[int]) -> Tensor:
    parts = x.reshape(-1, x.shape[-1]).split(lengths)
    return torch.cat(
        [part @ a.T @ b.T for part, a, b in zip(parts, a_TRI, b_TOR, strict=True)]
    ).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("rank", [1, 3, 4, 6])
@pytest.mark.parametrize(
    ("shape", "lengths"), [((6, 5), [10, 10, 10]), *(((1, 30), lengths) for lengths in RAGGED)]
)
@pytest.mark.parametrize("strided", [False, True])
def test_equals_a_loop_over_tasks_with_its_gradients(
    shape: tuple[int, int], lengths: list[int], rank: int, strided: bool
) -> None:
    """strided: B as the per-rank head makes it."""
    torch.manual_seed(0)
    b_TOR = torch.randn(3, rank, NUM_OUT).mT if strided else torch.randn(3, NUM_OUT, rank)
    tensors = [torch.randn(*shape, NUM_IN), torch.randn(3, rank, NUM_IN), b_TOR]
    ends = None if len(set(lengths)) == 1 else _ends(lengths)
    base, weights = torch.randn(*shape, NUM_OUT), torch.randn(*shape, NUM_OUT)

    def added(x: Tensor, a_TRI: Tensor, b_TOR: Tensor) -> Tensor:
        return LowRank(a_TRI, b_TOR, 0.5, ends).add_to(base.clone(), x)

    def looped(x: Tensor, a_TRI: Tensor, b_TOR: Tensor) -> Tensor:
        return base + 0.5 * _per_task(x, a_TRI, b_TOR, lengths)

    results = []
    for function in (added, looped):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = function(*leaves)
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for ours, loop in zip(*results, strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", RAGGED)
@pytest.mark.parametrize("kind", [LoopedSegments, GroupedSegments, PaddedSegments])
def test_every_way_to_multiply_gives_the_same(
    kind: Callable[[TaskEnds], Segments], lengths: list[int]
) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(30, NUM_IN), torch.randn(30, NUM_OUT)
    matrix = torch.randn(3, NUM_IN, NUM_OUT)
    products = kind(_ends(lengths))
    spans = [slice(start, end) for _, start, end in _ends(lengths).spans()]
    expected = torch.cat([x[span] @ matrix[t] for t, span in enumerate(spans)])
    torch.testing.assert_close(products.times(x, matrix), expected)
    out = grad.clone()
    products.add_times(out, x, matrix)
    torch.testing.assert_close(out, grad + expected)
    outer = torch.stack([x[span].T @ grad[span] for span in spans])
    torch.testing.assert_close(products.outer(x, grad), outer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[5], [3, 0, 4], [0, 6, 1, 2], [2, 3, 0, 7, 1, 4]])
@pytest.mark.parametrize(("rank", "together"), [(8, 4), (10, 3), (16, 2)])
def test_tasks_in_one_tile_give_what_each_would(
    rank: int, together: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, where they are not tiled of themselves, against one product a task."""
    torch.manual_seed(0)
    shapes = (sum(lengths), NUM_IN), (len(lengths), rank, NUM_IN), (len(lengths), NUM_OUT, rank)
    x, a_TRI, b_TOR = leaves = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes
    ]
    weights = torch.randn(sum(lengths), NUM_OUT, dtype=torch.float64)
    ends, made = _ends(lengths), []

    def tiled(x: Tensor, a_TRI: Tensor, b_TOR: Tensor, ends: TaskEnds) -> Segments:
        made.append(TiledSegments(ends, rank))
        return made[-1]

    monkeypatch.setattr("ship_ds.model.adapters.segment_lora.segments", tiled)
    ours, loop = (
        (out, *torch.autograd.grad((out * weights).sum(), leaves))
        for out in (
            LowRank(a_TRI, b_TOR, 0.5, ends).delta(x),
            0.5 * _per_task(x, a_TRI, b_TOR, lengths),
        )
    )
    for one, other in zip(ours, loop, strict=True):
        torch.testing.assert_close(one, other)
    assert made[0].together == together
    assert len(made[0].ends.on_host) == -(-len(lengths) // together)


def test_what_overflows_in_one_task_stays_there() -> None:
    a_TRI, b_TOR = torch.ones(2, 8, 4).bfloat16(), torch.ones(2, 8, 8).bfloat16()
    a_TRI[1] = 3e38
    delta = LowRank(a_TRI, b_TOR, 1.0, _ends([3, 3])).delta(torch.ones(6, 4).bfloat16())
    assert delta[:3].eq(32).all() and delta[3:].isinf().all()


def test_bottlenecks_in_one_tile_give_what_each_would() -> None:
    """In 16 bits several tasks' factors are one product, with a nonlinearity between the two."""
    torch.manual_seed(0)
    lengths = [3, 5, 2]
    factors = torch.randn(3, 8, 16), torch.randn(3, 16, 8)
    leaves = [one.bfloat16().requires_grad_() for one in (torch.randn(1, 10, 16), *factors)]
    y, a_TRO, b_TOR = leaves
    adapter = LoraAdapter({"site": (a_TRO, b_TOR)}, 0.5, _ends(lengths))
    after = BottleneckAdapter(adapter).after("site", y)
    assert after is not None
    alone = torch.cat(
        [
            0.5 * torch.nn.functional.gelu(part @ a.T) @ b.T
            for part, a, b in zip(y[0].split(lengths), a_TRO, b_TOR, strict=True)
        ]
    )[None]
    weights = torch.randn(1, 10, 16).bfloat16()
    for ours, theirs in zip(
        (after, *torch.autograd.grad((after * weights).sum(), leaves)),
        (alone, *torch.autograd.grad((alone * weights).sum(), leaves)),
        strict=True,
    ):
        scale = theirs.detach().abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * scale)


def test_tokens_may_lie_apart() -> None:
    """A grouped product alone takes rows of aligned bytes."""
    torch.manual_seed(0)
    x, a_TRI, b_TOR = torch.randn(7, 9)[:, :8], torch.randn(2, 4, 8), torch.randn(2, 8, 4)
    delta = LowRank(a_TRI, b_TOR, 1.0, _ends([3, 4])).delta(x)
    torch.testing.assert_close(delta, _per_task(x, a_TRI, b_TOR, [3, 4]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "num_tasks", "rank", "num_out", "kind"),
    [
        (torch.bfloat16, 2, 8, 8, TiledSegments),
        (torch.bfloat16, 2, 16, 8, TiledSegments),
        (torch.bfloat16, 2, 17, 8, LoopedSegments),
        (torch.bfloat16, 1, 8, 8, LoopedSegments),
        (torch.float32, 2, 8, 8, GroupedSegments),
        (torch.float32, 2, 3, 8, GroupedSegments),
        (torch.float32, 2, 8, 6, LoopedSegments),
        (torch.float64, 2, 8, 8, LoopedSegments),
    ],
)
def test_sizes_decide_how_a_cpu_multiplies(
    dtype: torch.dtype, num_tasks: int, rank: int, num_out: int, kind: type[Segments]
) -> None:
    torch.manual_seed(0)
    ends = _ends([3] * num_tasks)
    x, a_TRI, b_TOR = (
        torch.randn(*shape, dtype=dtype)
        for shape in (
            (3 * num_tasks, 4),
            (num_tasks, rank, 4),
            (num_tasks, num_out, rank),
        )
    )
    assert type(segments(x, a_TRI, b_TOR, ends)) is kind
    expected = _per_task(x.double(), a_TRI.double(), b_TOR.double(), [3] * num_tasks)
    tolerance = 0.1 if dtype.itemsize == 2 else 1e-5
    delta = LowRank(a_TRI, b_TOR, 1.0, ends).delta(x).double()
    torch.testing.assert_close(delta, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("base", "dtype", "tolerance"),
    [
        ("alone", torch.float64, 1e-9),
        ("alone", torch.bfloat16, 4e-2),  # tasks in one tile
        ("nf4", torch.float32, 1e-4),
    ],
)
def test_texts_end_to_end_each_under_its_own(
    base: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Three tasks of 9 tokens, 4 tokens under nothing, 6 of one task, alone or on a 4-bit base,
    which dequantises once for all; against one product a task in fp64 or fp32."""
    torch.manual_seed(0)
    x, first_a, first_b, last_a, last_b = leaves = [
        torch.randn(*shape, dtype=dtype, requires_grad=True)
        for shape in ((1, 19, 64), (3, 2, 64), (3, 5, 2), (1, 4, 64), (1, 5, 4))
    ]
    added = EndToEnd(
        (
            (LowRank(first_a, first_b, 0.5, _ends([2, 3, 4])), 9),
            (None, 4),
            (LowRank(last_a, last_b, 3.0), 6),
        )
    )
    linear = quantised(64, 5)
    bare = x.new_zeros(1, 19, 5) if base == "alone" else x @ linear.dequantised(dtype).clone().T
    if base == "alone":
        out = added.add_to(torch.zeros(1, 19, 5, dtype=dtype), x)
    else:
        out = linear(x, low_rank=added)
    parts = [
        0.5 * _per_task(x[0, :9], first_a, first_b, [2, 3, 4]),
        x.new_zeros(4, 5),
        3 * _per_task(x[0, 13:], last_a, last_b, [6]),
    ]
    expected = bare + torch.cat(parts)[None]
    weights = torch.randn(1, 19, 5).to(dtype)
    for ours, theirs in zip(
        (out, *torch.autograd.grad((out * weights).sum(), leaves)),
        (expected, *torch.autograd.grad((expected * weights).sum(), leaves)),
        strict=True,
    ):
        scale = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


def quantised(num_in: int, num_out: int) -> Nf4Linear:
    """A frozen 4-bit linear."""
    linear = bnb.nn.Linear4bit(num_in, num_out, bias=False, quant_type="nf4")
    model = nn.ModuleList([linear.float().to("cpu").requires_grad_(False)])
    use_nf4_linears(model, torch.device("cpu"), "a base")
    made = model[0]
    assert isinstance(made, Nf4Linear)
    return made


@pytest.mark.parametrize("lengths", [None, [7, 0, 5]])
def test_gradients_in_fp64(lengths: list[int] | None) -> None:
    torch.manual_seed(0)
    ends = None if lengths is None else _ends(lengths)
    leaves = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((12, 5), (12, 4), (3, 2, 4), (3, 5, 2))
    ]

    def added(base: Tensor, x: Tensor, a_TRI: Tensor, b_TOR: Tensor) -> Tensor:
        return LowRank(a_TRI, b_TOR, 0.5, ends).add_to(base * 2, x)

    assert torch.autograd.gradcheck(added, leaves)


@pytest.mark.parametrize("lengths", [None, [10, 6]])
def test_takes_the_dtype_of_the_tokens(lengths: list[int] | None) -> None:
    torch.manual_seed(0)
    x, a, b = (
        torch.randn(1, 16, NUM_IN).bfloat16(),
        torch.randn(2, 3, NUM_IN),
        torch.randn(2, NUM_OUT, 3),
    )
    out = LowRank(a, b, 1.0, None if lengths is None else _ends(lengths)).delta(x)
    assert out.dtype == torch.bfloat16
    expected = _per_task(x.float(), a, b, lengths or [8, 8])
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("lengths", [None, [10, 6]])
def test_a_sum_has_a_gradient(lengths: list[int] | None) -> None:
    """Its strides are zero."""
    leaves = [
        torch.ones(*shape, requires_grad=True)
        for shape in ((16, NUM_IN), (2, 8, NUM_IN), (2, 8, 8))
    ]
    low_rank = LowRank(leaves[1], leaves[2], 1.0, None if lengths is None else _ends(lengths))
    low_rank.delta(leaves[0]).sum().backward()
    assert leaves[0].grad is not None and leaves[0].grad.eq(64).all()


def test_adds_in_place_and_keeps_no_tensor_of_the_output() -> None:
    linear = nn.Linear(NUM_IN, 400).requires_grad_(False)
    x, a, b = torch.randn(64, NUM_IN), torch.randn(2, 4, NUM_IN), torch.randn(2, 400, 4)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        base = linear(x.requires_grad_())
        out = LowRank(a.requires_grad_(), b, 2.0).add_to(base, x)
    assert out.data_ptr() == base.data_ptr()
    # The linear's weight; x, A, B and the four numbers a token.
    assert sorted(kept) == sorted([linear.weight.numel(), *(t.numel() for t in (x, a, b)), 64 * 4])


def test_the_ends_are_read_once_for_all_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = _ends([2, 3])
    x, a_TRI, b_TOR = torch.ones(5, 4).double(), torch.ones(2, 1, 4), torch.ones(2, 4, 1)
    for _ in range(3):
        assert isinstance(segments(x, a_TRI, b_TOR, ends), LoopedSegments)
    monkeypatch.setattr(Tensor, "tolist", lambda self: pytest.fail("read once more"))
    with pytest.raises(pytest.fail.Exception):
        ends.on_host  # noqa: B018
    monkeypatch.undo()
    assert ends.on_host == [2, 5]
    monkeypatch.setattr(Tensor, "tolist", lambda self: pytest.fail("read once more"))
    assert LoopedSegments(ends).times(torch.ones(5, 4), torch.ones(2, 4, 1)).sum() == 20


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "is_aligned", "expected"),
    [
        ("cuda", torch.bfloat16, (9, 0), True, "GroupedSegments"),
        ("cuda", torch.bfloat16, (9, 0), False, "PaddedSegments"),
        ("cuda", torch.bfloat16, (10, 0), True, "GroupedSegments"),
        ("cuda", torch.bfloat16, (8, 9), True, "PaddedSegments"),
        ("meta", torch.bfloat16, None, True, "GroupedSegments"),
        ("meta", torch.bfloat16, None, False, "ShapeSegments"),
        ("meta", torch.float32, None, True, "ShapeSegments"),
    ],
)
def test_the_card_decides_how_ragged_segments_are_multiplied(
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    is_aligned: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert ragged_kind.__wrapped__(device, 0, dtype, is_aligned).__name__ == expected


@pytest.mark.parametrize("sizes", [(NUM_IN, NUM_OUT), (NUM_IN, 1), (12, NUM_OUT)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_on_the_meta_device(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    """A gate of one output, too, whose rows grouped_mm does not take."""
    num_in, num_out = sizes
    leaves = [
        torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)
        for shape in ((30, num_in), (3, 5, num_in), (3, num_out, 5))
    ]
    ends = TaskEnds(torch.empty(3, dtype=torch.int32, device="meta"))
    out = LowRank(leaves[1], leaves[2], 0.5, ends).delta(leaves[0])
    assert out.shape == (30, num_out)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert [grad.shape for grad in gradients] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("num_tokens", [5, 15])
def test_the_ends_of_rows_are_found_among_all_tokens_of_longer_rows(num_tokens: int) -> None:
    """By numbers that the host has: nothing is read back."""
    ends = TaskEnds.of_rows([2, 0, 3], torch.device("cpu"))
    assert ends is not None and TaskEnds.of_rows([2, 2], torch.device("cpu")) is None
    among, length = ends.among(num_tokens), num_tokens // 5
    assert among is ends.among(num_tokens)
    assert among.on_host == [2 * length, 2 * length, 5 * length] == among.offsets_T.tolist()
    assert among.offsets_T.dtype == torch.int32
    meta = TaskEnds.of_rows([2, 0, 3], torch.device("meta"))
    assert meta is not None and meta.among(num_tokens).on_host == among.on_host
