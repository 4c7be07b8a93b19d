"""Losses as pure functions, in fp32 whatever the engine's dtype (arXiv 2502.02315, section 3).

Letters: K labelled positions, V vocabulary, H hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24
"""The most logits of one piece of a loss: 64 MiB in fp32."""
LmHead = Callable[[Tensor], Tensor]
"""States (K, H) -> logits (K, V)."""


def sum_cross_entropy(
    logits_KV: Tensor, labels_K: Tensor, weights_K: Tensor | None = None
) -> Tensor:
    """Sum of token losses in nats, each times its weight where there are any; the caller divides by
    the count over the whole step.

    Args:
        logits_KV: of each label's place, in any dtype.
        labels_K: the target tokens.
        weights_K: of each label; None: each counts once.

    Returns:
        A scalar in fp32; zero where there are no labels.
    """
    cross_entropy = torch.nn.functional.cross_entropy
    if weights_K is None:
        return cross_entropy(logits_KV.float(), labels_K, reduction="sum")
    # No matrix product: autocast would take it in 16 bits.
    return (cross_entropy(logits_KV.float(), labels_K, reduction="none") * weights_K).sum()


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
    head: LmHead,
    states_KH: Tensor,
    labels_K: Tensor,
    pieces: int,
    weights_K: Tensor | None = None,
) -> Tensor:
    """`sum_cross_entropy` of `head(states)`, without all logits ever being there at once.

    The backward pass makes the logits of each piece again, which costs one more product with the
    output layer and saves K x V numbers three times over (logits, their fp32 copy, gradient). In
    one piece nothing is made again.

    Args:
        head: the output layer.
        states_KH: of each label's place, before that layer.
        labels_K: the target tokens.
        pieces: how many parts the rows are taken in (`num_pieces`).
        weights_K: of each label; None: each counts once.

    Returns:
        A scalar in fp32.
    """

    def of_piece(states: Tensor, *labels_and_weights: Tensor) -> Tensor:
        return sum_cross_entropy(head(states), *labels_and_weights)

    weights = () if weights_K is None else (weights_K,)
    return _sum_in_pieces(of_piece, (states_KH, labels_K, *weights), pieces)


def sum_divergence(logits_KV: Tensor, aims_KV: Tensor, temperature: float) -> Tensor:
    """Sum over K of KL(softmax(aims / temperature) || softmax(logits / temperature)), in nats.

    Args:
        logits_KV: of each label's place, in any dtype.
        aims_KV: what these are to come near, in any dtype.
        temperature: both are divided by it before their softmax.

    Returns:
        A scalar in fp32.
    """
    aims_KV = (aims_KV.float() / temperature).log_softmax(1)
    logits_KV = (logits_KV.float() / temperature).log_softmax(1)
    return torch.nn.functional.kl_div(logits_KV, aims_KV, reduction="sum", log_target=True)


def sum_divergence_in_pieces(
    head: LmHead, states_KH: Tensor, aims_KH: Tensor, temperature: float, pieces: int
) -> Tensor:
    """`sum_divergence` of what `head` makes of two states, in pieces as the cross-entropy is: of
    neither are all logits ever there at once. The aims get no gradient.

    Args:
        head: the output layer.
        states_KH: of each label's place, before that layer.
        aims_KH: of the same places, those whose logits are the aims.
        temperature: both are divided by it before their softmax.
        pieces: how many parts the rows are taken in (`num_pieces`).

    Returns:
        A scalar in fp32.
    """

    def of_piece(states: Tensor, aims: Tensor) -> Tensor:
        with torch.no_grad():
            aim_logits = head(aims)
        return sum_divergence(head(states), aim_logits, temperature)

    return _sum_in_pieces(of_piece, (states_KH, aims_KH.detach()), pieces)


def _sum_in_pieces(
    of_piece: Callable[..., Tensor], rows: tuple[Tensor, ...], pieces: int
) -> Tensor:
    """The sum of `of_piece` over pieces of all rows, each computed again in the backward pass."""
    if pieces == 1:
        return of_piece(*rows)
    parts = zip(*(one.tensor_split(pieces) for one in rows), strict=True)
    sums = [
        # Unchecked: ZeRO-3 lets the output layer go again before the check looks at its shape, and
        # gathers it once more when its gradient is due. A piece has no randomness, and no shape in
        # it depends on data.
        checkpoint(
            of_piece,
            *part,
            use_reentrant=False,
            preserve_rng_state=False,
            determinism_check="none",
        )
        for part in parts
    ]
    return torch.stack(sums).sum()
