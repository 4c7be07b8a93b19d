"""Where an instruction lies among those that training saw: its neighbours, and whether it is far
from them all.

Letters: C candidates, T tasks, Z latent size. The candidates are the known instructions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ship_ds.inference.bank import Bank
from ship_ds.model.ship import ShipModel

FAR_QUANTILE = 0.99
"""An instruction is far from training when its uncertainty or its isolation is above that of this
share of the known ones."""


@dataclass(frozen=True)
class Neighbour:
    """A known instruction and the Euclidean distance of its posterior mean."""

    instruction: str
    distance: float


@dataclass(frozen=True)
class Familiarity:
    """How an instruction lies among the known ones.

    Args:
        uncertainty: share of the known instructions whose posterior has less entropy.
        isolation: share of them that are nearer to their nearest other known one.
        is_far: whether either share is above FAR_QUANTILE: the adapter may then not do what the
            text says.
    """

    uncertainty: float
    isolation: float
    is_far: bool


def nearest_known(bank: Bank, latent_Z: Tensor, count: int) -> list[Neighbour]:
    """The `count` known instructions nearest to a latent, nearest first."""
    distance_C = torch.cdist(latent_Z[None], bank.latent_CZ)[0]
    nearest = distance_C.topk(min(count, len(bank)), largest=False)
    return [
        Neighbour(bank.instructions[c], distance)
        for c, distance in zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Surroundings:
    """What an instruction is compared with, sorted.

    Args:
        entropy_C: of each known instruction's posterior.
        distance_C: from each to the nearest other known one.
    """

    entropy_C: Tensor
    distance_C: Tensor

    @classmethod
    def of(cls, bank: Bank) -> "Surroundings":
        """Those of all known instructions."""
        apart_CC = torch.cdist(bank.latent_CZ, bank.latent_CZ).fill_diagonal_(torch.inf)
        entropy_C = _entropy(bank.log_variance_CZ)
        return cls(entropy_C.sort().values, apart_CC.amin(1).sort().values)

    def familiarity(self, model: ShipModel, bank: Bank, instruction: str) -> Familiarity:
        """How an instruction lies among the known ones; a known one is compared with the
        others."""
        posterior = model.posterior([instruction])
        distance_C = torch.cdist(posterior.mean_TZ, bank.latent_CZ)[0]
        if instruction in bank.instructions:
            distance_C[bank.instructions.index(instruction)] = torch.inf
        uncertainty = _share_below(self.entropy_C, _entropy(posterior.log_variance_TZ)[0])
        isolation = _share_below(self.distance_C, distance_C.min())
        return Familiarity(uncertainty, isolation, max(uncertainty, isolation) > FAR_QUANTILE)


def _entropy(log_variance_CZ: Tensor) -> Tensor:
    """Differential entropy of each posterior in nats up to a constant, (C,)."""
    return log_variance_CZ.sum(1) / 2


def _share_below(sorted_C: Tensor, value: Tensor) -> float:
    return float(torch.searchsorted(sorted_C, value)) / len(sorted_C)
