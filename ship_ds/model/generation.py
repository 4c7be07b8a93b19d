"""Continuing many prompts at once: greedily and by sampling (search.py: by beams).

Rows that have finished leave the stream when they are a quarter of it: each time costs a copy of
the others' keys and values, and until then a finished row costs no more than any other.

Letters: E sequences, V vocabulary, X other letters flattened, Y generated tokens.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ship_ds.model.language_model import Stream

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""(logits_EV of the running rows, which prompt each of them is, step) -> each one's next token."""
_COMPACTS_BELOW = 0.75
"""Share of the stream's rows that still run."""


@torch.no_grad()
def continue_rows(
    stream: Stream, choose: Choose, eos_id: int, max_new_tokens: int
) -> list[list[int]]:
    """Each row's new tokens, up to and including its first end-of-sequence token.

    Args:
        stream: the prompts.
        choose: the next tokens.
        eos_id: ends a row.
        max_new_tokens: cuts a row off.
    """
    texts: list[list[int]] = [[] for _ in range(stream.num_rows)]
    running = list(range(stream.num_rows))
    running_E = stream.index(running)
    # One fewer: the last token is chosen and never read.
    stream.reserve(max_new_tokens - 1)
    for step in range(max_new_tokens):
        next_E = choose(stream.logits_EV, running_E, step)
        # The one wait for the device a token.
        for row, token in zip(running, next_E.tolist(), strict=True):
            if not texts[row] or texts[row][-1] != eos_id:
                texts[row].append(token)
        unfinished = [place for place, row in enumerate(running) if texts[row][-1] != eos_id]
        if step + 1 == max_new_tokens or not unfinished:
            break
        if len(unfinished) <= _COMPACTS_BELOW * len(running):
            running = [running[place] for place in unfinished]
            index_E = stream.index(unfinished)
            running_E, next_E = running_E[index_E], next_E[index_E]
            stream.select(unfinished)
        stream.advance(next_E)
    return texts


def with_one_end(tokens_E: Tensor, eos_id: int, ends_X: Tensor) -> Tensor:
    """These tokens, with `eos_id` in place of any other end.

    Args:
        tokens_E: one a row, or one a label.
        eos_id: the end that is kept.
        ends_X: the others; empty: there are none.

    Returns:
        As many, in the same places.
    """
    if not len(ends_X):
        return tokens_E
    return tokens_E.masked_fill(torch.isin(tokens_E, ends_X), eos_id)


def greedy(
    stream: Stream, eos_id: int, max_new_tokens: int, other_ends: Sequence[int] = ()
) -> list[list[int]]:
    """The most likely token at every step, of each row up to and including its first end.

    Args:
        stream: the prompts.
        eos_id: ends a row.
        max_new_tokens: cuts a row off.
        other_ends: tokens that end a row too, and are given back as `eos_id`.
    """
    ends_X = torch.tensor(other_ends, device=stream.logits_EV.device)

    def choose(logits_EV: Tensor, running_E: Tensor, step: int) -> Tensor:
        return with_one_end(logits_EV.argmax(-1), eos_id, ends_X)

    return continue_rows(stream, choose, eos_id, max_new_tokens)


@torch.no_grad()
def greedy_of_length(stream: Stream, num_tokens: int) -> Tensor:
    """The most likely token at every step, (E, Y): exactly `num_tokens` of each row, whatever ends
    in them, so that the number of passes is known beforehand and the host waits for none."""
    stream.reserve(num_tokens - 1)
    tokens = [stream.logits_EV.argmax(-1)]
    for _ in range(num_tokens - 1):
        stream.advance(tokens[-1])
        tokens.append(stream.logits_EV.argmax(-1))
    return torch.stack(tokens, 1)


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
