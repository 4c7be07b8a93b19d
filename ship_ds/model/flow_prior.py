"""A normalising flow over N(0, I) as prior: RealNVP (Dinh et al. 2017, arXiv 1605.08803), in a
variational autoencoder, where Chen et al. 2017 (arXiv 1611.02731) have an autoregressive one.

    model: {prior: {kind: flow, num_layers: 4}}

    log p(z) = log N(f(z); 0, I) + log |det df/dz|        f: couplings, one after the other
    coupling: [a, b] -> [a, b * exp(s(a)) + t(a)]         then the halves change places

Its KL is estimated at the step's own z, one sample of each posterior, which is what the rest of the
step uses too; the entropy of the posterior is exact, and has the same gradient as its estimate:

    KL(q || p) ~ -H(q) - log p(z),   z ~ q

A single estimate may be negative.

Letters: C candidates, T tasks, Z latent size.
"""

import math

import torch
from torch import Tensor, nn

from ship_ds.config import FlowPriorConfig
from ship_ds.errors import UserError
from ship_ds.model.priors import Prior

_MOST_LOG_SCALE = 2.0
"""A coupling scales by exp(-2) to exp(2): unbounded, a long step makes densities overflow."""


class FlowPrior(Prior):
    """N(0, I) through a learned invertible map that starts as the identity."""

    def __init__(self, config: FlowPriorConfig, latent_size: int) -> None:
        """Make the couplings.

        Args:
            config: `model.prior`.
            latent_size: Z.

        Raises:
            UserError: z has no two halves.
        """
        super().__init__(config, latent_size)
        if latent_size < 2:
            raise UserError(
                "model.prior.kind=flow needs model.latent_size of at least 2, since each half of "
                "z moves the other: raise it, or choose another prior"
            )
        sizes = (latent_size // 2, latent_size - latent_size // 2)
        # In turn: the second half by the first, the first by the second.
        self.couplings = nn.ModuleList(
            _Coupling(*(sizes if index % 2 == 0 else sizes[::-1]), config.width)
            for index in range(config.num_layers)
        )

    def kl(self, mean_TZ: Tensor, log_variance_TZ: Tensor, latent_TZ: Tensor) -> Tensor:
        """The estimate at `latent_TZ`, spread evenly over the dimensions."""
        log_variance_TZ = log_variance_TZ.float()
        entropy_T = 0.5 * (log_variance_TZ + math.log(2 * math.pi) + 1).sum(1)
        kl_T = -entropy_T - self.log_density(latent_TZ)
        return (kl_T / self.latent_size)[:, None].expand_as(log_variance_TZ)

    def log_density(self, latent_CZ: Tensor) -> Tensor:
        """By the change of variables, exactly."""
        base_CZ, log_determinant_C = self.to_base(latent_CZ)
        square_C = base_CZ.square().sum(1)
        log_normal_C = -0.5 * (square_C + self.latent_size * math.log(2 * math.pi))
        return log_normal_C + log_determinant_C

    @torch.no_grad()
    def mean(self, count: int) -> Tensor:
        """What the middle of N(0, I) becomes: a point of high density, and E[z] only where the flow
        is affine."""
        return self._sampled(torch.zeros(1, self.latent_size)).expand(count, -1)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Standard normal numbers through the inverse."""
        return self._sampled(torch.randn(count, self.latent_size, generator=generator))

    def to_base(self, latent_CZ: Tensor) -> tuple[Tensor, Tensor]:
        """f(z), (C, Z), and log |det df/dz|, (C,)."""
        fixed, moved = self._halves(latent_CZ.float())
        log_determinant_C = torch.zeros_like(moved[:, 0])
        for coupling in self.couplings:
            log_scale, shift = coupling(fixed)
            moved = moved * log_scale.exp() + shift
            log_determinant_C = log_determinant_C + log_scale.sum(1)
            fixed, moved = moved, fixed
        return self._joined(fixed, moved), log_determinant_C

    def from_base(self, base_CZ: Tensor) -> Tensor:
        """The inverse of f, (C, Z)."""
        halves = self._halves(base_CZ.float())
        fixed, moved = halves if len(self.couplings) % 2 == 0 else halves[::-1]
        for coupling in reversed(self.couplings):
            fixed, moved = moved, fixed
            log_scale, shift = coupling(fixed)
            moved = (moved - shift) * (-log_scale).exp()
        return torch.cat([fixed, moved], 1)

    def _halves(self, latent_CZ: Tensor) -> tuple[Tensor, Tensor]:
        half = self.latent_size // 2
        return latent_CZ[:, :half], latent_CZ[:, half:]

    def _joined(self, fixed: Tensor, moved: Tensor) -> Tensor:
        """In their places of before, after all couplings."""
        return torch.cat([fixed, moved] if len(self.couplings) % 2 == 0 else [moved, fixed], 1)

    def _sampled(self, base_CZ: Tensor) -> Tensor:
        """On the CPU, when it is this prior's turn."""
        self.wait_for_turn()
        device = next(self.parameters()).device
        return self.from_base(base_CZ.to(device)).cpu()


class _Coupling(nn.Module):
    """What one half says of the other: log-scales and shifts. The last layer starts at zero."""

    def __init__(self, num_fixed: int, num_moved: int, width: int) -> None:
        super().__init__()
        last = nn.Linear(width, 2 * num_moved)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(num_fixed, width), nn.SiLU(), last)

    def forward(self, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """(C, num_moved) each, in fp32. The layers may be bf16: both directions read the same
        numbers, so the map stays invertible."""
        dtype = next(self.layers.parameters()).dtype
        raw, shift = self.layers(fixed.to(dtype)).float().chunk(2, dim=1)
        return _MOST_LOG_SCALE * torch.tanh(raw / _MOST_LOG_SCALE), shift
