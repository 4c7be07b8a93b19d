"""Priors: what z is drawn from, and how far a posterior is from it.

The model holds one, `model.prior`; training, descent on z, random decoding, figures and the planner
use that one, so nobody else writes a density down. N(0, I) is here, mixture_prior.py and
flow_prior.py have learned ones. A new prior is a class in a module of its own, with a config class
in the table `kinds.PRIORS`; docs/extending.md has an example.

Letters: C candidates, T tasks, Z latent size.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ship_ds.section import Section


class Prior(nn.Module, ABC):
    """p(z). Everything is computed in fp32, whatever the engine's dtype.

    Parameters belong into submodules such as nn.Linear or nn.Embedding, whose calls gather them
    under ZeRO-3. One of the prior's own would be whole in `forward`, which is the KL, and nowhere
    else: not where a density or a sample is asked for.
    """

    before_pass: Callable[[], None] | None = None
    """What `wait_for_turn` calls where ranks take turns (turns.py)."""

    def __init__(self, config: Section, latent_size: int) -> None:
        """Make the prior.

        Args:
            config: its section, `model.prior`.
            latent_size: Z.
        """
        super().__init__()
        self.latent_size = latent_size

    def forward(self, mean_TZ: Tensor, log_variance_TZ: Tensor) -> Tensor:
        """KL(q(z | k) || p(z)) of diagonal Gaussian posteriors in nats, (T, Z); a prior that needs
        samples for it overrides `kl` instead."""
        raise NotImplementedError(f"{type(self).__name__} defines neither `forward` nor `kl`")

    def kl(self, mean_TZ: Tensor, log_variance_TZ: Tensor, latent_TZ: Tensor) -> Tensor:
        """The KL in nats, (T, Z).

        A prior whose KL does not part into dimensions spreads it evenly over them: only the sum
        over Z means something then.

        Args:
            mean_TZ, log_variance_TZ: of the posteriors.
            latent_TZ: one sample of each, the step's own z, for an estimate that is the same
                whenever the step is taken again. By default nobody looks at it.
        """
        kl_TZ: Tensor = self(mean_TZ, log_variance_TZ)
        return kl_TZ

    def wait_for_turn(self) -> None:
        """What `mean` and `sample` of a prior with parameters do first: ranks that share these make
        passes one after the other, all of them the same modules in the same order."""
        if self.before_pass is not None:
            self.before_pass()

    @abstractmethod
    def log_density(self, latent_CZ: Tensor) -> Tensor:
        """log p(z) in nats, (C,)."""

    @abstractmethod
    def mean(self, count: int) -> Tensor:
        """E[z], once a row, (count, Z), on the CPU: where a descent starts. A prior that knows none
        gives another point in its midst."""

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
