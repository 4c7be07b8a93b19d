"""Losses as pure functions, in fp32 whatever the engine's dtype (arXiv 2502.02315, section 3).

Letters: K labelled positions, V vocabulary, H hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24
"""The most logits of one piece of a loss: 64 MiB in fp32."""


def sum_cross_entropy(logits_KV: Tensor, labels_K: Tensor) -> Tensor:
    """Sum of token losses in nats; the caller divides by the count over the whole step."""
    return torch.nn.functional.cross_entropy(logits_KV.float(), labels_K, reduction="sum")


def num_pieces(num_labels: int, vocabulary_size: int, is_sharded: bool = False) -> int:
    """In how many pieces a loss should take its logits.

    Args:
        num_labels: K.
        vocabulary_size: V.
        is_sharded: whether ranks gather the output layer from each other, once a piece. They have
            to do so equally often, however many labels each has: the number then goes by the
            vocabulary alone.
    """
    if is_sharded:
        return min(8, -(-vocabulary_size // 2**14))
    return max(1, -(-num_labels * vocabulary_size // LOGITS_AT_ONCE))


def sum_cross_entropy_in_pieces(
    head: Callable[[Tensor], Tensor], states_KH: Tensor, labels_K: Tensor, pieces: int
) -> Tensor:
    """`sum_cross_entropy` of `head(states)`, without all logits ever being there at once.

    The backward pass makes the logits of each piece again, which costs one more product with the
    output layer and saves K x V numbers three times over (logits, their fp32 copy, gradient). In
    one piece nothing is made again.
    """
    if pieces == 1:
        return sum_cross_entropy(head(states_KH), labels_K)

    def of_piece(states: Tensor, labels: Tensor) -> Tensor:
        return sum_cross_entropy(head(states), labels)

    parts = zip(states_KH.tensor_split(pieces), labels_K.tensor_split(pieces), strict=True)
    sums = [
        checkpoint(of_piece, states, labels, use_reentrant=False, preserve_rng_state=False)
        for states, labels in parts
    ]
    return torch.stack(sums).sum()
