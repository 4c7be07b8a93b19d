"""The trunk of a hypernetwork: z and the learned embedding of a place -> what a head makes an
adapter of there.

    features = LayerNorm(x + MLP(x)) / sqrt(D)      x = W z + embedding of the place
                                                    or normalised W z + embedding

A place is a site, or a block. With `latent: by_layer` z is cut into one share a block, and a place
reads the share of its block alone: what layer queries gathered (HINT, Ivison et al. 2023, arXiv
2212.10315) stays apart down to the adapter.

Letters: T tasks, Z latent size, D hypernetwork width, U features of a group.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ship_ds.config import TrunkConfig
from ship_ds.errors import UserError
from ship_ds.model.adapters.adapter import Hypernetwork


class TrunkHypernetwork(Hypernetwork):
    """A hypernetwork that turns z into features of its places; a subclass adds the heads."""

    def add_trunk(self, latent_size: int, config: TrunkConfig, groups: Sequence[int]) -> None:
        """Make the trunk. A subclass calls it once, after its heads are drawn.

        Args:
            latent_size: Z, or the share of it that a place reads.
            config: says D, and whether W z is normalised.
            groups: how many embeddings each group of places has.
        """
        width, self.normalises = config.width, config.normalises_latent
        self.from_latent = nn.Linear(latent_size, width)
        # z weighs as much as a place's embedding
        nn.init.normal_(self.from_latent.weight, std=1 / math.sqrt(latent_size))
        self.site_embeddings = nn.ModuleList(nn.Embedding(count, width) for count in groups)
        self.trunk = nn.Sequential(
            nn.SiLU(), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        self.norm = nn.LayerNorm(width)

    def embeddings(self, group: int, count: int, device: torch.device) -> Tensor:
        """The learned embeddings of a group's places.

        Args:
            group: its number among the groups that `add_trunk` was given.
            count: how many places it has.
            device: where the trunk is.

        Returns:
            (count, D).
        """
        places: Tensor = self.site_embeddings[group](torch.arange(count, device=device))
        return places

    def project(self, latent_TZ: Tensor, num_shares: int = 1) -> Tensor:
        """What the places of each share of z add to their embeddings, (T, num_shares, D)."""
        shares = latent_TZ.to(self.from_latent.weight.dtype).unflatten(1, (num_shares, -1))
        projected: Tensor = self.from_latent(shares)
        if self.normalises:
            # Without weights of its own: a scale would grow as z does.
            return torch.nn.functional.layer_norm(projected, projected.shape[-1:])
        return projected

    def run_trunk(self, features_TUD: Tensor) -> Tensor:
        """Features (T, U, D) of places from the sum of z's part and their embeddings."""
        # Adam moves every weight by about lr; without 1 / sqrt(D) its first steps would move what
        # the heads make by D times that.
        normed: Tensor = self.norm(features_TUD + self.trunk(features_TUD))
        return normed / math.sqrt(self.norm.normalized_shape[0])


def share_of(latent_size: int, num_layers: int) -> int:
    """The numbers of z that one block's places read.

    Raises:
        UserError: the blocks have no equal shares.
    """
    if latent_size % num_layers:
        raise UserError(
            f"model.hypernetwork.latent=by_layer: model.latent_size ({latent_size}) must be a "
            f"multiple of the Task LLM's {num_layers} blocks: change it"
        )
    return latent_size // num_layers


def layer_of(path: str, blocks: Sequence[str]) -> int:
    """The number of the block that a site at this module path belongs to."""
    return next(i for i, block in enumerate(blocks) if path.startswith(f"{block}."))
