"""The frozen Task LLM: applies an adapter and answers. It never sees the instruction unless a prompt states it.

Letters: E = T*M examples, T tasks, M examples a task, P virtual tokens.
"""

from torch import Tensor, nn

from ship_ds.model.adapters import Adapter
from ship_ds.model.batch import TokenBatch
from ship_ds.model.causal_lm import greedy, label_logits


class TaskLlm(nn.Module):
    """Rows are task-major: E rows of a batch share T adapters, E / T consecutive rows each."""

    def __init__(self, lm: nn.Module, checkpointing: bool) -> None:
        super().__init__()
        self.lm = lm
        self.checkpointing = checkpointing

    def forward(self, adapter: Adapter, batch: TokenBatch, num_tasks: int, packed: bool = False) -> tuple[Tensor, Tensor]:
        """Label logits (K, V) and labels (K,) of the answers."""
        return label_logits(
            self.lm, batch, _soft(adapter, len(batch.ids_ES)), adapter,
            packed=packed, checkpointing=self.checkpointing, num_tasks=num_tasks,
        )

    def generate(self, adapter: Adapter | None, prompts: TokenBatch, eos_id: int, max_new_tokens: int) -> list[list[int]]:
        soft = None if adapter is None else _soft(adapter, len(prompts.ids_ES))
        return greedy(self.lm, prompts, soft, adapter, eos_id, max_new_tokens)


def _soft(adapter: Adapter, num_rows: int) -> Tensor | None:
    virtual_TPH = adapter.virtual_tokens()
    return None if virtual_TPH is None else virtual_TPH.repeat_interleave(num_rows // len(virtual_TPH), 0)
