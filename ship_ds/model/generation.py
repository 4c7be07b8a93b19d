"""Continuing many prompts at once: greedily and by sampling (search.py: by beams).

Rows that have finished leave the stream, so no step is spent on them.

Letters: E sequences, V vocabulary, Y generated tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ship_ds.model.language_model import Stream

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""(logits_EV of the running rows, which prompt each of them is, step) -> each one's next token."""


@torch.no_grad()
def continue_rows(
    stream: Stream,
    choose: Choose,
    eos_id: int,
    max_new_tokens: int,
    any_unfinished: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Each row's new tokens, up to and including its first end-of-sequence token.

    Args:
        stream: the prompts.
        choose: the next tokens.
        eos_id: ends a row.
        max_new_tokens: cuts a row off.
        any_unfinished: agrees over ranks whether to go on. Ranks that share sharded weights have to
            call the model equally often, or all of them hang.
    """
    running_E = torch.arange(stream.num_rows, device=stream.logits_EV.device)
    rows: list[list[int]] = [[] for _ in running_E]
    for step in range(max_new_tokens):
        next_E = choose(stream.logits_EV[: len(running_E)], running_E, step)
        for e, token in zip(running_E.tolist(), next_E.tolist(), strict=True):
            rows[e].append(token)
        goes_on_E = next_E != eos_id
        if step + 1 == max_new_tokens or not any_unfinished(bool(goes_on_E.any())):
            break
        unfinished = goes_on_E.nonzero()[:, 0]
        running_E, next_E = running_E[unfinished], next_E[unfinished]
        if not len(unfinished):
            # Another rank has rows to finish: this one goes on with a row that nobody reads.
            unfinished, next_E = unfinished.new_zeros(1), unfinished.new_full((1,), eos_id)
        if len(unfinished) < stream.num_rows:
            stream.select(unfinished)
        stream.advance(next_E)
    return rows


def greedy(
    stream: Stream,
    eos_id: int,
    max_new_tokens: int,
    any_unfinished: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """The most likely token at every step; arguments as in `continue_rows`."""

    def choose(logits_EV: Tensor, running_E: Tensor, step: int) -> Tensor:
        return logits_EV.argmax(-1)

    return continue_rows(stream, choose, eos_id, max_new_tokens, any_unfinished)


def sample(stream: Stream, uniform_EY: Tensor, temperature: float, eos_id: int) -> list[list[int]]:
    """Tokens drawn from softmax(logits / temperature).

    Args:
        stream: the prompts.
        uniform_EY: in [0, 1); row e's token y is chosen by uniform_EY[e, y], so a row's draw does
            not depend on what else is in the batch. Y is the most tokens a row gets.
        temperature: near zero is greedy.
        eos_id: ends a row.
    """
    uniform_EY = uniform_EY.to(stream.logits_EV.device)

    def choose(logits_EV: Tensor, running_E: Tensor, step: int) -> Tensor:
        sums_EV = (logits_EV.float() / temperature).softmax(-1).cumsum(-1)
        # Rounding can leave the last sum below a draw.
        aims = uniform_EY[running_E, step][:, None] * sums_EV[:, -1:]
        return torch.searchsorted(sums_EV, aims, right=True)[:, 0].clamp(max=sums_EV.shape[1] - 1)

    return continue_rows(stream, choose, eos_id, uniform_EY.shape[1])
