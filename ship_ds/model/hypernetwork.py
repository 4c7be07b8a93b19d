"""Hypernetworks: z -> adapter. Each kind of adapter has its own class, and so has each kind of LoRA
head.

A LoRA hypernetwork is a trunk shared by all sites (z plus a learned embedding -> MLP) and heads.
Each head serves a group of sites, says how many embeddings they need, and turns the trunk's
features into their A and B. B starts at exactly zero, so step 0 is the base model; A starts as in
`peft`.

Letters: T tasks, Z latent, D hypernetwork width, S sites of a group, U features of a group, R rank,
I in, O out, P virtual tokens, H hidden.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ship_ds.config import (
    LoraHypernetworkConfig,
    ReshapeHypernetworkConfig,
    SoftPromptHypernetworkConfig,
)
from ship_ds.errors import UserError
from ship_ds.kinds import ADAPTERS
from ship_ds.model.adapters import LoraAdapter, SoftPrompt
from ship_ds.section import Section

Sites = Mapping[str, tuple[int, int]]
"""Module path -> (in, out)."""
Factors = dict[str, tuple[Tensor, Tensor]]
"""Module path -> (a_TRI, b_TOR)."""


@dataclass(frozen=True)
class Target:
    """The Task LLM as hypernetworks see it: its wrapped linears and the size of its embeddings."""

    sites: Sites
    hidden_size: int


class LoraHead(nn.Module, ABC):
    """Makes the factors of one group of sites; made from (width, rank, those sites)."""

    num_embeddings: int
    """How many embeddings tell the group's features apart."""

    @staticmethod
    def groups(sites: Sites) -> list[Sites]:
        """All sites parted into those that one head serves: here, those of one (in, out) shape."""
        return [
            {path: sites[path] for path in sites if sites[path] == shape}
            for shape in sorted(set(sites.values()))
        ]

    def units(self, embeddings_SD: Tensor) -> Tensor:
        """What each feature stands for, (U, D), from the group's embeddings."""
        return embeddings_SD

    @abstractmethod
    def forward(self, features_TUD: Tensor) -> Factors:
        """A and B of each of the group's sites, from the features (T, U, D)."""


class ShapeHead(LoraHead):
    """`per_module`: all ranks of A and B of a site from one feature; shared by the sites of one
    shape."""

    def __init__(self, width: int, rank: int, sites: Sites) -> None:
        super().__init__()
        self.paths, self.num_embeddings = list(sites), len(sites)
        self.rank, (self.num_in, self.num_out) = rank, next(iter(sites.values()))
        self.to_a = nn.Linear(width, rank * self.num_in)
        self.to_b = nn.Linear(width, rank * self.num_out)
        nn.init.normal_(self.to_a.weight, std=0.2 / math.sqrt(self.num_in))
        nn.init.uniform_(self.to_a.bias, -1 / math.sqrt(self.num_in), 1 / math.sqrt(self.num_in))
        _zero(self.to_b)

    def forward(self, features_TUD: Tensor) -> Factors:
        a_TSRI = self.to_a(features_TUD).unflatten(2, (self.rank, self.num_in))
        b_TSOR = self.to_b(features_TUD).unflatten(2, (self.num_out, self.rank))
        return {path: (a_TSRI[:, s], b_TSOR[:, s]) for s, path in enumerate(self.paths)}


class LayerHead(LoraHead):
    """`per_layer`: A and B of every module of one layer from one feature; no layer shares it, so it
    is the largest."""

    def __init__(self, width: int, rank: int, sites: Sites) -> None:
        super().__init__()
        self.num_embeddings = 1
        self.parts = nn.ModuleList(
            ShapeHead(width, rank, {path: shape}) for path, shape in sites.items()
        )

    @staticmethod
    def groups(sites: Sites) -> list[Sites]:
        layers: dict[str, dict[str, tuple[int, int]]] = {}
        for path, shape in sites.items():
            layer = re.match(r".*?\.\d+(?=\.)", path)
            layers.setdefault(layer[0] if layer else "", {})[path] = shape
        return list(layers.values())

    def forward(self, features_TUD: Tensor) -> Factors:
        return {
            path: factors for part in self.parts for path, factors in part(features_TUD).items()
        }


class RankHead(LoraHead):
    """`per_rank`: one row of A and one column of B from one feature, which a learned rank embedding
    tells apart; smallest."""

    def __init__(self, width: int, rank: int, sites: Sites) -> None:
        super().__init__()
        self.paths, self.num_embeddings, self.rank = list(sites), len(sites), rank
        num_in, num_out = next(iter(sites.values()))
        self.rank_embedding = nn.Embedding(rank, width)
        self.to_a = nn.Linear(width, num_in)
        self.to_b = nn.Linear(width, num_out)
        # All of A's variance is in the weight: a bias, shared by the ranks, would make their rows
        # alike.
        nn.init.normal_(self.to_a.weight, std=1 / math.sqrt(3 * num_in))
        nn.init.zeros_(self.to_a.bias)
        _zero(self.to_b)

    def units(self, embeddings_SD: Tensor) -> Tensor:
        """Before the trunk: behind it, two linear maps would give all ranks the same dependence on
        z."""
        ranks_RD = self.rank_embedding(torch.arange(self.rank, device=embeddings_SD.device))
        return (embeddings_SD[:, None] + ranks_RD).flatten(0, 1)

    def forward(self, features_TUD: Tensor) -> Factors:
        a_TSRI = self.to_a(features_TUD).unflatten(1, (-1, self.rank))
        b_TSOR = self.to_b(features_TUD).unflatten(1, (-1, self.rank)).transpose(2, 3)
        return {path: (a_TSRI[:, s], b_TSOR[:, s]) for s, path in enumerate(self.paths)}


def _zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


HEADS: Mapping[str, type[ShapeHead] | type[LayerHead] | type[RankHead]] = {
    "per_module": ShapeHead,
    "per_layer": LayerHead,
    "per_rank": RankHead,
}


class LoraHypernetwork(nn.Module):
    """z and the learned embedding of a site (layer and module) -> MLP -> heads."""

    num_virtual_tokens = 0

    def __init__(self, config: LoraHypernetworkConfig, latent_size: int, target: Target) -> None:
        super().__init__()
        self.scaling = config.alpha / config.rank
        width, head_type = config.width, HEADS[config.heads]
        heads = [head_type(width, config.rank, group) for group in head_type.groups(target.sites)]
        self.from_latent = nn.Linear(latent_size, width)
        # z weighs as much as a site's embedding
        nn.init.normal_(self.from_latent.weight, std=1 / math.sqrt(latent_size))
        self.site_embeddings = nn.ModuleList(
            nn.Embedding(head.num_embeddings, width) for head in heads
        )
        self.trunk = nn.Sequential(
            nn.SiLU(), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(heads)

    def forward(self, latent_TZ: Tensor) -> LoraAdapter:
        from_latent_T1D = self.from_latent(latent_TZ.to(self.from_latent.weight.dtype))[:, None]
        factors: Factors = {}
        for embedding, head in zip(self.site_embeddings, self.heads, strict=True):
            assert isinstance(head, LoraHead)
            embeddings_SD = embedding(torch.arange(head.num_embeddings, device=latent_TZ.device))
            features_TUD = from_latent_T1D + head.units(embeddings_SD)
            # Adam moves every weight by about lr; without 1 / sqrt(D) its first steps would move A
            # and B by D times that.
            factors |= head(
                self.norm(features_TUD + self.trunk(features_TUD))
                / math.sqrt(self.norm.normalized_shape[0])
            )
        return LoraAdapter(factors, self.scaling)

    @staticmethod
    def targets(config: LoraHypernetworkConfig) -> tuple[str, ...]:
        """Names of the Task LLM's linears that its adapters change."""
        return config.targets

    def head_modules(self) -> list[nn.Module]:
        """Where most of the weights are; the rest is the trunk."""
        return list(self.heads)


class SoftPromptHypernetwork(nn.Module):
    """z -> MLP -> P embeddings before the prompt."""

    def __init__(
        self, config: SoftPromptHypernetworkConfig, latent_size: int, target: Target
    ) -> None:
        super().__init__()
        hidden_size = target.hidden_size
        self.num_virtual_tokens: int = config.num_virtual_tokens
        self.hidden_size = hidden_size
        self.layers = nn.Sequential(
            nn.Linear(latent_size, config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.num_virtual_tokens * hidden_size),
        )

    def forward(self, latent_TZ: Tensor) -> SoftPrompt:
        prompt_TX = self.layers(latent_TZ.to(next(self.layers.parameters()).dtype))
        return SoftPrompt(prompt_TX.view(-1, self.num_virtual_tokens, self.hidden_size))

    @staticmethod
    def targets(config: SoftPromptHypernetworkConfig) -> tuple[str, ...]:
        """Names of the Task LLM's linears that its adapters change."""
        return ()

    def head_modules(self) -> list[nn.Module]:
        return [self.layers[-1]]


class ReshapeHypernetwork(nn.Module):
    """z itself, cut into P embeddings before the prompt: the published "p-tuning" fusion (arXiv
    2502.02315). No weights."""

    def __init__(self, config: ReshapeHypernetworkConfig, latent_size: int, target: Target) -> None:
        super().__init__()
        check_reshape(
            "model.hypernetwork.num_virtual_tokens",
            config.num_virtual_tokens,
            latent_size,
            target.hidden_size,
        )
        self.num_virtual_tokens: int = config.num_virtual_tokens

    def forward(self, latent_TZ: Tensor) -> SoftPrompt:
        return SoftPrompt(latent_TZ.unflatten(1, (self.num_virtual_tokens, -1)))

    @staticmethod
    def targets(config: ReshapeHypernetworkConfig) -> tuple[str, ...]:
        """Names of the Task LLM's linears that its adapters change."""
        return ()

    def head_modules(self) -> list[nn.Module]:
        return []


def check_reshape(key: str, num_tokens: int, latent_size: int, hidden_size: int) -> None:
    """Raises UserError unless z is exactly `num_tokens` embeddings of the base model."""
    if num_tokens * hidden_size != latent_size:
        raise UserError(
            f"{key} ({num_tokens}) x the base's hidden size ({hidden_size}) is "
            f"{num_tokens * hidden_size}, and "
            f"model.latent_size is {latent_size}: z is reshaped, so make them equal"
        )


Hypernetwork = LoraHypernetwork | SoftPromptHypernetwork | ReshapeHypernetwork


def targets_of(config: Section) -> tuple[str, ...]:
    """Names of the Task LLM's linears that adapters of this kind change."""
    targets: tuple[str, ...] = ADAPTERS.implementation(config).targets(config)
    return targets


def build_hypernetwork(
    config: Section, latent_size: int, sites: Sites, hidden_size: int
) -> Hypernetwork:
    """The hypernetwork of the config's kind.

    Args:
        config: its section, `model.hypernetwork`.
        latent_size: Z.
        sites: the Task LLM's wrapped linears.
        hidden_size: of the Task LLM's embeddings.
    """
    hypernetwork: Hypernetwork = ADAPTERS.implementation(config)(
        config, latent_size, Target(sites, hidden_size)
    )
    return hypernetwork
