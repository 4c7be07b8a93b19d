"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751): z -> a narrow MLP after a linear.

    y += alpha / R * B gelu(A y)        y is what the linear gives, before it joins the residual

After a block's attention and after its feed-forward part, as published; HINT (Ivison et al. 2023)
generates the same. A and B come from the heads of a LoRA whose linears are O -> O. One of them
starts at zero, so step 0 is the base model. `peft` has no such adapter, so there is no folder of
one.

Letters: T tasks, N packed tokens, R LoRA rank, O outputs of a linear, Z latent size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ship_ds.config import BottleneckHypernetworkConfig
from ship_ds.model.adapters.adapter import Adapter, Target
from ship_ds.model.adapters.lora import FactorHypernetwork, LoraAdapter
from ship_ds.model.adapters.segments import product


@dataclass(frozen=True)
class BottleneckAdapter(Adapter):
    """The MLPs of T tasks.

    factors: A (T, R, O) and B (T, O, R) of each, held as a LoRA holds them.
    """

    factors: LoraAdapter

    @property
    def num_tasks(self) -> int:
        return self.factors.num_tasks

    def after(self, path: str, y: Tensor) -> Tensor | None:
        """See `Adapter`."""
        factors = self.factors.low_rank(path)
        if factors is None:
            return None
        y_NO = y.flatten(0, -2)
        products, a_TRO, b_TOR = factors.operands(y_NO)
        hidden_NR = torch.nn.functional.gelu(products.keep_own(product(products, y_NO, a_TRO.mT)))
        return (product(products, hidden_NR, b_TOR.mT) * factors.scaling).view_as(y)

    def rows(self, index: Tensor) -> "BottleneckAdapter":
        return replace(self, factors=self.factors.rows(index))

    def beside(self, other: Adapter) -> "BottleneckAdapter":
        """See `Adapter`."""
        assert isinstance(other, BottleneckAdapter)
        return replace(self, factors=self.factors.beside(other.factors))

    def over(self, offsets: Tensor | None) -> "BottleneckAdapter":
        return replace(self, factors=self.factors.over(offsets))

    def for_rows(self, counts: Sequence[int]) -> "BottleneckAdapter":
        """See `Adapter`."""
        return replace(self, factors=self.factors.for_rows(counts))

    def prepared(self, dtype: torch.dtype) -> "BottleneckAdapter":
        return replace(self, factors=self.factors.prepared(dtype))

    def tensors(self) -> dict[str, Tensor]:
        """A and B of each site."""
        return self.factors.tensors()


class BottleneckHypernetwork(FactorHypernetwork):
    """z -> A and B as wide as the outputs of every site."""

    def __init__(
        self, config: BottleneckHypernetworkConfig, latent_size: int, target: Target
    ) -> None:
        outputs = {path: (size, size) for path, (_, size) in target.sites.items()}
        super().__init__(config, latent_size, replace(target, sites=outputs))

    def forward(self, latent_TZ: Tensor) -> BottleneckAdapter:
        return BottleneckAdapter(self.factors(latent_TZ))

    def products_after(self) -> dict[str, int]:
        """See `Hypernetwork`."""
        return {path: 2 * self.rank * size for path, (_, size) in self.sites.items()}
