"""Where an instruction lies among those that training saw: its neighbours, and whether it is far
from them all.

Letters: C candidates, T tasks, Z latent size. The candidates are the known instructions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ship_ds.inference.bank import Bank
from ship_ds.inference.latent_graph import distances
from ship_ds.model.ship import ShipModel

FAR_QUANTILE = 0.99
"""An instruction is far from training when its isolation is above that of this share of the known
ones. The entropy of its posterior says nothing of it: on 114 unseen tasks of the quickstart it was
lower where answers were wrong (docs/results.md)."""

_NUM_COMPARED, _NUM_ENCODED = 4096, 32


@dataclass(frozen=True)
class Neighbour:
    """A known instruction and the Euclidean distance of its posterior mean."""

    instruction: str
    distance: float


@dataclass(frozen=True)
class Familiarity:
    """How an instruction lies among the known ones.

    Args:
        isolation: share of the known ones that are nearer to their nearest other one.
        is_far: whether that is above FAR_QUANTILE: the adapter may then not do what the text says.
    """

    isolation: float
    is_far: bool

    @property
    def warning(self) -> str | None:
        """One line about an instruction that is far; else None."""
        if not self.is_far:
            return None
        return (
            "this instruction is far from the instructions this run was trained on (farther from "
            f"the next than {100 * self.isolation:.0f} % of them): test what it does before you "
            "rely on it"
        )


def nearest_known(bank: Bank, latent_Z: Tensor, count: int) -> list[Neighbour]:
    """The `count` known instructions nearest to a latent, nearest first.

    Args:
        bank: the known instructions.
        latent_Z: on the bank's device.
        count: of neighbours, at most.
    """
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
        distance_C: from a known instruction to the nearest other one.
    """

    distance_C: Tensor

    @classmethod
    def of(cls, bank: Bank) -> "Surroundings":
        """Those of all known instructions; of very many, of as many as tell how far one usually
        is from the next, evenly spaced."""
        latent_CZ = bank.latent_CZ
        num = min(len(bank), _NUM_COMPARED)
        chosen = torch.arange(num) * len(bank) // num
        nearest = []
        for rows, distance_TC in distances(latent_CZ[chosen], latent_CZ):
            distance_TC[torch.arange(len(distance_TC)), chosen[rows]] = torch.inf  # itself
            nearest.append(distance_TC.amin(1))
        return cls(torch.cat(nearest).sort().values)

    def familiarities(
        self, model: ShipModel, bank: Bank, instructions: Sequence[str]
    ) -> list[Familiarity]:
        """How each instruction lies among the known ones; a known one is compared with the
        others.

        Args:
            model: encodes the instructions.
            bank: the known instructions, whose surroundings these are.
            instructions: whatever the encoder can read.

        Returns:
            One of each instruction, in their order.
        """
        places = {text: c for c, text in reversed(list(enumerate(bank.instructions)))}
        familiarities: list[Familiarity] = []
        for start in range(0, len(instructions), _NUM_ENCODED):
            texts = instructions[start : start + _NUM_ENCODED]
            distance_TC = torch.cdist(model.encode(texts), bank.latent_CZ)
            for text, distance_C in zip(texts, distance_TC, strict=True):
                if text in places:
                    distance_C[places[text]] = torch.inf
                isolation = _share_below(self.distance_C, distance_C.min())
                familiarities.append(Familiarity(isolation, isolation > FAR_QUANTILE))
        return familiarities


def _share_below(sorted_C: Tensor, value: Tensor) -> float:
    return float(torch.searchsorted(sorted_C, value)) / len(sorted_C)
