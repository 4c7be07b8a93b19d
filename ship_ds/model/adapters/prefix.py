"""Prefixes: z -> keys and values that every block attends to before its own (prefix tuning, Li and
Liang 2021, arXiv 2101.00190; P-Tuning v2, Liu et al. 2022, arXiv 2110.07602).

A query costs the attention to P keys more, however long the instruction was. A fresh prefix is not
the base model: its values are zero, and its keys take their share of the attention.

Letters: T tasks, E sequences, Z latent size, L decoder layers, D hypernetwork width,
G key-value heads, P virtual tokens, F size of an attention head, U features of a group,
X other letters flattened.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ship_ds.config import LayerPromptHypernetworkConfig, PrefixHypernetworkConfig
from ship_ds.errors import UserError
from ship_ds.lora_folder import read_prefix, write_prefix
from ship_ds.model.adapters.adapter import Adapter, Export, Target, num_products
from ship_ds.model.adapters.trunk import TrunkHypernetwork, share_of
from ship_ds.model.attention import Prefix
from ship_ds.model.rotation import rotated_by


@dataclass(frozen=True)
class PrefixAdapter(Adapter):
    """Keys and values of T tasks.

    states: block path, or another place where a prefix is met -> (T, 2, G, P, F), keys before
    values. seen_TP: which of them the task's
    rows attend to, the first ones of each; None: to all. task_E: of each row; None: every task has
    equally many.
    """

    states: Mapping[str, Tensor]
    seen_TP: Tensor | None = None
    task_E: Tensor | None = None

    @property
    def num_tasks(self) -> int:
        return len(next(iter(self.states.values())))

    def prefix(self, path: str, num_rows: int) -> Prefix | None:
        """See `Adapter`."""
        if path not in self.states:
            return None
        keys_EGPF, values_EGPF = self._per_row(self.states[path], num_rows).unbind(1)
        seen_EP = None if self.seen_TP is None else self._per_row(self.seen_TP, num_rows)
        return keys_EGPF, values_EGPF, seen_EP

    def _per_row(self, per_task: Tensor, num_rows: int) -> Tensor:
        if self.task_E is not None:
            return per_task[self.task_E]
        if num_rows > len(per_task):
            return per_task.repeat_interleave(num_rows // len(per_task), 0)
        return per_task

    def rows(self, index: Tensor) -> "PrefixAdapter":
        return PrefixAdapter(
            {path: states[index] for path, states in self.states.items()},
            None if self.seen_TP is None else self.seen_TP[index],
        )

    def beside(self, other: Adapter) -> "PrefixAdapter":
        """See `Adapter`: as long as the longest that some task sees, so that those which others
        join for ever stay as short as that."""
        assert isinstance(other, PrefixAdapter)
        both = (self, other)
        if self.seen_TP is None is other.seen_TP and self.length == other.length:
            return PrefixAdapter(
                {path: torch.cat([one.states[path] for one in both]) for path in self.states}
            )
        length = max(1, *(int(one.seen().sum(1).max()) for one in both))
        states = {
            path: torch.cat([_lengthened(one.states[path], length, 3) for one in both])
            for path in self.states
        }
        return PrefixAdapter(
            states, torch.cat([_lengthened(one.seen(), length, 1) for one in both])
        )

    @property
    def length(self) -> int:
        """P, of the longest task."""
        return next(iter(self.states.values())).shape[3]

    def seen(self) -> Tensor:
        """Which keys each task's rows attend to, (T, P)."""
        if self.seen_TP is not None:
            return self.seen_TP
        states = next(iter(self.states.values()))
        return states.new_ones(len(states), self.length, dtype=torch.bool)

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
        """Keys and values of each block, zero where none is seen."""
        if self.seen_TP is None:
            return dict(self.states)
        seen = self.seen_TP[:, None, None, :, None]
        return {path: states * seen for path, states in self.states.items()}

    def distance(self, other: Adapter) -> Tensor:
        """By keys and values, each against the other's own size. Raises UserError where an adapter
        is as long as what it was made of."""
        assert isinstance(other, PrefixAdapter)
        if not (self.seen_TP is None is other.seen_TP and self.length == other.length):
            return super().distance(other)
        total = norm = torch.zeros(())
        for path, states in self.states.items():
            theirs = other.states[path]
            total = total + (states - theirs).square().sum((1, 2, 3, 4))
            norm = norm + theirs.square().sum()
        return total / norm.clamp(min=1e-12)


def _lengthened(tensor: Tensor, length: int, dim: int) -> Tensor:
    """With zeros behind up to this length, or without what is behind it."""
    tensor = tensor.narrow(dim, 0, min(length, tensor.shape[dim]))
    behind = 2 * (tensor.ndim - 1 - dim)
    return torch.nn.functional.pad(tensor, (0,) * (behind + 1) + (length - tensor.shape[dim],))


@dataclass(frozen=True)
class PrefixExport(Export):
    """A prefix-tuning folder of `peft`: states are block path -> (2, G, P, F)."""

    states: Mapping[str, Tensor]

    def live(self) -> PrefixAdapter:
        """See `Export`."""
        return PrefixAdapter({path: states[None] for path, states in self.states.items()})

    def write(self, part: Path, base: str, lm: Any) -> None:
        """See `Export`."""
        if lm.config.is_encoder_decoder:
            raise UserError(
                f"deduce: {type(lm).__name__}: peft's prefixes stand in the writing stack alone, "
                "and this run's elsewhere, too; `ship-ds answer` applies them"
            )
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


class OneHeadHypernetwork(TrunkHypernetwork):
    """z and the learned embedding of a block -> MLP -> its keys and values, by one head for all
    blocks; a subclass has the head and makes keys and values of what it gives."""

    leaves: ClassVar = "prefix"
    head: nn.Linear

    def add_places(
        self,
        config: PrefixHypernetworkConfig | LayerPromptHypernetworkConfig,
        latent_size: int,
        target: Target,
    ) -> None:
        """Make the trunk. A subclass calls it once, after its head is drawn.

        Args:
            config: says how many keys a block gets, and which share of z it reads.
            latent_size: Z.
            target: the Task LLM.
        """
        num_heads, head_size = target.heads
        self.places = tuple(target.attentions)
        self.layers = [target.blocks.index(block) for block in target.attentions.values()]
        self.shape = (2, num_heads, config.length, head_size)
        self.prefix_length = config.length
        self.num_shares = len(target.blocks) if config.latent == "by_layer" else 1
        self.add_trunk(share_of(latent_size, self.num_shares), config, [len(self.places)])

    @abstractmethod
    def keys_and_values(self, made_TUX: Tensor) -> Iterable[Tensor]:
        """Those of each place, (T, 2, G, P, F), of what the head gives of it."""

    def forward(self, latent_TZ: Tensor) -> PrefixAdapter:
        from_latent = self.project(latent_TZ, self.num_shares)  # (T, 1 or L, D)
        if self.num_shares > 1 and len(self.places) > self.num_shares:
            # A block with two attentions has one share of z.
            from_latent = from_latent[:, torch.tensor(self.layers, device=from_latent.device)]
        places_LD = self.embeddings(0, len(self.places), from_latent.device)
        states = self.keys_and_values(self.head(self.run_trunk(from_latent + places_LD)))
        return PrefixAdapter(dict(zip(self.places, states, strict=True)))

    def num_products(self) -> int:
        """See `Hypernetwork`: trunk and head run once for each attention."""
        once = self.num_shares * num_products(self.from_latent)
        return once + len(self.places) * (num_products(self.trunk) + num_products(self.head))

    def head_modules(self) -> list[nn.Module]:
        return [self.head]

    def read(self, folder: Path, lm: Any) -> PrefixAdapter:
        """See `Hypernetwork`: keys and values of as many positions as the run's."""
        _, num_heads, length, head_size = self.shape
        device = self.head.weight.device
        read = read_prefix_adapter(folder, lm, self.places, (num_heads, head_size), device)
        if read.length != length:
            raise UserError(
                f"{folder}: prompt_embeddings: a prefix of {read.length} positions, and "
                f"this run's have {length} (model.hypernetwork.length)"
            )
        return read

    def exports(self, adapter: PrefixAdapter) -> list[Export]:
        """See `Hypernetwork`."""
        return prefix_exports(adapter)


class PrefixHypernetwork(OneHeadHypernetwork):
    """A head that gives the keys and values themselves."""

    needs: ClassVar = ("adapters", "prefix")

    def __init__(self, config: PrefixHypernetworkConfig, latent_size: int, target: Target) -> None:
        super().__init__()
        num_heads, head_size = target.heads
        head = nn.Linear(config.width, 2 * num_heads * config.length * head_size)
        keys, values = head.weight.chunk(2)
        # Keys of about unit size, which tell the positions apart; values that say nothing yet.
        nn.init.normal_(keys)
        nn.init.zeros_(values)
        nn.init.zeros_(head.bias)
        self.add_places(config, latent_size, target)
        self.head = head

    def keys_and_values(self, made_TUX: Tensor) -> Iterable[Tensor]:
        """See `OneHeadHypernetwork`."""
        return made_TUX.unflatten(2, self.shape).unbind(1)


def read_prefix_adapter(
    folder: Path, lm: Any, places: Sequence[str], heads: tuple[int, int], device: torch.device
) -> PrefixAdapter:
    """A prefix-tuning folder of `peft` as the adapter of one task, in fp32, of any length.

    Args:
        folder: of one adapter.
        lm: the base, a transformers model.
        places: block paths, or the others where a prefix is met.
        heads: key-value heads and the size of one.
        device: where keys and values go.

    Raises:
        UserError: it is none, or of a base of other sizes.
    """
    states = read_prefix(folder, len(places), heads)
    turned = [_turned(lm, one.to(device), -1)[None] for one in states]
    return PrefixAdapter(dict(zip(places, turned, strict=True)))


def prefix_exports(adapter: PrefixAdapter) -> list[Export]:
    """Each task's prefix on its way out, as long as the task sees it."""
    lengths: list[int | None] = [None] * adapter.num_tasks
    if adapter.seen_TP is not None:
        lengths = [int(length) for length in adapter.seen_TP.sum(1)]
        if not all(lengths):
            raise UserError(
                "this run's adapters are made of one instruction's own states, which a latent "
                "has not, be it given or composed: name an instruction instead"
            )
    return [
        PrefixExport({path: one[task, :, :, :length] for path, one in adapter.states.items()})
        for task, length in enumerate(lengths)
    ]
