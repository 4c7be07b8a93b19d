"""The frozen Task LLM: applies an adapter and answers. It never sees the instruction unless a
prompt states it.

Rows are task-major: E rows of a batch share T adapters, E / T consecutive rows each.

Letters: E sequences, T tasks, K labelled positions, H hidden size.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ship_ds.model.adapters.adapter import Adapter, Sites
from ship_ds.model.adapters.sites import linears_of, sites_of, wrap_also
from ship_ds.model.batch import TokenBatch
from ship_ds.model.generation import greedy
from ship_ds.model.language_model import Passage, Stream
from ship_ds.model.role import Writer


class TaskLlm(Writer):
    """A language model under adapters. No weight of it is ever trained."""

    def __init__(self, lm: nn.Module, checkpointing: bool, sites: Sites | None = None) -> None:
        """Wrap a model.

        Args:
            lm: a transformers model whose sites are wrapped already.
            checkpointing: recompute its blocks in the backward pass.
            sites: those that adapters of the Task LLM may change; None: all wrapped ones.
        """
        super().__init__(lm, checkpointing=checkpointing)
        self._sites = sites_of(lm) if sites is None else sites
        self.before_pass: Callable[[], None] | None = None
        """What a stream, its tokens and `logits` wait for; see `wait_before_passes`."""
        self.eval()

    def wait_before_passes(self, wait: Callable[[], None]) -> Callable[[], None]:
        """Call `wait` before each pass through this model, where somebody takes turns (turns.py,
        serving/room.py); once a pass, whichever way it is made.

        Returns:
            What ends that.
        """
        self.before_pass = wait
        # What is scored or trained comes by `forward` and by nothing else. Before DeepSpeed's own
        # hooks, which gather.
        handle = self.register_forward_pre_hook(lambda *_: wait(), prepend=True)

        def end() -> None:
            handle.remove()
            if self.before_pass is wait:  # and nobody has come after
                self.before_pass = None

        return end

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
        beside: Passage | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States (K, H) before the labels of the answers, and the labels (K,); see
        `LanguageModel.label_states`.

        Args:
            adapter: of the tasks; None: the bare base.
            batch: questions with targets.
            num_tasks: T.
            packed: without padding, where the model can.
            instruction: embeddings (T, instruction length, H) in place of the instruction tokens
                that the batch has before each prompt.
            beside: what another role reads in the same pass, packed; its states and labels follow,
                in the same tensors, so that hooks on this module see what they always do.
        """
        num_rows = len(batch.lengths)
        soft = _virtual_tokens(adapter, num_rows)
        instruction = _per_row(instruction, num_rows)
        if beside is not None:
            assert packed
            passage = Passage(batch, adapter, num_tasks, soft, instruction)
            states = self.language_model.label_states_together(
                [passage, beside], checkpointing=self.checkpointing
            )
            return torch.cat(states), torch.cat([batch.labels_K, beside.batch.labels_K])
        states_KH = self.language_model.label_states(
            batch,
            adapter,
            num_tasks,
            soft=soft,
            instruction=instruction,
            packed=packed and self.language_model.packs,
            checkpointing=self.checkpointing,
        )
        return states_KH, batch.labels_K

    def generate(
        self,
        adapter: Adapter | None,
        prompts: TokenBatch,
        eos_id: int,
        max_new_tokens: int,
        instruction: Tensor | None = None,
        other_ends: Sequence[int] = (),
    ) -> list[list[int]]:
        """Greedy answers as token ids, each up to and including its end of sequence.

        Args:
            adapter: of the tasks; None: the bare base.
            prompts: questions without targets.
            eos_id: ends a row.
            max_new_tokens: cuts a row off.
            instruction: embeddings (T, instruction length, H) in place of the instruction tokens
                that the batch has before each prompt; None: theirs.
            other_ends: tokens that end a row too, and are given back as `eos_id`.
        """
        stream = self.stream(adapter, prompts, instruction)
        return greedy(stream, eos_id, max_new_tokens, other_ends)

    def stream(
        self, adapter: Adapter | None, prompts: TokenBatch, instruction: Tensor | None = None
    ) -> Stream:
        """The prompts read under their tasks' adapters, to be continued.

        Args:
            adapter: of the tasks; None: the bare base.
            prompts: questions without targets.
            instruction: embeddings (T, instruction length, H) in place of the instruction tokens
                that the batch has before each prompt; None: theirs.
        """
        if self.before_pass is not None:
            self.before_pass()
        num_rows = len(prompts.lengths)
        stream = self.language_model.stream(
            prompts,
            adapter,
            soft=_virtual_tokens(adapter, num_rows),
            instruction=_per_row(instruction, num_rows),
        )
        # Each token is a pass, too: who takes turns (turns.py, serving/room.py) comes between two.
        stream.before_token = self.before_pass
        return stream

    def logits(self, adapter: Adapter | None, prompts: TokenBatch) -> Tensor:
        """See `LanguageModel.logits`."""
        if self.before_pass is not None:
            self.before_pass()
        soft = _virtual_tokens(adapter, len(prompts.lengths))
        return self.language_model.logits(prompts, adapter, soft)

    def linears(self) -> dict[str, nn.Module]:
        """Every linear of its blocks by module path, wrapped or not."""
        return linears_of(self.lm)

    def make_ready(self, paths: Iterable[str]) -> None:
        """Let adapters change these linears too, beside the run's own sites."""
        wrap_also(self.lm, paths)

    def sites(self) -> Sites:
        """Module path -> (in, out) of every linear that an adapter may change."""
        return self._sites


def _virtual_tokens(adapter: Adapter | None, num_rows: int) -> Tensor | None:
    """The adapter's virtual tokens, once for each row."""
    return None if adapter is None else _per_row(adapter.virtual_tokens(), num_rows)


def _per_row(per_task: Tensor | None, num_rows: int) -> Tensor | None:
    """Task t's value for each of its consecutive rows."""
    return None if per_task is None else per_task.repeat_interleave(num_rows // len(per_task), 0)
