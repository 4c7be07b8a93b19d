"""Hypernetworks: z -> adapter. Each kind of adapter has its own class; step 0 is always the base model.

Letters: T tasks, Z latent, D hypernetwork width, S sites of one shape, R rank, I in, O out, P virtual tokens, H hidden.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ship_ds.config import LoraHypernetworkConfig, SoftPromptHypernetworkConfig
from ship_ds.model.adapters import LoraAdapter, SoftPrompt


class ShapeHead(nn.Module):
    """A and B of every site of one (in, out) shape from the sites' features; B starts at exactly zero."""

    def __init__(self, width: int, rank: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.rank, (self.num_in, self.num_out) = rank, shape
        self.to_a = nn.Linear(width, rank * self.num_in)
        self.to_b = nn.Linear(width, rank * self.num_out)
        nn.init.normal_(self.to_a.weight, std=0.2 / math.sqrt(width * self.num_in))
        nn.init.uniform_(self.to_a.bias, -1 / math.sqrt(self.num_in), 1 / math.sqrt(self.num_in))
        nn.init.zeros_(self.to_b.weight)
        nn.init.zeros_(self.to_b.bias)

    def forward(self, features_TSD: Tensor) -> tuple[Tensor, Tensor]:
        """a_TSRI and b_TSOR."""
        leading = features_TSD.shape[:2]
        return (
            self.to_a(features_TSD).view(*leading, self.rank, self.num_in),
            self.to_b(features_TSD).view(*leading, self.num_out, self.rank),
        )


class LoraHypernetwork(nn.Module):
    """z and a learned embedding of the site (layer and module) -> MLP -> one head per module shape."""

    def __init__(self, config: LoraHypernetworkConfig, latent_size: int, sites: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.scaling = config.alpha / config.rank
        shapes = sorted(set(sites.values()))
        self.paths = {shape: [path for path in sites if sites[path] == shape] for shape in shapes}
        width = config.width
        self.from_latent = nn.Linear(latent_size, width)
        self.site_embeddings = nn.ModuleList(nn.Embedding(len(self.paths[shape]), width) for shape in shapes)
        self.trunk = nn.Sequential(
            nn.SiLU(), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(ShapeHead(width, config.rank, shape) for shape in shapes)

    def forward(self, latent_TZ: Tensor) -> LoraAdapter:
        from_latent_T1D = self.from_latent(latent_TZ)[:, None]
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for paths, embedding, head in zip(self.paths.values(), self.site_embeddings, self.heads, strict=True):
            site_SD = embedding(torch.arange(len(paths), device=latent_TZ.device))
            features_TSD = from_latent_T1D + site_SD
            a_TSRI, b_TSOR = head(self.norm(features_TSD + self.trunk(features_TSD)))
            factors |= {path: (a_TSRI[:, s], b_TSOR[:, s]) for s, path in enumerate(paths)}
        return LoraAdapter(factors, self.scaling)


class SoftPromptHypernetwork(nn.Module):
    """z -> MLP -> P embeddings before the prompt."""

    def __init__(self, config: SoftPromptHypernetworkConfig, latent_size: int, hidden_size: int) -> None:
        super().__init__()
        self.num_virtual_tokens, self.hidden_size = config.num_virtual_tokens, hidden_size
        self.layers = nn.Sequential(
            nn.Linear(latent_size, config.width), nn.SiLU(), nn.Linear(config.width, config.num_virtual_tokens * hidden_size)
        )

    def forward(self, latent_TZ: Tensor) -> SoftPrompt:
        return SoftPrompt(self.layers(latent_TZ).view(-1, self.num_virtual_tokens, self.hidden_size))
