"""Products of task-major tokens with one matrix a task, never one copy of it per token.

    times      tokens x matrices     (N, I) and (T, I, O)  ->  (N, O)
    add_times  the same, added in place
    outer      tokens^T tokens       (N, I) and (N, O)     ->  (T, I, O)
    product    times, with gradients

A low-rank adapter needs no others: forward, input gradient and both weight gradients are made of
these three. How they are computed depends on the device, the dtype and on whether tasks have
equally many tokens; `segments` chooses.

Letters: T tasks, N packed tokens, R LoRA rank, I inputs of a linear, O outputs of a linear,
X other letters flattened.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ALIGNMENT_BYTES = 16
"""grouped_mm wants rows in multiples of this."""
_TILE = 32
"""Numbers of 16 bits that a tile of AMX holds across a product's inner dimension: narrower products
take nearly as long on such a CPU."""
_GROUPED_CAPABILITIES = (9, 10)
"""Major versions of the cards where grouped_mm is one kernel, in bf16; elsewhere it copies the ends
to the host and launches one product a task."""


class TaskEnds:
    """Where each task's tokens end in a packed sequence: read back from the device at most once,
    however many linears ask.

    offsets_T: int32; task t has the tokens offsets_T[t - 1] to offsets_T[t].
    """

    def __init__(self, offsets_T: Tensor) -> None:
        self.offsets_T = offsets_T
        self._num_rows: int | None = None
        self._of_longer_rows: TaskEnds | None = None
        self._tiles: dict[Any, tuple[TaskEnds, Tensor]] = {}

    @classmethod
    def of_rows(cls, counts: Sequence[int], device: torch.device) -> "TaskEnds | None":
        """Of rows of which task t has counts[t], one after another, all equally long: see
        `among`. None: every task has equally many."""
        if len(set(counts)) == 1:
            return None
        ends = list(accumulate(counts))
        return cls._on(ends, torch.tensor(ends, dtype=torch.int32, device=device))

    @classmethod
    def _on(cls, ends: list[int], offsets_T: Tensor) -> "TaskEnds":
        made = cls(offsets_T)
        made.on_host, made._num_rows = ends, ends[-1]
        return made

    def among(self, num_tokens: int) -> "TaskEnds":
        """The ends among so many tokens. Not every linear meets one token of each row: where a
        cache holds latents (DeepSeek's), what makes keys and values of them meets all columns. By
        numbers that the host has: it waits for no device."""
        if self._num_rows is None or num_tokens == self._num_rows:
            return self
        length, rest = divmod(num_tokens, self._num_rows)
        assert not rest
        longer = self._of_longer_rows
        if longer is None or longer.on_host[-1] != num_tokens:
            ends = [end * length for end in self.on_host]
            self._of_longer_rows = longer = self._on(ends, self.offsets_T * length)
        return longer

    @cached_property
    def on_host(self) -> list[int]:
        """The ends as numbers. On CUDA this waits for the device."""
        ends: list[int] = self.offsets_T.tolist()
        return ends

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(task, start, end) of each task."""
        start = 0
        for task, end in enumerate(self.on_host):
            yield task, start, end
            start = end

    def tiles(self, together: int, rank: int) -> "tuple[TaskEnds, Tensor]":
        """The ends of every `together` tasks taken as one, and (N, together * rank): where a column
        is not of a token's own task. Made once for all linears."""
        key = together, rank
        if key not in self._tiles:
            last = self.on_host[-1:] if len(self.on_host) % together else []
            ends = torch.tensor(self.on_host[together - 1 :: together] + last, dtype=torch.int32)
            foreign_NX = torch.ones(self.on_host[-1], together * rank, dtype=torch.bool)
            for task, start, end in self.spans():
                first = task % together * rank
                foreign_NX[start:end, first : first + rank] = False
            self._tiles[key] = TaskEnds(ends), foreign_NX
        return self._tiles[key]


class Segments(ABC):
    """The three products; see the top of this file. Tokens are contiguous; matrices may have any
    strides."""

    def aligned(self, a_TRI: Tensor, b_TOR: Tensor) -> tuple[Tensor, Tensor]:
        """The factors as the products take them: with zeros behind the ranks where they need a
        multiple of some number, several tasks as one. With gradient."""
        return a_TRI, b_TOR

    def keep_own(self, low_NR: Tensor) -> Tensor:
        """What `times` gave for aligned factors, zero in place where a rank is not of the token's
        own task. With gradient."""
        return low_NR

    @abstractmethod
    def times(self, x_NI: Tensor, matrix_TIO: Tensor) -> Tensor:
        """Each token times its task's matrix, (N, O)."""

    @abstractmethod
    def add_times(self, out_NO: Tensor, x_NI: Tensor, matrix_TIO: Tensor) -> None:
        """Add each token times its task's matrix to `out_NO`, in place.

        Args:
            out_NO: what is added to, contiguous.
            x_NI: the tokens, task after task.
            matrix_TIO: one matrix a task.
        """

    @abstractmethod
    def outer(self, x_NI: Tensor, grad_NO: Tensor) -> Tensor:
        """The sum over each task's tokens of x^T grad, (T, I, O)."""


class EqualSegments(Segments):
    """Every task has equally many tokens: batched products of views."""

    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks

    def _per_task(self, x: Tensor) -> Tensor:
        return x.view(self.num_tasks, -1, x.shape[-1])

    def times(self, x_NI: Tensor, matrix_TIO: Tensor) -> Tensor:
        return torch.bmm(self._per_task(x_NI), matrix_TIO).flatten(0, 1)

    def add_times(self, out_NO: Tensor, x_NI: Tensor, matrix_TIO: Tensor) -> None:
        # Not baddbmm_, which torch's counter of FLOPs does not know.
        out_TXO = self._per_task(out_NO)
        torch.baddbmm(out_TXO, self._per_task(x_NI), matrix_TIO, out=out_TXO)

    def outer(self, x_NI: Tensor, grad_NO: Tensor) -> Tensor:
        return torch.bmm(self._per_task(x_NI).mT, self._per_task(grad_NO))


class LoopedSegments(Segments):
    """One product a task, written where it belongs; for the CPU, where the ends are at hand and
    nothing better takes these sizes."""

    def __init__(self, ends: TaskEnds) -> None:
        self.ends = ends

    def times(self, x_NI: Tensor, matrix_TIO: Tensor) -> Tensor:
        out_NO = x_NI.new_empty(len(x_NI), matrix_TIO.shape[2])
        for task, start, end in self.ends.spans():
            torch.mm(x_NI[start:end], matrix_TIO[task], out=out_NO[start:end])
        return out_NO

    def add_times(self, out_NO: Tensor, x_NI: Tensor, matrix_TIO: Tensor) -> None:
        for task, start, end in self.ends.spans():
            out = out_NO[start:end]
            torch.addmm(out, x_NI[start:end], matrix_TIO[task], out=out)

    def outer(self, x_NI: Tensor, grad_NO: Tensor) -> Tensor:
        out_TIO = x_NI.new_empty(len(self.ends.on_host), x_NI.shape[1], grad_NO.shape[1])
        for task, start, end in self.ends.spans():
            torch.mm(x_NI[start:end].T, grad_NO[start:end], out=out_TIO[task])
        return out_TIO


class TiledSegments(LoopedSegments):
    """One product for as many tasks as fit into a tile with their ranks, for 16 bits on the CPU.

    Each task alone would pay for a whole tile, and for products of new sizes in every batch, each
    of which takes oneDNN a millisecond to prepare. The factors of a tile's tasks lie as one of more
    ranks, and between the two products a token keeps those of its own task.
    """

    def __init__(self, ends: TaskEnds, rank: int) -> None:
        self.together = _TILE // rank
        tiles, self.foreign_NX = ends.tiles(self.together, rank)
        super().__init__(tiles)

    def aligned(self, a_TRI: Tensor, b_TOR: Tensor) -> tuple[Tensor, Tensor]:
        # B of a head lies as its transpose: where the tiles are full, neither is copied.
        return self._tiled(a_TRI), self._tiled(b_TOR.mT).mT

    def _tiled(self, factor_TRX: Tensor) -> Tensor:
        if missing := -len(factor_TRX) % self.together:
            factor_TRX = torch.nn.functional.pad(factor_TRX, (0, 0, 0, 0, 0, missing))
        _, rank, size = factor_TRX.shape
        return factor_TRX.reshape(-1, self.together * rank, size)

    def keep_own(self, low_NR: Tensor) -> Tensor:
        # Not multiplied by zero: what is infinite of one task would be NaN for the others.
        return low_NR.masked_fill_(self.foreign_NX, 0)


class GroupedSegments(Segments):
    """torch's grouped product: one kernel for all tasks, the ends stay on the device. On a CPU it
    is the loop, in C++: half of the time where a task's product is as short as its call. torch's
    counter of FLOPs does not see it."""

    def __init__(self, ends: TaskEnds) -> None:
        self.offsets_T = ends.offsets_T

    def aligned(self, a_TRI: Tensor, b_TOR: Tensor) -> tuple[Tensor, Tensor]:
        missing = -a_TRI.shape[1] % (_ALIGNMENT_BYTES // a_TRI.element_size())
        if not missing:
            return a_TRI, b_TOR
        pad = torch.nn.functional.pad
        return pad(a_TRI, (0, 0, 0, missing)), pad(b_TOR, (0, missing))

    def times(self, x_NI: Tensor, matrix_TIO: Tensor) -> Tensor:
        return torch.nn.functional.grouped_mm(x_NI, matrix_TIO, offs=self.offsets_T)

    def add_times(self, out_NO: Tensor, x_NI: Tensor, matrix_TIO: Tensor) -> None:
        out_NO += self.times(x_NI, matrix_TIO)

    def outer(self, x_NI: Tensor, grad_NO: Tensor) -> Tensor:
        # Here the groups slide over the strided dimension, so they may end at any token.
        return torch.nn.functional.grouped_mm(x_NI.T, grad_NO, offs=self.offsets_T)


class PaddedSegments(Segments):
    """Batched products of segments padded to the longest: where nothing better runs."""

    def __init__(self, ends: TaskEnds) -> None:
        starts = [0, *ends.on_host[:-1]]
        longest = max(end - start for start, end in zip(starts, ends.on_host, strict=True))
        device = ends.offsets_T.device
        self.num_tasks, self.longest = len(starts), longest
        token_N = torch.arange(ends.on_host[-1], device=device)
        task_N = torch.searchsorted(ends.offsets_T, token_N, right=True)
        starts_T = torch.nn.functional.pad(ends.offsets_T, (1, 0))[:-1]
        self.place_N = task_N * longest + token_N - starts_T[task_N]
        """Token -> its place in the padded segments laid end to end."""

    def _padded(self, x: Tensor) -> Tensor:
        padded = x.new_zeros(self.num_tasks * self.longest, x.shape[1])
        return padded.index_copy_(0, self.place_N, x).view(self.num_tasks, self.longest, -1)

    def times(self, x_NI: Tensor, matrix_TIO: Tensor) -> Tensor:
        return torch.bmm(self._padded(x_NI), matrix_TIO).flatten(0, 1)[self.place_N]

    def add_times(self, out_NO: Tensor, x_NI: Tensor, matrix_TIO: Tensor) -> None:
        out_NO += self.times(x_NI, matrix_TIO)

    def outer(self, x_NI: Tensor, grad_NO: Tensor) -> Tensor:
        return torch.bmm(self._padded(x_NI).mT, self._padded(grad_NO))


class ShapeSegments(Segments):
    """On the meta device, where ends cannot be read: all tokens times one task's matrix have the
    shapes and the FLOPs of the real products."""

    def __init__(self, ends: TaskEnds) -> None:
        self.num_tasks = len(ends.offsets_T)

    def times(self, x_NI: Tensor, matrix_TIO: Tensor) -> Tensor:
        return torch.mm(x_NI, matrix_TIO[0])

    def add_times(self, out_NO: Tensor, x_NI: Tensor, matrix_TIO: Tensor) -> None:
        torch.addmm(out_NO, x_NI, matrix_TIO[0], out=out_NO)

    def outer(self, x_NI: Tensor, grad_NO: Tensor) -> Tensor:
        return torch.mm(x_NI.T, grad_NO).repeat(self.num_tasks, 1, 1)


class _Product(torch.autograd.Function):
    """`Segments.times` with its gradients."""

    @staticmethod
    def forward(ctx: Any, products: Segments, x_NI: Tensor, matrix_TIO: Tensor) -> Tensor:
        ctx.products = products
        ctx.save_for_backward(x_NI, matrix_TIO)
        return products.times(x_NI, matrix_TIO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        x_NI, matrix_TIO = ctx.saved_tensors
        _, needs_x, needs_matrix = ctx.needs_input_grad
        grad_NO = grad_NO.contiguous()
        return (
            None,
            ctx.products.times(grad_NO, matrix_TIO.mT) if needs_x else None,
            ctx.products.outer(x_NI, grad_NO) if needs_matrix else None,
        )


def product(products: Segments, x_NI: Tensor, matrix_TIO: Tensor) -> Tensor:
    """Each token times its task's matrix, with gradients of both.

    Args:
        products: as `segments` or `segments_of_whole` chose them for these tokens.
        x_NI: the tokens, task after task; copied where they are not contiguous.
        matrix_TIO: one matrix a task.

    Returns:
        (N, O).
    """
    out: Tensor = _Product.apply(products, x_NI.contiguous(), matrix_TIO)
    return out


def segments(x: Tensor, a_TRI: Tensor, b_TOR: Tensor, ends: TaskEnds | None) -> Segments:
    """The products for tokens such as x with these factors.

    Args:
        x: its device, dtype and sizes count.
        a_TRI, b_TOR: their shapes count.
        ends: of the tasks; None: every task has equally many tokens.
    """
    if ends is None:
        return EqualSegments(len(a_TRI))
    ends = ends.among(x.numel() // x.shape[-1])
    if x.device.type == "cpu":
        return _on_cpu(x.dtype, a_TRI, b_TOR, ends)
    return _elsewhere(x, b_TOR.shape[1], ends)


def segments_of_whole(
    x: Tensor, num_outputs: int, num_tasks: int, ends: TaskEnds | None
) -> Segments:
    """The products for tokens such as x with one whole matrix a task, or some outputs of it.

    Args:
        x: its device, dtype and sizes count.
        num_outputs: of a matrix.
        num_tasks: T.
        ends: of the tasks; None: every task has equally many tokens.
    """
    if ends is None:
        return EqualSegments(num_tasks)
    ends = ends.among(x.numel() // x.shape[-1])
    if x.device.type == "cpu":
        return _one_by_one(x.dtype, x.shape[-1], num_outputs, ends)
    return _elsewhere(x, num_outputs, ends)


def _elsewhere(x: Tensor, num_out: int, ends: TaskEnds) -> Segments:
    index = x.device.index if x.device.type == "cuda" else None
    is_aligned = _are_aligned(x.dtype, x.shape[-1], num_out)
    return ragged_kind(x.device.type, index, x.dtype, is_aligned)(ends)


def _are_aligned(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether rows of so many numbers are what grouped_mm takes."""
    return not any(size * dtype.itemsize % _ALIGNMENT_BYTES for size in sizes)


def _on_cpu(dtype: torch.dtype, a_TRI: Tensor, b_TOR: Tensor, ends: TaskEnds) -> Segments:
    num_tasks, rank, num_in = a_TRI.shape
    if dtype.itemsize == 2 and min(_TILE // rank, num_tasks) > 1:
        return TiledSegments(ends, rank)
    return _one_by_one(dtype, num_in, b_TOR.shape[1], ends)


def _one_by_one(dtype: torch.dtype, num_in: int, num_out: int, ends: TaskEnds) -> Segments:
    """On the CPU a product a task."""
    if dtype == torch.float32 and _are_aligned(dtype, num_in, num_out):
        return GroupedSegments(ends)
    return LoopedSegments(ends)


@lru_cache
def ragged_kind(
    device: str, index: int | None, dtype: torch.dtype, is_aligned: bool
) -> Callable[[TaskEnds], Segments]:
    """The products for segments of any lengths on another device than the CPU; asks a card for its
    capability once.

    Args:
        device: "cuda", or "meta" for shapes alone.
        index: of the card; None: the current one, or there is none.
        dtype: of the tokens.
        is_aligned: whether inputs and outputs of the linear are such as grouped_mm takes; ranks are
            padded to them.

    Returns:
        The class, which is made of the tasks' ends.
    """
    if device == "meta":
        return GroupedSegments if dtype == torch.bfloat16 and is_aligned else ShapeSegments
    major, _ = torch.cuda.get_device_capability(index)
    if dtype == torch.bfloat16 and is_aligned and major in _GROUPED_CAPABILITIES:
        return GroupedSegments
    return PaddedSegments
