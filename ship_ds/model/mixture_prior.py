"""A mixture of diagonal Gaussians as prior, all of it learned (as in VaDE, Jiang et al. 2017, arXiv
1611.05148, here without their clustering by pre-training).

    model: {prior: {kind: mixture, num_components: 8}}

The KL from a Gaussian to a mixture has no closed form. The prior takes the variational bound of
Hershey and Olsen (2007, "Approximating the Kullback Leibler divergence between Gaussian mixture
models") for a single Gaussian q; with w_c the weights and r any shares,

    KL(q || p) <= sum_c r_c (KL(q || p_c) + log r_c / w_c)
               =  -log sum_c w_c exp(-KL(q || p_c))     at the best r_c ~ w_c exp(-KL(q || p_c))

It needs no sample, is exact for one component, near exact where a posterior lies within one of
several that are apart, and never below the KL, so that what is minimised stays a bound of the
likelihood. A posterior as wide as several components together is overcharged.

Letters: C candidates, T tasks, Z latent size.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ship_ds.config import MixturePriorConfig
from ship_ds.model.priors import Prior

_FIRST_SPREAD = 0.5
"""Deviation of the first means; the first variances fill up to one, the variance of N(0, I)."""


class _Components(NamedTuple):
    """means and log_variances (components, Z), log_weights (components,), in fp32."""

    means: Tensor
    log_variances: Tensor
    log_weights: Tensor


class MixturePrior(Prior):
    """p(z) = sum of w_c N(mean_c, diag(variance_c))."""

    def __init__(self, config: MixturePriorConfig, latent_size: int) -> None:
        """Make the components, about as wide together as N(0, I), of equal weights.

        Args:
            config: `model.prior`.
            latent_size: Z.
        """
        super().__init__(config, latent_size)
        # Tables, whose own calls gather them under ZeRO-3.
        self.means = nn.Embedding(config.num_components, latent_size)
        self.log_variances = nn.Embedding(config.num_components, latent_size)
        self.log_weights = nn.Embedding(config.num_components, 1)
        if config.num_components == 1:
            nn.init.zeros_(self.means.weight)
            nn.init.zeros_(self.log_variances.weight)
        else:
            nn.init.normal_(self.means.weight, std=_FIRST_SPREAD)
            nn.init.constant_(self.log_variances.weight, math.log(1 - _FIRST_SPREAD**2))
        nn.init.zeros_(self.log_weights.weight)

    def forward(self, mean_TZ: Tensor, log_variance_TZ: Tensor) -> Tensor:
        """The bound by dimension: what a dimension of each component costs, by the shares r, and
        the cost of the shares themselves spread evenly. Its sum over Z is the bound."""
        components = self._components()
        kl = _gaussian_kl(
            mean_TZ.float()[:, None],
            log_variance_TZ.float()[:, None],
            components.means,
            components.log_variances,
        )
        log_shares = (components.log_weights - kl.sum(2)).log_softmax(1)
        shares = log_shares.exp()
        choice_T = (shares * (log_shares - components.log_weights)).sum(1)
        return (shares[..., None] * kl).sum(1) + choice_T[:, None] / self.latent_size

    def log_density(self, latent_CZ: Tensor) -> Tensor:
        """Of the mixture."""
        means, log_variances, log_weights = self._components()
        square = (latent_CZ.float()[:, None] - means).square() / log_variances.exp()
        log_normal = -0.5 * (square + log_variances + math.log(2 * math.pi)).sum(2)
        return (log_normal + log_weights).logsumexp(1)

    @torch.no_grad()
    def mean(self, count: int) -> Tensor:
        """The means by their weights, which may lie between the components."""
        means, _, log_weights = self._components_in_turn()
        return (log_weights.exp() @ means).expand(count, -1)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """A component by its weight, then a draw of it."""
        means, log_variances, log_weights = self._components_in_turn()
        weights = log_weights.exp()
        chosen_C = torch.multinomial(weights, count, replacement=True, generator=generator)
        noise_CZ = torch.randn(count, self.latent_size, generator=generator)
        return means[chosen_C] + (log_variances[chosen_C] / 2).exp() * noise_CZ

    def _components(self) -> _Components:
        """Through the tables' own calls."""
        table = self.means.weight
        every = torch.arange(self.means.num_embeddings, device=table.device)
        log_weights = self.log_weights(every).float()[:, 0].log_softmax(0)
        return _Components(
            self.means(every).float(), self.log_variances(every).float(), log_weights
        )

    def _components_in_turn(self) -> _Components:
        """On the CPU, when it is this prior's turn."""
        self.wait_for_turn()
        return _Components(*(one.cpu() for one in self._components()))


def _gaussian_kl(
    mean: Tensor, log_variance: Tensor, to_mean: Tensor, to_log_variance: Tensor
) -> Tensor:
    """From one Gaussian to another, by dimension, in nats; shapes are broadcast."""
    square = (mean - to_mean).square() / to_log_variance.exp()
    difference = log_variance - to_log_variance
    return 0.5 * (square + difference.exp() - 1 - difference)
