"""Token sequences of one forward: prompts with targets, padded and packed at once.

    sequences   [v v p p t]  [p t t]          v virtual token, p prompt, t target
    ids_ES      [[v v p p t], [p t t 0 0]]    padded on the right, 0 the padding
    packed      [v v p p t p t t]             the same tokens end to end, no padding

Sequences are task-major: those of a task lie side by side. Everything that depends on the data
(where a label is, which token predicts it, where a packed token comes from) is computed here, on
the host, as index tensors and plain ints. A forward only gathers by them, so it never waits for a
GPU to tell it a size, and it runs on the meta device, where there are shapes and no data.

Attention alone needs rows. Where no kernel takes them packed, it gets them in groups of about one
length, each padded to its longest (`RowGroups`), so that little of what it computes is padding.

Letters: E sequences, S padded length, N packed tokens, K labelled positions, T tasks,
H hidden size, X other letters flattened.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from ship_ds.flops import chunk_lengths


class OnDevice:
    """A frozen dataclass whose tensors move together, those of such dataclasses inside too."""

    def to(self, device: torch.device | str) -> Self:
        """The same on `device`.

        To a GPU all tensors travel as one pinned buffer in one copy, for which the host does not
        wait: from pageable memory it would, and once for each tensor.
        """
        tensors = list(self._tensors())
        device = torch.device(device)
        if device.type == "cuda" and all(tensor.device.type == "cpu" for tensor in tensors):
            on_device = from_one_buffer(
                in_one_buffer(tensors).pin_memory().to(device, non_blocking=True), tensors
            )
        else:
            on_device = [tensor.to(device) for tensor in tensors]
        return self._with(iter(on_device))

    def _tensors(self) -> Iterator[Tensor]:
        for value in self._values().values():
            yield from value._tensors() if isinstance(value, OnDevice) else (value,)

    def _with(self, tensors: Iterator[Tensor]) -> Self:
        """The same with these in place of `_tensors()`."""
        changed = {
            name: value._with(tensors) if isinstance(value, OnDevice) else next(tensors)
            for name, value in self._values().items()
        }
        return replace(self, **changed)  # type: ignore[type-var]

    def _values(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {
            name: value for name, value in values.items() if isinstance(value, Tensor | OnDevice)
        }


_ALIGNMENT = 16
"""Bytes; a tensor of any type may start there."""


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def in_one_buffer(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors on the host, one after the other, each aligned."""
    buffer = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, device="cpu")
    for view, tensor in zip(from_one_buffer(buffer, tensors), tensors, strict=True):
        view.copy_(tensor)
    return buffer


def from_one_buffer(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a buffer that `in_one_buffer` made, or of a copy: one a tensor, of its type and
    shape."""
    starts = accumulate(map(_room, like), initial=0)
    return [
        buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, like, strict=False)
    ]


@dataclass(frozen=True)
class Padded(OnDevice):
    """Which positions of the padded layout predict labels.

    Args:
        row_K, column_K: the row of each label, and the column of the token that predicts it.
    """

    row_K: Tensor
    column_K: Tensor


@dataclass(frozen=True)
class RowGroups(OnDevice):
    """Rows of about one length side by side, for attention without a kernel for lengths.

        lengths 5, 9, 8, 4 -> groups ((2, 9), (2, 5)): rows 1 and 2, then 0 and 3

    Args:
        place_N: where each packed token is in the groups' padded rows laid end to end.
        row_E: the sequence that each row of the groups is, longest first.
        groups: how many rows each has, and how long the longest is; on the host.
    """

    place_N: Tensor
    row_E: Tensor
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "RowGroups":
        """A group ends where a row would be padded by more than a third of its length."""
        order = sorted(range(len(lengths)), key=lambda e: -lengths[e])
        groups: list[tuple[int, int]] = []
        starts = [0] * len(lengths)
        end = 0
        for e in order:
            if not groups or 3 * groups[-1][1] > 4 * lengths[e]:
                groups.append((0, lengths[e]))
            count, width = groups[-1]
            groups[-1] = (count + 1, width)
            starts[e] = end
            end += width
        return cls(_ranges(starts, lengths), _tensor(order), tuple(groups))

    @classmethod
    def end_to_end(cls, parts: "Sequence[RowGroups]") -> "RowGroups":
        """Of the rows of several batches, one after the other: each keeps its groups."""
        places = accumulate((sum(map(math.prod, part.groups)) for part in parts), initial=0)
        numbers = accumulate((len(part.row_E) for part in parts), initial=0)
        return cls(
            torch.cat([part.place_N + n for part, n in zip(parts, places, strict=False)]),
            torch.cat([part.row_E + n for part, n in zip(parts, numbers, strict=False)]),
            tuple(group for part in parts for group in part.groups),
        )

    @property
    def are_equal(self) -> bool:
        """Whether all have one length: then the packed tokens lie as the rows do."""
        return len(self.groups) == 1 and len(self.place_N) == math.prod(self.groups[0])


@dataclass(frozen=True)
class Packed(OnDevice):
    """The packed layout.

    Args:
        source_N: where each token is in the padded ids laid end to end, 0 to E*S - 1.
        position_N: its position in its own sequence.
        ends: cumulative lengths from 0, (E + 1,), int32, as variable-length kernels want them.
        predicts_K: the packed token that predicts each label.
        last_E: the last token of each sequence.
        virtual_X: the places of virtual tokens, sequence by sequence.
        instruction_X: as `TokenBatch.instruction_X`, among the packed tokens.
        rows: how attention gets rows where it needs them.
    """

    source_N: Tensor
    position_N: Tensor
    ends: Tensor
    predicts_K: Tensor
    last_E: Tensor
    virtual_X: Tensor
    instruction_X: Tensor
    rows: RowGroups


@dataclass(frozen=True)
class TokenBatch(OnDevice):
    """Token ids, labels and where everything is. Labels are in row-major order everywhere.

    Args:
        ids_ES: right-padded; the ids of virtual tokens mean nothing.
        lengths_E: of the sequences.
        labels_K: the target tokens.
        padded, packed: how to get from hidden states or logits to the labels in either layout.
        instruction_X: places, in the padded ids laid end to end, of an instruction before the
            prompt; optimised embeddings may stand in for its tokens.
        num_virtual_tokens: places at the start of each sequence for embeddings put before it.
        lengths, target_lengths: of the sequences and of their targets, on the host.
    """

    ids_ES: Tensor
    lengths_E: Tensor
    labels_K: Tensor
    padded: Padded
    packed: Packed
    instruction_X: Tensor
    num_virtual_tokens: int
    lengths: tuple[int, ...]
    target_lengths: tuple[int, ...]

    @classmethod
    def build(
        cls,
        prompts: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]] | None,
        pad_id: int,
        num_virtual_tokens: int = 0,
        device: torch.device | str = "cpu",
        instructions: Sequence[Sequence[int]] | None = None,
    ) -> "TokenBatch":
        """Sequences [virtual tokens, instruction, prompt, target] with labels on the target.

        Args:
            prompts: token ids.
            targets: token ids, one row a prompt; None: prompts alone, to be continued.
            pad_id: fills rows up, and the places of virtual tokens.
            num_virtual_tokens: places for embeddings before each sequence.
            device: where the tensors go; they are made on the host.
            instructions: token ids before each prompt; None: none.
        """
        empty: list[Sequence[int]] = [()] * len(prompts)
        virtual = [pad_id] * num_virtual_tokens
        rows = [
            [*virtual, *before, *prompt, *target]
            for before, prompt, target in zip(
                instructions or empty, prompts, targets or empty, strict=True
            )
        ]
        width = max(map(len, rows))
        # The device is said each time: the planner builds batches inside `torch.device("meta")`.
        padded = [row + [pad_id] * (width - len(row)) for row in rows]
        ids_ES = torch.tensor(padded, dtype=torch.long, device="cpu")
        target_lengths = tuple(map(len, targets or empty))
        return cls._indexed(
            ids_ES,
            tuple(map(len, rows)),
            target_lengths,
            num_virtual_tokens,
            list(map(len, instructions or empty)),
        ).to(device)

    @classmethod
    def of_lengths(
        cls,
        num_rows: int,
        prompt_length: int,
        target_length: int,
        num_virtual_tokens: int = 0,
        device: torch.device | str = "meta",
    ) -> "TokenBatch":
        """A batch of equally long rows without texts, by default on the meta device.

            TokenBatch.of_lengths(8, 500, 128, 10)    # 8 rows of 10 + 500 + 128 tokens

        Args:
            num_rows: E.
            prompt_length: tokens of a prompt, an instruction before it included.
            target_length: tokens of a target; 0: prompts alone.
            num_virtual_tokens: places for embeddings before each sequence.
            device: where the tensors go.
        """
        length = num_virtual_tokens + prompt_length + target_length
        return cls._indexed(
            torch.zeros(num_rows, length, dtype=torch.long, device="cpu"),
            (length,) * num_rows,
            (target_length,) * num_rows,
            num_virtual_tokens,
            [0] * num_rows,
        ).to(device)

    @classmethod
    def _indexed(
        cls,
        ids_ES: Tensor,
        lengths: tuple[int, ...],
        target_lengths: tuple[int, ...],
        num_virtual_tokens: int,
        instruction_lengths: Sequence[int],
    ) -> "TokenBatch":
        width, num_rows = ids_ES.shape[1], len(lengths)
        ends = [0, *accumulate(lengths)]
        row_K = torch.arange(num_rows, device="cpu").repeat_interleave(_tensor(target_lengths))
        first = [length - target for length, target in zip(lengths, target_lengths, strict=True)]
        assert all(first) or not any(target_lengths), "a label needs a token before it"
        column_K = _ranges(first, target_lengths)
        padded_starts = [e * width for e in range(num_rows)]
        # The token before a label predicts it.
        return cls(
            ids_ES,
            _tensor(lengths),
            ids_ES[row_K, column_K],
            Padded(row_K, column_K - 1),
            Packed(
                _ranges(padded_starts, lengths),
                _ranges([0] * num_rows, lengths),
                _tensor(ends).to(torch.int32),
                _tensor(ends)[row_K] + column_K - 1,
                _tensor(ends)[1:] - 1,
                _ranges(ends[:-1], [num_virtual_tokens] * num_rows),
                _ranges([end + num_virtual_tokens for end in ends[:-1]], instruction_lengths),
                RowGroups.of(lengths),
            ),
            _ranges([start + num_virtual_tokens for start in padded_starts], instruction_lengths),
            num_virtual_tokens,
            lengths,
            target_lengths,
        )

    @property
    def num_targets(self) -> int:
        """Labels, K."""
        return sum(self.target_lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding, N."""
        return sum(self.lengths)

    @property
    def label_row_K(self) -> Tensor:
        """The sequence that each label belongs to."""
        return self.padded.row_K

    @property
    def real_ES(self) -> Tensor:
        """True where a position is not padding."""
        columns = torch.arange(self.ids_ES.shape[1], device=self.ids_ES.device)
        return columns < self.lengths_E[:, None]

    @property
    def has_padding(self) -> bool:
        """Whether rows are of unequal length; known on the host."""
        return len(set(self.lengths)) > 1

    def in_rows(self, states_NH: Tensor) -> Tensor:
        """States of the packed tokens as right-padded rows (E, S, H), zero in the padding."""
        num_rows, width = self.ids_ES.shape
        if self.has_padding:
            zeros_XH = states_NH.new_zeros(num_rows * width, states_NH.shape[1])
            states_NH = zeros_XH.index_copy(0, self.packed.source_N, states_NH)
        return states_NH.unflatten(0, (num_rows, width))

    def hiding(self, hidden_K: Tensor, token_id: int) -> "TokenBatch":
        """The same labels, where those that are hidden are read as another token by what comes
        after them.

        Args:
            hidden_K: which labels, booleans.
            token_id: that stands in their place.
        """
        # The label of a row and column is predicted one column before.
        read_K = torch.full_like(self.labels_K, token_id).where(hidden_K, self.labels_K)
        places = self.padded.row_K, self.padded.column_K + 1
        return replace(self, ids_ES=self.ids_ES.index_put(places, read_K))

    def in_chunks(self, most: int) -> "TokenBatch":
        """The same tokens in rows of at most so many: a longer one is cut into as few of about
        equal length as hold it, one after the other. So the packed tokens stay where they are.

        Args:
            most: tokens; this is a batch of prompts alone, without virtual tokens.
        """
        assert not self.num_targets and not self.num_virtual_tokens
        lengths = [part for length in self.lengths for part in chunk_lengths(length, most)]
        cut = self._indexed(
            torch.zeros(len(lengths), max(lengths), dtype=torch.long, device="cpu"),
            tuple(lengths),
            (0,) * len(lengths),
            0,
            [0] * len(lengths),
        ).to(self.ids_ES.device)
        ids_N = self.ids_ES.flatten().index_select(0, self.packed.source_N)
        ids_X = cut.ids_ES.flatten().index_copy(0, cut.packed.source_N, ids_N)
        return replace(cut, ids_ES=ids_X.view_as(cut.ids_ES))

    def task_offsets(self, num_tasks: int) -> Tensor | None:
        """Where each task's tokens end in the packed layout, (T,) int32; E / T sequences a task.

        None where all tasks have equally many tokens: then one batched product is faster than a
        grouped one.
        """
        rows = len(self.lengths) // num_tasks
        tokens = {sum(self.lengths[t * rows : (t + 1) * rows]) for t in range(num_tasks)}
        if len(tokens) == 1:
            return None
        return self.lengths_E.reshape(num_tasks, -1).sum(1).cumsum(0).to(torch.int32)


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one packed row are, for attention: of one batch or of several, one after
    the other.

    Args:
        position_N, ends, rows: as in `Packed`.
        longest: sequence, in tokens; on the host.
    """

    position_N: Tensor
    ends: Tensor
    rows: RowGroups
    longest: int

    @classmethod
    def of(cls, batches: Sequence[TokenBatch]) -> "Layout":
        """End to end."""
        longest = max(batch.ids_ES.shape[1] for batch in batches)
        packed = [batch.packed for batch in batches]
        if len(packed) == 1:
            [one] = packed
            return cls(one.position_N, one.ends, one.rows, longest)
        starts = accumulate((batch.num_tokens for batch in batches), initial=0)
        ends = [one.ends[:1] for one in packed[:1]]
        ends += [one.ends[1:] + start for one, start in zip(packed, starts, strict=False)]
        rows = RowGroups.end_to_end([one.rows for one in packed])
        return cls(torch.cat([one.position_N for one in packed]), torch.cat(ends), rows, longest)


def _tensor(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device="cpu")


def _ranges(starts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Consecutive numbers from each start: starts (5, 0), counts (2, 3) -> [5, 6, 0, 1, 2]."""
    counts_E = _tensor(counts)
    before_E = counts_E.cumsum(0) - counts_E
    within = torch.arange(sum(counts), device="cpu") - before_E.repeat_interleave(counts_E)
    return _tensor(starts).repeat_interleave(counts_E) + within
