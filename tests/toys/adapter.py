"""An adapter kind of somebody else's: z is the diagonal between a learned A and B of every site.

    SHIP_DS_PLUGINS=tests.toys.adapter ... model.hypernetwork.kind=diagonal_core

The update of a linear is B diag(c(z)) A, so its value is a LoRA and leaves as one.

Letters: T tasks, Z latent size, R LoRA rank, I inputs of a linear, O outputs of a linear.
"""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ship_ds.config import LoraHypernetworkConfig
from ship_ds.kinds import ADAPTERS
from ship_ds.model.adapters.adapter import Export, Hypernetwork, Target
from ship_ds.model.adapters.lora import LoraAdapter, exports_of_lora, read_lora_adapter
from ship_ds.section import Section


class DiagonalCoreConfig(Section):
    kind: Literal["diagonal_core"] = "diagonal_core"
    rank: int = 4
    targets: list[str] = Field(default_factory=lambda: ["q_proj", "v_proj"])

    def as_lora(self) -> LoraHypernetworkConfig:
        return LoraHypernetworkConfig(rank=self.rank, alpha=self.rank, targets=tuple(self.targets))


class Factor(nn.Module):
    """A learned matrix, once a task. A module of its own with a tensor in and a tensor out: under
    ZeRO-3 a weight is gathered for the forward and again for the backward of such a module, and an
    adapter that leaves a hypernetwork is no tensor."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, scale_T: Tensor) -> Tensor:
        return scale_T.reshape(-1, 1, 1) * self.weight


class DiagonalCore(Hypernetwork):
    leaves = "lora"

    def __init__(self, config: DiagonalCoreConfig, latent_size: int, target: Target) -> None:
        super().__init__()
        self.sites = target.sites
        self.a = nn.ModuleList(
            Factor(torch.randn(config.rank, num_in) / math.sqrt(num_in))
            for num_in, _ in target.sites.values()
        )
        self.b = nn.ModuleList(
            Factor(torch.zeros(num_out, config.rank)) for _, num_out in target.sites.values()
        )
        self.core = nn.Linear(latent_size, config.rank)

    @staticmethod
    def targets(config: DiagonalCoreConfig) -> tuple[str, ...]:
        return tuple(config.targets)

    def forward(self, latent_TZ: Tensor) -> LoraAdapter:
        core_TR = self.core(latent_TZ.to(self.core.weight.dtype))
        ones_T = torch.ones_like(core_TR[:, 0])
        factors = {
            path: (core_TR[:, :, None] * a(ones_T), b(ones_T))
            for path, a, b in zip(self.sites, self.a, self.b, strict=True)
        }
        return LoraAdapter(factors, 1.0)

    def ranks(self) -> dict[str, int]:
        return dict.fromkeys(self.sites, self.core.out_features)

    def exports(self, adapter: LoraAdapter) -> list[Export]:
        return exports_of_lora(adapter)

    def read(self, folder: Path, lm: Any) -> LoraAdapter:
        return read_lora_adapter(folder, lm, self.core.weight.device)


ADAPTERS.register(DiagonalCoreConfig, DiagonalCore)
