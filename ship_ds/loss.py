"""Losses as pure functions, in fp32 whatever the engine's dtype (arXiv 2502.02315, section 3).

Letters: K labelled positions, V vocabulary.
"""

import torch
from torch import Tensor


def sum_cross_entropy(logits_KV: Tensor, labels_K: Tensor) -> Tensor:
    """Sum of token losses in nats; the caller divides by the count over the whole step."""
    return torch.nn.functional.cross_entropy(logits_KV.float(), labels_K, reduction="sum")
