"""A prior of somebody else's: a mixture of Gaussians with learned means; its KL has no closed form
and is the estimate of one sample, E_q[log q(z) - log p(z)] at the posterior's mean.

Letters: C candidates, T tasks, Z latent size.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ship_ds.kinds import PRIORS
from ship_ds.model.priors import Prior
from ship_ds.section import Section


class MixtureConfig(Section):
    kind: Literal["toy_mixture"] = "toy_mixture"
    num_components: int = 3


class Mixture(Prior):
    def __init__(self, config: MixtureConfig, latent_size: int) -> None:
        super().__init__(config, latent_size)
        # A table, whose own call gathers it under ZeRO-3 wherever it is asked for.
        self.table = nn.Embedding(config.num_components, latent_size)

    def means(self) -> Tensor:
        numbers = torch.arange(self.table.num_embeddings, device=self.table.weight.device)
        means: Tensor = self.table(numbers)
        return means.float()

    def forward(self, mean_TZ: Tensor, log_variance_TZ: Tensor) -> Tensor:
        entropy_T = (log_variance_TZ.float().sum(1) + self.latent_size * math.log(2 * math.pi)) / 2
        kl_T = -entropy_T - self.log_density(mean_TZ)
        return (kl_T / self.latent_size)[:, None].expand_as(mean_TZ)

    def log_density(self, latent_CZ: Tensor) -> Tensor:
        means = self.means()
        square = (latent_CZ.float()[:, None] - means).square().sum(2)
        normal = -0.5 * (square + self.latent_size * math.log(2 * math.pi))
        return normal.logsumexp(1) - math.log(len(means))

    def mean(self, count: int) -> Tensor:
        self.wait_for_turn()
        return self.means().detach().cpu().mean(0).expand(count, -1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        self.wait_for_turn()
        means = self.means().detach().cpu()
        chosen = torch.randint(len(means), (count,), generator=generator)
        noise = torch.randn(count, self.latent_size, generator=generator)
        return means[chosen] + noise


PRIORS.register(MixtureConfig, Mixture)
