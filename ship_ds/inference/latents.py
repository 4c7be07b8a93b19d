"""What the latent space holds: arithmetic on instructions, the prior, neighbours, and how far an
instruction is from training.

Letters: C known instructions, Z latent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ship_ds.inference.bank import Bank
from ship_ds.model.ship import ShipModel

FAR_QUANTILE = 0.99
"""An instruction is far from training when it is more uncertain or lonelier than this share of the
known ones."""
_AT_ONCE = 256


@dataclass(frozen=True)
class Neighbour:
    """A known instruction and the Euclidean distance of its posterior mean."""

    instruction: str
    distance: float


@dataclass(frozen=True)
class Familiarity:
    """Shares of the known instructions that are less uncertain (posterior entropy) and less lonely
    (distance to the nearest other known one) than this instruction; `is_far` when either is above
    FAR_QUANTILE."""

    uncertainty: float
    loneliness: float
    is_far: bool


def interpolate(start_Z: Tensor, end_Z: Tensor, num_points: int) -> Tensor:
    """`num_points` latents (N, Z) on the straight line, both ends among them."""
    weights = torch.linspace(0, 1, num_points, device=start_Z.device)[:, None]
    return torch.lerp(start_Z[None], end_Z[None], weights)


def combine(model: ShipModel, weights: Mapping[str, float]) -> Tensor:
    """Task arithmetic (Ilharco et al. 2023) on posterior means: the weighted sum (Z,) of
    instructions."""
    mean_TZ = model.encode(list(weights))
    return torch.tensor(list(weights.values()), device=mean_TZ.device) @ mean_TZ


def sample_prior(model: ShipModel, count: int, seed: int) -> Tensor:
    """(count, Z) from N(0, I), by a generator of its own."""
    return torch.randn(
        count, model.config.latent_size, generator=torch.Generator().manual_seed(seed)
    ).to(model.device)


def nearest_known(bank: Bank, latent_Z: Tensor, count: int) -> list[Neighbour]:
    """The known instructions whose latents are closest, closest first."""
    distance_C = torch.cdist(latent_Z[None], bank.latent_CZ)[0]
    found = distance_C.topk(min(count, len(bank)), largest=False)
    return [
        Neighbour(bank.instructions[c], d)
        for c, d in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Surroundings:
    """The known instructions' own entropy and distance to the nearest other, sorted; what an
    instruction is compared with."""

    entropy_C: Tensor
    distance_C: Tensor

    @classmethod
    def of(cls, model: ShipModel, bank: Bank) -> "Surroundings":
        entropy = [
            _entropy(model, bank.instructions[start : start + _AT_ONCE])
            for start in range(0, len(bank), _AT_ONCE)
        ]
        apart_CC = torch.cdist(bank.latent_CZ, bank.latent_CZ).fill_diagonal_(torch.inf)
        return cls(torch.cat(entropy).sort().values, apart_CC.amin(1).sort().values)

    def familiarity(self, model: ShipModel, bank: Bank, instruction: str) -> Familiarity:
        """A known instruction is compared with the others."""
        apart_C = torch.cdist(model.encode([instruction]), bank.latent_CZ)[0]
        if instruction in bank.instructions:
            apart_C[bank.instructions.index(instruction)] = torch.inf
        uncertainty = _share_below(self.entropy_C, _entropy(model, [instruction])[0])
        loneliness = _share_below(self.distance_C, apart_C.min())
        return Familiarity(uncertainty, loneliness, max(uncertainty, loneliness) > FAR_QUANTILE)


def _entropy(model: ShipModel, instructions: Sequence[str]) -> Tensor:
    """Differential entropy of q(z | k) in nats up to a constant, (C,)."""
    return model.posterior(instructions).log_variance_TZ.sum(1) / 2


def _share_below(sorted_C: Tensor, value: Tensor) -> float:
    return float(torch.searchsorted(sorted_C, value)) / len(sorted_C)
