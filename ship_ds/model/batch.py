"""Token sequences of one forward: prompts with targets, padded and packed at once.

    sequences   [v v p p t]  [p t t]          v virtual token, p prompt, t target
    ids_ES      [[v v p p t], [p t t 0 0]]    padded on the right, 0 the padding
    packed      [v v p p t p t t]             the same tokens end to end, no padding

Sequences are task-major: those of a task lie side by side. Everything that depends on the data
(where a label is, which token predicts it, where a packed token comes from) is computed here, on
the host, as index tensors and plain ints. A forward only gathers by them, so it never waits for a
GPU to tell it a size, and it runs on the meta device, where there are shapes and no data.

Letters: E sequences, S padded length, N packed tokens, K labelled positions, T tasks,
X other letters flattened.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor


class _Tensors:
    """A frozen dataclass whose tensors move together."""

    def to(self, device: torch.device | str) -> Self:
        """The same on `device`."""
        moved = {
            field.name: _moved(getattr(self, field.name), torch.device(device))
            for field in fields(self)  # type: ignore[arg-type]
            if isinstance(getattr(self, field.name), Tensor | _Tensors)
        }
        return replace(self, **moved)  # type: ignore[type-var]


def _moved(value: "Tensor | _Tensors", device: torch.device) -> "Tensor | _Tensors":
    if isinstance(value, _Tensors) or device.type != "cuda" or value.device.type != "cpu":
        return value.to(device)
    # From pageable memory the copy would stop the host until the GPU has caught up.
    return value.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Padded(_Tensors):
    """Which positions of the padded layout predict labels.

    Args:
        columns: columns that predict a label in at least one row, in order; the others need no
            logits.
        row_K, place_K: the row of each label, and which of `columns` predicts it.
    """

    columns: Tensor
    row_K: Tensor
    place_K: Tensor


@dataclass(frozen=True)
class Packed(_Tensors):
    """The packed layout.

    Args:
        source_N: where each token is in the padded ids laid end to end, 0 to E*S - 1.
        position_N: its position in its own sequence.
        ends: cumulative lengths from 0, (E + 1,), int32, as variable-length kernels want them.
        predicts_K: the packed token that predicts each label.
    """

    source_N: Tensor
    position_N: Tensor
    ends: Tensor
    predicts_K: Tensor


@dataclass(frozen=True)
class TokenBatch(_Tensors):
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
        before_lengths = list(map(len, instructions or empty))
        starts = [e * width + num_virtual_tokens for e in range(len(rows))]
        return cls._indexed(
            ids_ES,
            tuple(map(len, rows)),
            target_lengths,
            num_virtual_tokens,
            _ranges(starts, before_lengths),
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
            _ranges([], []),
        ).to(device)

    @classmethod
    def _indexed(
        cls,
        ids_ES: Tensor,
        lengths: tuple[int, ...],
        target_lengths: tuple[int, ...],
        num_virtual_tokens: int,
        instruction_X: Tensor,
    ) -> "TokenBatch":
        width = ids_ES.shape[1]
        ends = [0, *accumulate(lengths)]
        row_K = torch.arange(len(lengths), device="cpu").repeat_interleave(_tensor(target_lengths))
        first = [length - target for length, target in zip(lengths, target_lengths, strict=True)]
        assert all(first) or not any(target_lengths), "a label needs a token before it"
        column_K = _ranges(first, target_lengths)
        # The token before a label predicts it.
        columns, place_K = (column_K - 1).unique(return_inverse=True)
        return cls(
            ids_ES,
            _tensor(lengths),
            ids_ES[row_K, column_K],
            Padded(columns, row_K, place_K),
            Packed(
                _ranges([e * width for e in range(len(lengths))], lengths),
                _ranges([0] * len(lengths), lengths),
                _tensor(ends).to(torch.int32),
                _tensor(ends)[row_K] + column_K - 1,
            ),
            instruction_X,
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


def _tensor(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device="cpu")


def _ranges(starts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Consecutive numbers from each start: starts (5, 0), counts (2, 3) -> [5, 6, 0, 1, 2]."""
    counts_E = _tensor(counts)
    before_E = counts_E.cumsum(0) - counts_E
    within = torch.arange(int(counts_E.sum()), device="cpu") - before_E.repeat_interleave(counts_E)
    return _tensor(starts).repeat_interleave(counts_E) + within
