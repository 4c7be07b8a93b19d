"""Priors: what z is drawn from, and how far a posterior is from it.

The model holds one, `model.prior`; training, descent on z, random decoding, figures and the planner
use that one, so nobody else writes a density down. A new prior is a class here or in a module of
its own, with a config class in the table `kinds.PRIORS`; docs/extending.md has an example.

Letters: C candidates, T tasks, Z latent size.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ship_ds.section import Section


class Prior(nn.Module, ABC):
    """p(z). Everything is computed in fp32, whatever the engine's dtype.

    The KL is the module's `forward`: under ZeRO-3 a prior's own parameters are gathered there and
    nowhere else.
    """

    def __init__(self, config: Section, latent_size: int) -> None:
        """Make the prior.

        Args:
            config: its section, `model.prior`.
            latent_size: Z.
        """
        super().__init__()
        self.latent_size = latent_size

    @abstractmethod
    def forward(self, mean_TZ: Tensor, log_variance_TZ: Tensor) -> Tensor:
        """KL(q(z | k) || p(z)) of diagonal Gaussian posteriors in nats, (T, Z).

        A prior whose KL does not part into dimensions spreads it evenly over them: only the sum
        over Z means something then.
        """

    def kl(self, mean_TZ: Tensor, log_variance_TZ: Tensor) -> Tensor:
        """The KL, through the module's hooks."""
        kl_TZ: Tensor = self(mean_TZ, log_variance_TZ)
        return kl_TZ

    @abstractmethod
    def log_density(self, latent_CZ: Tensor) -> Tensor:
        """log p(z) in nats, (C,)."""

    @abstractmethod
    def mean(self, count: int) -> Tensor:
        """E[z], once a row, (count, Z), on the CPU."""

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws (count, Z), on the CPU, by `generator` alone."""


class StandardNormal(Prior):
    """N(0, I), as published (arXiv 2502.02315, section 3.1). No parameters."""

    def forward(self, mean_TZ: Tensor, log_variance_TZ: Tensor) -> Tensor:
        """The closed form of two Gaussians."""
        mean_TZ, log_variance_TZ = mean_TZ.float(), log_variance_TZ.float()
        return 0.5 * (mean_TZ.square() + log_variance_TZ.exp() - 1 - log_variance_TZ)

    def log_density(self, latent_CZ: Tensor) -> Tensor:
        """-(|z|^2 + Z log 2 pi) / 2."""
        square_C = latent_CZ.float().square().sum(1)
        return -0.5 * (square_C + self.latent_size * math.log(2 * math.pi))

    def mean(self, count: int) -> Tensor:
        """Zero."""
        return torch.zeros(count, self.latent_size)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent standard normal numbers."""
        return torch.randn(count, self.latent_size, generator=generator)
