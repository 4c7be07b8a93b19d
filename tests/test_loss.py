"""The losses against torch's own."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from ship_ds.config import StandardNormalConfig
from ship_ds.loss import (
    LOGITS_AT_ONCE,
    num_pieces,
    sum_cross_entropy,
    sum_cross_entropy_in_pieces,
    sum_divergence,
    sum_divergence_in_pieces,
)
from ship_ds.model.batch import TokenBatch
from ship_ds.model.language_model import language_model
from ship_ds.model.priors import StandardNormal
from tests.model.models import HIDDEN, VOCABULARY, random_rows, tiny_lm


def kl_to_prior(mean_TZ: torch.Tensor, log_variance_TZ: torch.Tensor) -> torch.Tensor:
    prior = StandardNormal(StandardNormalConfig(), mean_TZ.shape[1])
    return prior.kl(mean_TZ, log_variance_TZ, mean_TZ)


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


def test_weights_multiply_token_losses() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 11), torch.randint(0, 11, (3,))
    each = torch.stack([sum_cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(3)])
    weighted = sum_cross_entropy(logits, labels, torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(weighted, each[0] + each[1] / 2)
    with torch.autocast("cpu", torch.bfloat16):
        again = sum_cross_entropy(logits, labels, torch.tensor([1.0, 0.5, 0.0]))
    assert again.dtype == torch.float32 and again.equal(weighted)


def test_no_label_is_no_loss() -> None:
    assert float(sum_cross_entropy(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))) == 0


def test_losses_are_computed_in_fp32() -> None:
    """In bf16 the KL of a small variance would be off by about a percent."""
    mean, log_variance = torch.full((1, 3), 0.3).bfloat16(), torch.full((1, 3), -4.0).bfloat16()
    kl = kl_to_prior(mean, log_variance)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, kl_to_prior(mean.float(), log_variance.float()), rtol=0, atol=0)
    assert sum_cross_entropy(torch.zeros(1, 4).bfloat16(), torch.tensor([0])).dtype == torch.float32


class Largest(TorchDispatchMode):
    """The most rows of logits that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # The output layer itself, transposed, is no logits.
        if isinstance(out, Tensor) and out.shape[-1:] == (VOCABULARY,) != out.shape:
            rows = out.numel() // VOCABULARY
            self.most = max(self.most, rows if rows != HIDDEN else 0)
        return out


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_loss_in_pieces_is_the_loss_and_never_has_all_logits(family: str, weighted: bool) -> None:
    """Gemma caps its logits and shares its head with the embeddings; 3 pieces of 11 labels."""
    model = tiny_lm(family).double()
    lm = language_model(model)
    batch = TokenBatch.build(random_rows([9, 4, 7, 12]), random_rows([2, 5, 1, 3], 5), 0)
    results = []
    weights = torch.arange(1.0, 12.0) if weighted else None
    for pieces in (1, 3):
        model.zero_grad()
        with Largest() as largest:
            states = lm.label_states(batch)
            loss = sum_cross_entropy_in_pieces(lm.head, states, batch.labels_K, pieces, weights)
            loss.backward()
        assert largest.most == -(-11 // pieces)
        each = [
            sum_cross_entropy(lm.head(states[i : i + 1]), batch.labels_K[i : i + 1])
            for i in range(11)
        ]
        times = [1.0] * 11 if weights is None else weights.tolist()
        expected = sum(time * float(one.detach()) for time, one in zip(times, each, strict=True))
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for whole, in_pieces in zip(*results, strict=True):
        assert whole is not None and in_pieces is not None and float(whole.abs().max()) > 0
        torch.testing.assert_close(in_pieces, whole, rtol=1e-6, atol=1e-7)


def test_a_divergence_is_the_sum_over_words_of_its_definition() -> None:
    """In plain Python, at temperature 2; zero between equals; of the aims on the logits, not the
    other way."""
    logits, aims = [0.0, 1.0, -2.0], [3.0, -1.0, 0.5]
    p, q = ([math.exp(x / 2) for x in row] for row in (aims, logits))
    expected = sum(
        a / sum(p) * (math.log(a / sum(p)) - math.log(b / sum(q)))
        for a, b in zip(p, q, strict=True)
    )
    given = torch.tensor([logits, aims]), torch.tensor([aims, aims])
    assert float(sum_divergence(*given, temperature=2)) == pytest.approx(expected, rel=1e-5)
    assert float(sum_divergence(*(given[1],) * 2, temperature=2)) == 0
    reverse = float(sum_divergence(*given[::-1], temperature=2))
    assert abs(reverse - expected) > 0.1
    assert sum_divergence(given[0].bfloat16(), given[1].bfloat16(), 1).dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_divergence_in_pieces_is_the_divergence(family: str) -> None:
    """3 pieces of 11 labels; the aims' states get no gradient."""
    model = tiny_lm(family).double()
    lm = language_model(model)
    targets = random_rows([2, 5, 1, 3], 5)
    batches = [
        TokenBatch.build(random_rows(lengths), targets, 0) for lengths in ([9, 4, 7, 12], [3] * 4)
    ]
    results = []
    for pieces in (1, 3):
        model.zero_grad()
        with Largest() as largest:
            states, aims = (lm.label_states(batch).detach() for batch in batches)
            states.requires_grad_(), aims.requires_grad_()
            loss = sum_divergence_in_pieces(lm.head, states, aims, 2.0, pieces)
            loss.backward()
        assert largest.most == -(-11 // pieces)
        assert states.grad is not None and aims.grad is None
        results.append([loss.detach(), states.grad, model.get_output_embeddings().weight.grad])
    expected = sum_divergence(lm.head(states), lm.head(aims), 2.0)
    torch.testing.assert_close(results[0][0], expected.detach(), rtol=1e-6, atol=1e-7)
    for whole, in_pieces in zip(*results, strict=True):
        assert float(whole.abs().max()) > 0
        torch.testing.assert_close(in_pieces, whole, rtol=1e-6, atol=1e-7)


def test_pieces_go_by_the_labels_or_where_ranks_gather_by_the_vocabulary_alone() -> None:
    assert [num_pieces(k, 2**14) for k in (0, 1, 1024, 1025, 4096)] == [1, 1, 1, 2, 4]
    assert num_pieces(5000, 128256) * LOGITS_AT_ONCE >= 5000 * 128256
    assert {num_pieces(k, 128256, True) for k in (0, 1, 5000)} == {8}
    assert num_pieces(5000, 1000, True) == 1
