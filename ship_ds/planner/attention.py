"""Attention on the meta device: the shapes of the output and of the gradients, and what a fused
kernel keeps between the two.

SDPA on the meta device would take the unfused path and count a whole attention matrix.

Letters: E sequences, A attention heads, S padded length.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ship_ds.model.attention import (
    PACKS,
    TAKES_PREFIX,
    is_cross_attention,
    packed_in_rows,
    prefix_of,
    prepend,
)

PLANNED = "ship_planned"


class _Fused(torch.autograd.Function):
    """Keeps query, key, value, output and the row sums, as flash attention does (Dao et al.
    2022), and the mask that a bias by distance becomes."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        rows, heads, length, _ = query.shape
        # as the kernels lay it out: no copy follows
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        row_sums_EAS = query.new_empty(query.shape[:-1], dtype=torch.float32)
        mask = None
        if bias is not None:
            mask = bias.new_empty(rows, heads, length, key.shape[2])
        ctx.save_for_backward(query, key, value, out, row_sums_EAS, mask)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return *(torch.empty_like(tensor) for tensor in (query, key, value)), None


def planned_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: query (E, A, S, size of a head) -> (E, S, A, size).

    Args:
        module: the attention of a block, to its own stack or to another one.
        query: (E, A, S, size of a head); of packed tokens as one row, E = 1.
        key, value: (E, key-value heads, tokens that are met, size of a head).
        attention_mask: is not read: what it hides changes no shape.
        kwargs: `ship_prefix`, `ship_cross_prefix` and `ship_rows` as `sdpa_forward` has them, and
            `position_bias`, a bias by distance; others are not read.

    Returns:
        The output (E, S, A, size of a head); None in place of the attention's weights.
    """
    name = "ship_cross_prefix" if is_cross_attention(module) else "ship_prefix"
    prefix, rows, bias = kwargs.get(name), kwargs.get("ship_rows"), kwargs.get("position_bias")

    def attend(q: Tensor, k: Tensor, v: Tensor, row_E: Tensor | None = None) -> Tensor:
        if prefix is not None:
            row_prefix = prefix if row_E is None else prefix_of(prefix, row_E)
            k, v, _ = prepend(row_prefix, q, k, v, None)
        return _Fused.apply(q, k, v, bias).transpose(1, 2)

    if rows is not None:
        return packed_in_rows(attend, (query, key, value), rows), None
    return attend(query, key, value), None


PACKS.append(PLANNED)
TAKES_PREFIX.append(PLANNED)
AttentionInterface.register(PLANNED, planned_attention)
AttentionMaskInterface.register(PLANNED, lambda *args, **kwargs: None)
