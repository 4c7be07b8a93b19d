"""LoRA (Hu et al. 2021): z -> A and B of every target linear.

A hypernetwork is a trunk shared by all sites (z plus a learned embedding -> MLP) and heads
(lora_heads.py), which make A and B of its features. One of the two starts at exactly zero, so step
0 is the base model.

Letters: T tasks, Z latent size, D hypernetwork width, J sites of a group, U features of a group,
R LoRA rank, I inputs of a linear, O outputs of a linear, X other letters flattened.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ship_ds.config import BottleneckHypernetworkConfig, LoraHypernetworkConfig
from ship_ds.errors import UserError
from ship_ds.lora_folder import Lora, add, compressed, other_sizes, read_lora, write_lora
from ship_ds.model.adapters.adapter import (
    Adapter,
    Export,
    Sites,
    Target,
    num_products,
)
from ship_ds.model.adapters.lora_heads import HEADS, Factors, LoraHead
from ship_ds.model.adapters.segment_lora import LowRank
from ship_ds.model.adapters.segments import TaskEnds
from ship_ds.model.adapters.sites import linears_of, sizes, weight_of
from ship_ds.model.adapters.trunk import TrunkHypernetwork, layer_of, share_of


@dataclass(frozen=True)
class LoraAdapter(Adapter):
    """Low-rank updates: y += scaling * B A x (Hu et al. 2021), scaling = alpha / R as in `peft`.

    factors: module path -> (a_TRI, b_TOR). ends: where each task's tokens end; None: every task has
    equally many.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    scaling: float
    ends: TaskEnds | None = None

    @property
    def num_tasks(self) -> int:
        return len(next(iter(self.factors.values()))[0])

    def low_rank(self, path: str) -> LowRank | None:
        if path not in self.factors:
            return None
        return LowRank(*self.factors[path], self.scaling, self.ends)

    def prepared(self, dtype: torch.dtype) -> "LoraAdapter":
        factors = {
            path: (a_TRI.to(dtype), _as_multiplied((b_TOR * self.scaling).to(dtype)))
            for path, (a_TRI, b_TOR) in self.factors.items()
        }
        return replace(self, factors=factors, scaling=1.0)

    def rows(self, index: Tensor) -> "LoraAdapter":
        return replace(
            self,
            factors={path: (a[index], b[index]) for path, (a, b) in self.factors.items()},
            ends=None,
        )

    def beside(self, other: Adapter) -> "LoraAdapter":
        assert isinstance(other, LoraAdapter) and other.scaling == self.scaling
        factors = {
            path: (
                torch.cat([a_TRI, other.factors[path][0]]),
                _as_multiplied(torch.cat([b_TOR, other.factors[path][1]])),
            )
            for path, (a_TRI, b_TOR) in self.factors.items()
        }
        return replace(self, factors=factors, ends=None)

    def as_lora(self) -> "LoraAdapter":
        """See `Adapter`."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """A and B of each site."""
        return {
            f"{path}.{half}": factor
            for path, factors in self.factors.items()
            for half, factor in zip("AB", factors, strict=True)
        }

    def update_norms(self) -> dict[str, float]:
        """See `Adapter`."""
        return {
            path: abs(self.scaling) * math.sqrt(max(0.0, float(_inner(a, b, a, b)[0])))
            for path, (a, b) in self.factors.items()
        }

    def distance(self, other: Adapter) -> Tensor:
        """By the updates B A of every site: other factors of the same update are no distance."""
        assert isinstance(other, LoraAdapter)
        total = norm = torch.zeros(())
        for path, (a_TRI, b_TOR) in self.factors.items():
            total = total + self.scaling**2 * _inner(a_TRI, b_TOR, a_TRI, b_TOR)
            if path in other.factors:
                both = self.scaling * other.scaling
                total = total - 2 * both * _inner(a_TRI, b_TOR, *other.factors[path])
        for a_1RI, b_1OR in other.factors.values():
            norm = norm + other.scaling**2 * _inner(a_1RI, b_1OR, a_1RI, b_1OR)
        return (total + norm) / norm.clamp(min=1e-12)

    def over(self, offsets: Tensor | None) -> "LoraAdapter":
        return replace(self, ends=None if offsets is None else TaskEnds(offsets))

    def for_rows(self, counts: Sequence[int]) -> "LoraAdapter":
        """See `Adapter`."""
        device = next(iter(self.factors.values()))[0].device
        return replace(self, ends=TaskEnds.of_rows(counts, device))


def _as_multiplied(b_TOR: Tensor) -> Tensor:
    """The same numbers, laid out as a CPU's products of few tokens read them."""
    return b_TOR.mT.contiguous().mT if b_TOR.device.type == "cpu" else b_TOR


def _inner(a_TRI: Tensor, b_TOR: Tensor, other_a_TRI: Tensor, other_b_TOR: Tensor) -> Tensor:
    """<B A, B' A'> = sum of (B^T B') * (A A'^T), (T,): no update is ever formed."""
    return ((b_TOR.mT @ other_b_TOR) * (a_TRI @ other_a_TRI.mT)).sum((1, 2))


@dataclass(frozen=True)
class LoraExport(Export):
    """A plain LoRA folder of `peft`."""

    lora: Lora

    def live(self) -> LoraAdapter:
        """See `Export`."""
        return as_adapter(self.lora)

    def write(self, part: Path, base: str, lm: Any) -> None:
        """See `Export`."""
        write_lora(part, self.lora, base, lm.config)

    def shape(self) -> str:
        """See `Export`."""
        return f"LoRA, rank {self.lora.rank}, scaling {self.lora.scaling:g}"

    def padded(self, rank: int) -> "LoraExport":
        """With zero rows up to `rank`."""
        return LoraExport(self.lora.padded(rank))

    @classmethod
    def summed(
        cls, parts: Sequence[tuple[float, Any]], rank: int | None
    ) -> tuple[Export, int, float]:
        """The ranks side by side, or compressed by SVD."""
        lora = add([(weight, export.lora) for weight, export in parts])
        lora, error = (lora, 0.0) if rank is None else compressed(lora, rank)
        return LoraExport(lora), lora.rank, error


def as_adapter(lora: Lora) -> LoraAdapter:
    """A LoRA on disk as the adapter of one task."""
    factors = {path: (a_RI[None], b_OR[None]) for path, (a_RI, b_OR) in lora.factors.items()}
    return LoraAdapter(factors, lora.scaling)


def read_lora_adapter(folder: Path, lm: Any, device: torch.device) -> LoraAdapter:
    """A LoRA folder as the adapter of one task, in fp32: of any ranks and of any linears of the
    base's blocks, those that the run adapts or not.

    Args:
        folder: as `peft` or `ship-ds deduce` writes it.
        lm: the base, a transformers model.
        device: where the factors go.

    Raises:
        UserError: it is no LoRA folder, or adapts what is no such linear or of other sizes.
    """
    linears = linears_of(lm)

    def weight(path: str) -> Tensor:
        if path not in linears:
            raise _no_such_linear(folder, path, len(linears))
        return weight_of(linears[path])

    return adapter_of_lora(folder, read_lora(folder, weight), sizes(linears), device)


def adapter_of_lora(folder: Path, lora: Lora, sites: Sites, device: torch.device) -> LoraAdapter:
    """A LoRA as the adapter of one task, in fp32.

    Args:
        folder: where it comes from, for messages.
        lora: what was read there.
        sites: the linears that it may change.
        device: where the factors go.

    Raises:
        UserError: it changes what is no site, or of other sizes.
    """
    for path, (a_RI, b_OR) in lora.factors.items():
        _check_site(folder, path, (a_RI.shape[1], b_OR.shape[0]), sites)
    adapter = as_adapter(lora)
    factors = {
        path: (a_1RI.float().to(device), b_1OR.float().to(device))
        for path, (a_1RI, b_1OR) in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


def _check_site(folder: Path, path: str, shape: tuple[int, int], sites: Sites) -> None:
    if path not in sites:
        raise _no_such_linear(folder, path, len(sites))
    if shape != sites[path]:
        raise other_sizes(folder, path, shape, sites[path])


def _no_such_linear(folder: Path, path: str, num_linears: int) -> UserError:
    return UserError(
        f"{folder}: adapts {path}, which is none of the {num_linears} linears in the blocks of "
        "this run's base: an adapter of another base model, or of modules that cannot be adapted"
    )


def exports_of_lora(adapter: LoraAdapter) -> list[Export]:
    """One a task; also for kinds whose value can be written as a LoRA."""
    pairs = list(adapter.factors.items())
    return [
        LoraExport(Lora({path: (a[task], b[task]) for path, (a, b) in pairs}, adapter.scaling))
        for task in range(adapter.num_tasks)
    ]


class FactorHypernetwork(TrunkHypernetwork):
    """z and the learned embedding of a site (layer and module) -> MLP -> heads."""

    def __init__(
        self,
        config: LoraHypernetworkConfig | BottleneckHypernetworkConfig,
        latent_size: int,
        target: Target,
    ) -> None:
        super().__init__()
        self.scaling, self.sites = config.alpha / config.rank, target.sites
        self.rank = config.rank
        width, head_type = config.width, HEADS[config.heads]
        heads = [
            head_type(width, config.rank, group, config.starts_at_zero)
            for group in head_type.groups(target.sites)
        ]
        self.num_shares = len(target.blocks) if config.latent == "by_layer" else 1
        if self.num_shares > 1:
            for group, head in enumerate(heads):
                layers = torch.tensor([layer_of(path, target.blocks) for path in head.places])
                self.register_buffer(f"layers_{group}", layers, persistent=False)
        self.add_trunk(
            share_of(latent_size, self.num_shares), config, [head.num_embeddings for head in heads]
        )
        self.heads = nn.ModuleList(heads)

    def factors(self, latent_TZ: Tensor) -> LoraAdapter:
        """A and B of every site."""
        from_latent_TXD = self.project(latent_TZ, self.num_shares)
        factors: Factors = {}
        for group, head in enumerate(self.heads):
            assert isinstance(head, LoraHead)
            places_JD = self.embeddings(group, head.num_embeddings, latent_TZ.device)
            # Without shares z's part is one for all places, and is spread over them by the sum.
            own_TUD = from_latent_TXD
            if self.num_shares > 1:
                own_TUD = from_latent_TXD.index_select(1, self.get_buffer(f"layers_{group}"))
            factors |= head.factors(self.run_trunk(own_TUD + head.units(places_JD)))
        return LoraAdapter(factors, self.scaling)

    @staticmethod
    def targets(config: LoraHypernetworkConfig) -> tuple[str, ...]:
        """Names of the Task LLM's linears that its adapters change."""
        return config.targets

    def head_modules(self) -> list[nn.Module]:
        """Where most of the weights are; the rest is the trunk."""
        return list(self.heads)

    def num_products(self) -> int:
        """See `Hypernetwork`: trunk and head run once for each of the head's features."""
        heads = (head for head in self.heads if isinstance(head, LoraHead))
        return self.num_shares * num_products(self.from_latent) + sum(
            head.num_features * (num_products(self.trunk) + num_products(head))
            + head.products_of_factors()
            for head in heads
        )


class LoraHypernetwork(FactorHypernetwork):
    """z -> the LoRA of every site."""

    leaves: ClassVar = "lora"

    def forward(self, latent_TZ: Tensor) -> LoraAdapter:
        return self.factors(latent_TZ)

    def ranks(self) -> Mapping[str, int]:
        """See `Hypernetwork`."""
        return dict.fromkeys(self.sites, self.rank)

    def exports(self, adapter: LoraAdapter) -> list[Export]:
        """See `Hypernetwork`."""
        return exports_of_lora(adapter)

    def read(self, folder: Path, lm: Any) -> LoraAdapter:
        """See `read_lora_adapter`."""
        return read_lora_adapter(folder, lm, self.from_latent.weight.device)
