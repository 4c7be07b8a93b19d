"""An adapter kind of somebody else's: keys and values that every block attends to besides
(P-Tuning v2, Liu et al. 2022), by an MLP from z.

Letters: T tasks, E sequences, Z latent size, L decoder layers, G key-value heads, P virtual tokens,
F size of an attention head, X other letters flattened.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from ship_ds.kinds import ADAPTERS
from ship_ds.model.adapters.adapter import Adapter, Hypernetwork, Prefix, Target
from ship_ds.section import Section


class PrefixConfig(Section):
    kind: Literal["toy_prefix"] = "toy_prefix"
    length: int = 3
    width: int = 16


@dataclass(frozen=True)
class PrefixAdapter(Adapter):
    """states: block path -> keys and values (T, 2, G, P, F)."""

    states: Mapping[str, Tensor]

    @property
    def num_tasks(self) -> int:
        return len(next(iter(self.states.values())))

    def prefix(self, path: str, num_rows: int) -> Prefix | None:
        counts = num_rows // self.num_tasks
        keys, values = self.states[path].repeat_interleave(counts, 0).unbind(1)
        return keys, values

    def rows(self, index: Tensor) -> "PrefixAdapter":
        return PrefixAdapter({path: states[index] for path, states in self.states.items()})

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.states)


class PrefixHypernetwork(Hypernetwork):
    needs: ClassVar = ("adapters", "prefix")

    def __init__(self, config: PrefixConfig, latent_size: int, target: Target) -> None:
        super().__init__()
        heads, size = target.heads
        self.blocks, self.shape = target.blocks, (2, heads, config.length, size)
        self.layers = nn.Sequential(
            nn.Linear(latent_size, config.width),
            nn.SiLU(),
            nn.Linear(config.width, len(self.blocks) * 2 * heads * config.length * size),
        )

    def forward(self, latent_TZ: Tensor) -> PrefixAdapter:
        states_TX = self.layers(latent_TZ.to(self.layers[0].weight.dtype))
        states_TLX = states_TX.unflatten(1, (len(self.blocks), -1))
        return PrefixAdapter(
            {
                path: states_TLX[:, layer].unflatten(1, self.shape)
                for layer, path in enumerate(self.blocks)
            }
        )


ADAPTERS.register(PrefixConfig, PrefixHypernetwork)
