"""SHIP's three losses as pure functions, in fp32 whatever the engine's dtype (arXiv 2502.02315,
section 3).

Letters: T tasks, Z latent size, K labelled tokens, V vocabulary.
"""

import torch
from torch import Tensor


def sum_cross_entropy(logits_KV: Tensor, labels_K: Tensor) -> Tensor:
    """Sum of token losses in nats; the caller divides by the count over the whole step."""
    return torch.nn.functional.cross_entropy(logits_KV.float(), labels_K, reduction="sum")


def kl_to_prior(mean_TZ: Tensor, log_variance_TZ: Tensor) -> Tensor:
    """KL(q(z|k) || N(0, I)) of every task and dimension in nats, (T, Z)."""
    mean_TZ, log_variance_TZ = mean_TZ.float(), log_variance_TZ.float()
    return 0.5 * (mean_TZ.square() + log_variance_TZ.exp() - 1 - log_variance_TZ)
