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


@torch.no_grad()
def beam_search(
    stream: Stream, num_beams: int, eos_id: int, max_new_tokens: int, length_penalty: float = 1.0
) -> list[list[tuple[float, list[int]]]]:
    """For each prompt its `num_beams` best continuations with their scores, best first; tokens as
    `greedy` gives them.

    A score is the sum of log-probabilities over length ** length_penalty. Same search and stopping
    rule as `generate` in transformers 5 with early_stopping=False.
    """
    searches = [_Search(num_beams, length_penalty) for _ in stream.mask_ES]
    going = list(range(len(searches)))
    beams_GB = torch.zeros(len(searches), 1, device=stream.logits_EV.device)
    for length in range(1, max_new_tokens + 1):
        log_probs_GBV = (
            stream.logits_EV.float().log_softmax(-1).unflatten(0, beams_GB.shape)
            + beams_GB[..., None]
        )
        num_kept = min(2 * num_beams, log_probs_GBV[0].numel())
        top = log_probs_GBV.flatten(1).topk(num_kept)
        vocabulary = log_probs_GBV.shape[-1]
        origins = (top.indices // vocabulary).tolist()
        tokens, scores = (top.indices % vocabulary).tolist(), top.values.tolist()
        is_last = length == max_new_tokens
        kept: list[tuple[int, int]] = []
        for g, owner in enumerate(going):
            kept += [
                (g * beams_GB.shape[1] + origin, owner)
                for origin in searches[owner].extend(
                    list(zip(scores[g], origins[g], tokens[g], strict=True)), eos_id, is_last
                )
            ]
        going = [owner for owner in going if searches[owner].is_going]
        if is_last or not going:
            break
        rows = [row for row, owner in kept if searches[owner].is_going]
        stream.select(torch.tensor(rows, device=stream.logits_EV.device))
        stream.advance(
            torch.tensor(
                [t for g in going for *_, t in searches[g].running_tokens()], device=beams_GB.device
            )
        )
        beams_GB = torch.tensor(
            [[score for score, _ in searches[g].running] for g in going], device=beams_GB.device
        )
    return [search.finished for search in searches]


class _Search:
    """The beams of one prompt: `running` and `finished`, each a list of (score, tokens), best
    first."""

    def __init__(self, num_beams: int, length_penalty: float) -> None:
        self.num_beams, self.length_penalty = num_beams, length_penalty
        self.running: list[tuple[float, list[int]]] = [(0.0, [])]
        self.finished: list[tuple[float, list[int]]] = []
        self.is_going = True

    def running_tokens(self) -> list[list[int]]:
        return [tokens for _, tokens in self.running]

    def extend(self, best: list[tuple[float, int, int]], eos_id: int, is_last: bool) -> list[int]:
        """Take the best (sum, beam, token) extensions; the beams that the new running ones
        continue.

        Of the finished ones only those among the first `num_beams` count; the others are a reserve
        of running beams.
        """
        length = len(self.running[0][1]) + 1
        ended = [
            (score / length**self.length_penalty, [*self.running[beam][1], token])
            for score, beam, token in best[: self.num_beams]
            if is_last or token == eos_id
        ]
        self.finished = sorted(self.finished + ended, key=lambda found: -found[0])[: self.num_beams]
        going_on = [(score, beam, token) for score, beam, token in best if token != eos_id][
            : self.num_beams
        ]
        self.running = [(score, [*self.running[beam][1], token]) for score, beam, token in going_on]
        is_full = len(self.finished) == self.num_beams
        self.is_going = not is_last and (
            not is_full or self.running[0][0] / length**self.length_penalty > self.finished[-1][0]
        )
        return [beam for _, beam, _ in going_on]
