"""Prefixes: z -> keys and values that every block attends to before its own (prefix tuning, Li and
Liang 2021, arXiv 2101.00190; P-Tuning v2, Liu et al. 2022, arXiv 2110.07602).

A query costs the attention to P keys more, however long the instruction was. A fresh prefix is not
the base model: its values are zero, and its keys take their share of the attention.

Letters: T tasks, E sequences, Z latent size, L decoder layers, D hypernetwork width,
G key-value heads, P virtual tokens, F size of an attention head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ship_ds.config import PrefixHypernetworkConfig
from ship_ds.lora_folder import write_prefix
from ship_ds.model.adapters.adapter import Adapter, Export, Prefix, Target, num_products
from ship_ds.model.adapters.trunk import TrunkHypernetwork, share_of
from ship_ds.model.rotation import rotated_by


@dataclass(frozen=True)
class PrefixAdapter(Adapter):
    """Keys and values of T tasks.

    states: block path -> (T, 2, G, P, F), keys before values. task_E: of each row; None: every task
    has equally many.
    """

    states: Mapping[str, Tensor]
    task_E: Tensor | None = None

    @property
    def num_tasks(self) -> int:
        return len(next(iter(self.states.values())))

    def prefix(self, path: str, num_rows: int) -> Prefix | None:
        """See `Adapter`."""
        states = self.states[path]
        if self.task_E is not None:
            states = states[self.task_E]
        elif num_rows > len(states):
            states = states.repeat_interleave(num_rows // len(states), 0)
        keys_EGPF, values_EGPF = states.unbind(1)
        return keys_EGPF, values_EGPF

    def rows(self, index: Tensor) -> "PrefixAdapter":
        return PrefixAdapter({path: states[index] for path, states in self.states.items()})

    def for_rows(self, counts: Sequence[int]) -> "PrefixAdapter":
        """See `Adapter`."""
        if len(set(counts)) == 1:
            return replace(self, task_E=None)
        device = next(iter(self.states.values())).device
        tasks = torch.arange(len(counts)).repeat_interleave(torch.tensor(list(counts)))
        return replace(self, task_E=tasks.to(device))

    def prepared(self, dtype: torch.dtype) -> "PrefixAdapter":
        return replace(self, states={path: one.to(dtype) for path, one in self.states.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Keys and values of each block."""
        return dict(self.states)

    def distance(self, other: Adapter) -> Tensor:
        """By keys and values, each against the other's own size."""
        assert isinstance(other, PrefixAdapter)
        total = norm = torch.zeros(())
        for path, states in self.states.items():
            theirs = other.states[path]
            total = total + (states - theirs).square().sum((1, 2, 3, 4))
            norm = norm + theirs.square().sum()
        return total / norm.clamp(min=1e-12)


@dataclass(frozen=True)
class PrefixExport(Export):
    """A prefix-tuning folder of `peft`: states are block path -> (2, G, P, F)."""

    states: Mapping[str, Tensor]

    def live(self) -> PrefixAdapter:
        """See `Export`."""
        return PrefixAdapter({path: states[None] for path, states in self.states.items()})

    def write(self, part: Path, base: str, lm: Any) -> None:
        """See `Export`."""
        write_prefix(part, [_turned(lm, one, 1) for one in self.states.values()], base, lm.config)

    def shape(self) -> str:
        """See `Export`."""
        states = next(iter(self.states.values()))
        return f"prefix, {states.shape[2]} keys and values in each of {len(self.states)} blocks"


def _turned(lm: Any, states_2GPF: Tensor, sign: int) -> Tensor:
    """With `peft` a prompt's positions begin behind the prefix, with us at 0. A key that is turned
    on by as many positions meets every query as before."""
    keys_GPF, values_GPF = states_2GPF
    return torch.stack([rotated_by(lm, keys_GPF, sign * keys_GPF.shape[1]), values_GPF])


class PrefixHypernetwork(TrunkHypernetwork):
    """z and the learned embedding of a block -> MLP -> its keys and values, by one linear for all
    blocks."""

    needs: ClassVar = ("adapters", "prefix")

    def __init__(self, config: PrefixHypernetworkConfig, latent_size: int, target: Target) -> None:
        super().__init__()
        num_heads, head_size = target.heads
        self.blocks = target.blocks
        self.shape = (2, num_heads, config.length, head_size)
        self.prefix_length = config.length
        head = nn.Linear(config.width, 2 * num_heads * config.length * head_size)
        keys, values = head.weight.chunk(2)
        # Keys of about unit size, which tell the positions apart; values that say nothing yet.
        nn.init.normal_(keys)
        nn.init.zeros_(values)
        nn.init.zeros_(head.bias)
        self.num_shares = len(self.blocks) if config.latent == "by_layer" else 1
        self.add_trunk(share_of(latent_size, self.num_shares), config.width, [len(self.blocks)])
        self.head = head

    def forward(self, latent_TZ: Tensor) -> PrefixAdapter:
        from_latent = self.project(latent_TZ, self.num_shares)  # (T, 1 or L, D)
        places_LD = self.embeddings(0, len(self.blocks), from_latent.device)
        states = self.head(self.run_trunk(from_latent + places_LD)).unflatten(2, self.shape)
        return PrefixAdapter(dict(zip(self.blocks, states.unbind(1), strict=True)))

    def num_products(self) -> int:
        """See `Hypernetwork`: trunk and head run once for each block."""
        once = self.num_shares * num_products(self.from_latent)
        return once + len(self.blocks) * (num_products(self.trunk) + num_products(self.head))

    def head_modules(self) -> list[nn.Module]:
        return [self.head]

    def exports(self, adapter: PrefixAdapter) -> list[Export]:
        """See `Hypernetwork`."""
        return [
            PrefixExport({path: states[task] for path, states in adapter.states.items()})
            for task in range(adapter.num_tasks)
        ]
