"""One batch of token sequences for a causal LM: prompts with targets, laid out packed, padded as a
view of it.

Sequences are task-major. Places for soft (virtual) tokens are reserved in the ids, so that
prepended embeddings go the same way through the packed and the padded layout.

Letters: E sequences, S padded length, T tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded ids_ES with labels_ES (IGNORE where there is none) and lengths_E.

    slots_ES: places of virtual tokens, whose ids mean nothing. instruction_ES: places of an
    instruction before the prompt; their ids are its tokens, and optimised embeddings may stand in
    for them.
    """

    ids_ES: Tensor
    labels_ES: Tensor
    lengths_E: Tensor
    slots_ES: Tensor
    instruction_ES: Tensor

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
        """Sequences [virtual tokens, instruction, prompt, target]; labels on the target. No
        targets: prompts alone."""
        empty: list[Sequence[int]] = [()] * len(prompts)
        rows = [
            ([pad_id] * num_virtual_tokens, list(before), list(prompt), list(target))
            for before, prompt, target in zip(
                instructions or empty, prompts, targets or empty, strict=True
            )
        ]
        lengths_E = torch.tensor([sum(map(len, row)) for row in rows])
        shape = len(rows), int(lengths_E.max())
        ids_ES, labels_ES = torch.full(shape, pad_id), torch.full(shape, IGNORE)
        slots_ES, instruction_ES = (
            torch.zeros(shape, dtype=torch.bool),
            torch.zeros(shape, dtype=torch.bool),
        )
        for e, (virtual, before, prompt, target) in enumerate(rows):
            ids = torch.tensor(virtual + before + prompt + target, dtype=torch.long)
            ids_ES[e, : len(ids)] = ids
            labels_ES[e, len(ids) - len(target) : len(ids)] = ids[len(ids) - len(target) :]
            slots_ES[e, : len(virtual)] = True
            instruction_ES[e, len(virtual) : len(virtual) + len(before)] = True
        return cls(
            *(
                tensor.to(device)
                for tensor in (ids_ES, labels_ES, lengths_E, slots_ES, instruction_ES)
            )
        )

    @property
    def real_ES(self) -> Tensor:
        """True where a position is not padding."""
        return (
            torch.arange(self.ids_ES.shape[1], device=self.ids_ES.device) < self.lengths_E[:, None]
        )

    @property
    def num_targets(self) -> int:
        return int((self.labels_ES != IGNORE).sum())

    @property
    def label_rows(self) -> Tensor:
        """The sequence that each label belongs to, (K,), in the row-major order of label logits."""
        return (self.labels_ES != IGNORE).nonzero()[:, 0]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths_E.sum())

    def task_offsets(self, num_tasks: int) -> Tensor:
        """Where each task's tokens end in the packed layout, (T,) int32, for E / T sequences a
        task."""
        return self.lengths_E.reshape(num_tasks, -1).sum(1).cumsum(0).to(torch.int32)
