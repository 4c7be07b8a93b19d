"""The frozen Task LLM: applies an adapter and answers. It never sees the instruction unless a
prompt states it.

Letters: E = T*M examples, T tasks, M examples a task, H hidden.
"""

from collections.abc import Callable

from torch import Tensor, nn

from ship_ds.model.adapters import Adapter
from ship_ds.model.batch import TokenBatch
from ship_ds.model.causal_lm import label_logits
from ship_ds.model.generation import Stream, greedy


class TaskLlm(nn.Module):
    """Rows are task-major: E rows of a batch share T adapters, E / T consecutive rows each.

    instruction: embeddings (T, *, H) in place of the instruction tokens that the batch reserved
    before each prompt.
    """

    def __init__(self, lm: nn.Module, checkpointing: bool) -> None:
        super().__init__()
        self.lm = lm
        self.checkpointing = checkpointing
        self.eval()

    def train(self, mode: bool = True) -> "TaskLlm":
        """Frozen, so never in training mode: its own dropout stays off while the rest of SHIP
        trains."""
        return super().train(False)

    def forward(
        self,
        adapter: Adapter | None,
        batch: TokenBatch,
        num_tasks: int,
        packed: bool = False,
        instruction: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Label logits (K, V) and labels (K,) of the answers; no adapter: those of the bare
        base."""
        num_rows = len(batch.ids_ES)
        soft = None if adapter is None else _per_row(adapter.virtual_tokens(), num_rows)
        return label_logits(
            self.lm,
            batch,
            soft,
            adapter,
            instruction=_per_row(instruction, num_rows),
            packed=packed,
            checkpointing=self.checkpointing,
            num_tasks=num_tasks,
        )

    def generate(
        self,
        adapter: Adapter | None,
        prompts: TokenBatch,
        eos_id: int,
        max_new_tokens: int,
        instruction: Tensor | None = None,
        any_unfinished: Callable[[bool], bool] = bool,
    ) -> list[list[int]]:
        num_rows = len(prompts.ids_ES)
        soft = None if adapter is None else _per_row(adapter.virtual_tokens(), num_rows)
        return greedy(
            self.lm,
            prompts,
            soft,
            adapter,
            eos_id,
            max_new_tokens,
            instruction=_per_row(instruction, num_rows),
            any_unfinished=any_unfinished,
        )

    def stream(self, adapter: Adapter | None, prompts: TokenBatch) -> Stream:
        """The prompts read under their tasks' adapters, to be continued."""
        soft = None if adapter is None else _per_row(adapter.virtual_tokens(), len(prompts.ids_ES))
        return Stream(self.lm, prompts, soft, adapter)


def _per_row(per_task: Tensor | None, num_rows: int) -> Tensor | None:
    return None if per_task is None else per_task.repeat_interleave(num_rows // len(per_task), 0)
