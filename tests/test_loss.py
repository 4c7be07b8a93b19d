"""The losses against torch's own."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ship_ds.config import StandardNormalConfig
from ship_ds.loss import sum_cross_entropy
from ship_ds.model.priors import StandardNormal


def kl_to_prior(mean_TZ: torch.Tensor, log_variance_TZ: torch.Tensor) -> torch.Tensor:
    return StandardNormal(StandardNormalConfig(), mean_TZ.shape[1]).kl(mean_TZ, log_variance_TZ)


def test_kl_is_that_of_torch_distributions() -> None:
    torch.manual_seed(0)
    mean, log_variance = torch.randn(5, 7), torch.randn(5, 7)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_to_prior(mean, log_variance), expected)


def test_kl_values() -> None:
    """Zero at the prior itself; a mean of 2 costs 2 nats."""
    assert kl_to_prior(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2)).tolist() == [[0.0, 2.0]]


def test_cross_entropy_is_the_sum_of_token_losses() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 11), torch.randint(0, 11, (6,))
    tokens = torch.stack(
        [-row.log_softmax(0)[label] for row, label in zip(logits, labels, strict=True)]
    )
    torch.testing.assert_close(sum_cross_entropy(logits, labels), tokens.sum())
    assert float(sum_cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, 3]))) == pytest.approx(
        3 * 1.3862944
    )


def test_no_label_is_no_loss() -> None:
    assert float(sum_cross_entropy(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))) == 0


def test_losses_are_computed_in_fp32() -> None:
    """In bf16 the KL of a small variance would be off by about a percent."""
    mean, log_variance = torch.full((1, 3), 0.3).bfloat16(), torch.full((1, 3), -4.0).bfloat16()
    kl = kl_to_prior(mean, log_variance)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, kl_to_prior(mean.float(), log_variance.float()), rtol=0, atol=0)
    assert sum_cross_entropy(torch.zeros(1, 4).bfloat16(), torch.tensor([0])).dtype == torch.float32
