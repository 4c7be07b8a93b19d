"""Continuing many prompts at once with a KV cache: greedy, by sampling and by beam search.

A `Stream` holds the rows that still run. Selecting rows moves the cache and each row's adapter
together, so one operation compacts finished rows, reorders beams and repeats a prompt for several
samples of it.

Letters: E rows, S padded length, V vocabulary, A running rows, N new tokens, G prompts of a beam
search, B beams.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.model.adapters import Adapter
from ship_ds.model.batch import TokenBatch
from ship_ds.model.causal_lm import embed

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""(logits_AV, which prompt each running row is (A,), step) -> the next token of each row (A,)."""


class Stream:
    """Prompts read once; then each `advance` adds a token to every running row. `logits_EV` predict
    the next one."""

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        prompts: TokenBatch,
        soft: Tensor | None = None,
        adapter: Adapter | None = None,
        instruction: Tensor | None = None,
    ) -> None:
        """The adapter's tasks have equally many consecutive rows each; soft, instruction: as in
        `embed`."""
        self.model, self.adapter = model, adapter
        num_rows, width = prompts.ids_ES.shape
        rows_per_task = num_rows // adapter.num_tasks if adapter is not None else 1
        self.task_E = torch.arange(num_rows, device=prompts.ids_ES.device) // rows_per_task
        self.next_position_E = prompts.lengths_E
        columns = torch.arange(width, device=prompts.ids_ES.device)[None]
        shift_E1 = (width - prompts.lengths_E)[:, None]
        # Padding goes to the left, so that the last column is every row's last token.
        hidden_ESH = embed(model, prompts, soft, instruction)
        hidden_ESH = hidden_ESH.gather(
            1, ((columns - shift_E1) % width)[..., None].expand_as(hidden_ESH)
        )
        self.mask_ES = (columns >= shift_E1).long()
        self._run(inputs_embeds=hidden_ESH, position_ids=(self.mask_ES.cumsum(1) - 1).clamp(min=0))

    @property
    def num_rows(self) -> int:
        """How many rows run."""
        return len(self.mask_ES)

    def _run(self, **inputs: Any) -> None:
        extra = {} if self.adapter is None else {"ship_adapter": self.adapter}
        out = self.model(
            attention_mask=self.mask_ES, use_cache=True, logits_to_keep=1, **extra, **inputs
        )
        self.logits_EV: Tensor = out.logits[:, -1]
        self.cache = out.past_key_values

    @torch.no_grad()
    def advance(self, next_E: Tensor) -> None:
        """Add one token to each row."""
        self.mask_ES = torch.cat([self.mask_ES, torch.ones_like(self.mask_ES[:, :1])], 1)
        self._run(
            input_ids=next_E[:, None],
            position_ids=self.next_position_E[:, None],
            past_key_values=self.cache,
        )
        self.next_position_E = self.next_position_E + 1

    def select(self, index_E: Tensor) -> None:
        """Row e becomes what row index_E[e] was. Rows of one task have to stay together for the
        adapter's products."""
        self.cache.batch_select_indices(index_E)
        self.mask_ES, self.logits_EV = self.mask_ES[index_E], self.logits_EV[index_E]
        self.next_position_E = self.next_position_E[index_E]
        if self.adapter is None:
            return
        tasks, own_E, counts = torch.unique_consecutive(
            self.task_E[index_E], return_inverse=True, return_counts=True
        )
        if not torch.equal(tasks, torch.arange(self.adapter.num_tasks, device=tasks.device)):
            self.adapter = self.adapter.rows(tasks)
        self.task_E = own_E
        is_even = bool((counts == counts[0]).all())
        self.adapter = self.adapter.over(None if is_even else counts.cumsum(0).to(torch.int32))


@torch.no_grad()
def continue_rows(
    stream: Stream,
    choose: Choose,
    eos_id: int,
    max_new_tokens: int,
    any_unfinished: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Each row's new tokens, up to and including its first end-of-sequence token; finished rows
    leave the batch.

    `any_unfinished(flag)` agrees over ranks whether to go on: ranks that share sharded weights have
    to stay in step, so one whose rows are all finished goes on with a row that nobody reads.
    """
    running_A = torch.arange(len(stream.mask_ES), device=stream.mask_ES.device)
    rows: list[list[int]] = [[] for _ in running_A]
    for step in range(max_new_tokens):
        next_A = choose(stream.logits_EV[: len(running_A)], running_A, step)
        for e, token in zip(running_A.tolist(), next_A.tolist(), strict=True):
            rows[e].append(token)
        going_A = next_A != eos_id
        if step + 1 == max_new_tokens or not any_unfinished(bool(going_A.any())):
            break
        kept = going_A.nonzero()[:, 0]
        running_A, next_A = running_A[kept], next_A[kept]
        if not len(kept):
            kept, next_A = kept.new_zeros(1), kept.new_full((1,), eos_id)
        if len(kept) < len(stream.mask_ES):
            stream.select(kept)
        stream.advance(next_A)
    return rows


@torch.no_grad()
def greedy(
    model: nn.Module,
    prompts: TokenBatch,
    soft: Tensor | None,
    adapter: Adapter | None,
    eos_id: int,
    max_new_tokens: int,
    *,
    instruction: Tensor | None = None,
    any_unfinished: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """The most likely token at every step; arguments as in `Stream` and `continue_rows`."""
    stream = Stream(model, prompts, soft, adapter, instruction)
    return continue_rows(
        stream,
        lambda logits_AV, rows_A, step: logits_AV.argmax(-1),
        eos_id,
        max_new_tokens,
        any_unfinished,
    )


def sample(stream: Stream, uniform_EN: Tensor, temperature: float, eos_id: int) -> list[list[int]]:
    """Tokens drawn from softmax(logits / temperature); row e's n-th token is settled by
    uniform_EN[e, n] in [0, 1).

    So a row's draw does not depend on what else is in the batch. N is the most tokens a row gets.
    """
    uniform_EN = uniform_EN.to(stream.logits_EV.device)

    def choose(logits_AV: Tensor, rows_A: Tensor, step: int) -> Tensor:
        sums_AV = (logits_AV.float() / temperature).softmax(-1).cumsum(-1)
        # Rounding can leave the last sum below a draw.
        aims_A1 = uniform_EN[rows_A, step][:, None] * sums_AV[:, -1:]
        return torch.searchsorted(sums_AV, aims_A1, right=True)[:, 0].clamp(
            max=sums_AV.shape[1] - 1
        )

    return continue_rows(stream, choose, eos_id, uniform_EN.shape[1])
