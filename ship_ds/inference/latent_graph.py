"""The graph of nearest latents, over which a bank is searched.

Instructions that do nearly the same have latents near each other, so what fits well has neighbours
worth trying:

    a-b---c-----------d         graph = LatentGraph(latent_CZ, num_neighbours=2)
    0 1   3           9         graph.neighbours    [[a, b], [b, a], [c, b], [d, c]]
                                graph.spread(3)     [a, d, c]

Letters: C candidates, T tasks, Z latent size.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

_MOST_DISTANCES = 1 << 25
"""At once: those of 50,000 candidates to each other take 10 GB."""


def distances(from_TZ: Tensor, latent_CZ: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Which points, and their Euclidean distances to all candidates (T, C), of as many points at
    once as `_MOST_DISTANCES` allows."""
    num_rows = max(1, _MOST_DISTANCES // max(1, len(latent_CZ)))
    for start in range(0, len(from_TZ), num_rows):
        rows = slice(start, start + num_rows)
        yield rows, torch.cdist(from_TZ[rows], latent_CZ)


class LatentGraph:
    """Which latents lie near which.

    Args:
        latent_CZ: the points.
        num_neighbours: of each, itself among them.
    """

    def __init__(self, latent_CZ: Tensor, num_neighbours: int) -> None:
        self.latent_CZ, self.num_neighbours = latent_CZ, num_neighbours

    @cached_property
    def neighbours(self) -> list[list[int]]:
        """The nearest points of each, nearest first."""
        count = min(self.num_neighbours, len(self.latent_CZ))
        nearest: list[list[int]] = []
        for _, distance_TC in distances(self.latent_CZ, self.latent_CZ):
            nearest += distance_TC.topk(count, largest=False).indices.tolist()
        return nearest

    def spread(self, count: int) -> list[int]:
        """Points far from one another, the first one among them: each next one is the farthest from
        those before (Gonzalez 1985)."""
        latent_CZ = self.latent_CZ.cpu()
        chosen = [0]
        distance_C = torch.full((len(latent_CZ),), torch.inf)
        while len(chosen) < min(count, len(latent_CZ)):
            to_last_C = (latent_CZ - latent_CZ[chosen[-1]]).square().sum(1)
            distance_C = torch.minimum(distance_C, to_last_C)
            chosen.append(int(distance_C.argmax()))
        return chosen
