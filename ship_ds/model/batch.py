"""One batch of token sequences for a causal LM: prompts with targets, laid out packed, padded as a view of it.

Sequences are task-major. Places for soft (virtual) tokens are reserved in the ids, so that prepended embeddings go the same
way through the packed and the padded layout.

Letters: E sequences, S padded length, N packed tokens, T tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded ids_ES with labels_ES (IGNORE where there is none), lengths_E and soft-token slots_ES."""

    ids_ES: Tensor
    labels_ES: Tensor
    lengths_E: Tensor
    slots_ES: Tensor

    @classmethod
    def build(
        cls,
        prompts: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]] | None,
        pad_id: int,
        num_virtual_tokens: int = 0,
        device: torch.device | str = "cpu",
    ) -> "TokenBatch":
        """Sequences [virtual tokens, prompt, target]; labels on the target. No targets: prompts alone."""
        rows = [(list(prompt), list(target)) for prompt, target in zip(prompts, targets or [()] * len(prompts), strict=True)]
        lengths = [num_virtual_tokens + len(prompt) + len(target) for prompt, target in rows]
        width = max(lengths)
        ids = torch.full((len(rows), width), pad_id)
        labels = torch.full((len(rows), width), IGNORE)
        for e, (prompt, target) in enumerate(rows):
            ids[e, num_virtual_tokens : lengths[e]] = torch.tensor(prompt + target, dtype=torch.long)
            labels[e, lengths[e] - len(target) : lengths[e]] = torch.tensor(target, dtype=torch.long)
        slots = torch.zeros_like(ids, dtype=torch.bool)
        slots[:, :num_virtual_tokens] = True
        return cls(ids.to(device), labels.to(device), torch.tensor(lengths, device=device), slots.to(device))

    @property
    def real_ES(self) -> Tensor:
        """True where a position is not padding."""
        return torch.arange(self.ids_ES.shape[1], device=self.ids_ES.device) < self.lengths_E[:, None]

    @property
    def num_targets(self) -> int:
        return int((self.labels_ES != IGNORE).sum())

    @property
    def num_tokens(self) -> int:
        return int(self.lengths_E.sum())

    def task_offsets(self, num_tasks: int) -> Tensor:
        """Where each task's tokens end in the packed layout, (T,) int32, for E / T sequences a task."""
        return self.lengths_E.reshape(num_tasks, -1).sum(1).cumsum(0).to(torch.int32)
