"""Adapters: what the hypernetwork builds and the Task LLM applies. A new kind is a new class here.

An adapter is an explicit value. It travels as a keyword argument through the transformers model
into every decoder block, and a checkpointed block's recomputation sees the very adapter that its
forward saw: the block hands it to its linear layers inside the checkpointed function, so nothing
depends on what is current when the backward pass runs.

Letters: T tasks (or rows), R rank, I in, O out, P virtual tokens, H hidden; "..." any token layout,
task-major.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ship_ds.errors import UserError
from ship_ds.model.language_model import language_model
from ship_ds.model.segment_lora import segment_lora


class Adapter(Protocol):
    """The signature the Task LLM knows."""

    @property
    def num_tasks(self) -> int:
        """T, or how many rows it was expanded to."""

    def delta(self, path: str, x: Tensor) -> Tensor | None:
        """What is added to the output of the linear at module `path` for input x (..., I); None:
        nothing."""

    def virtual_tokens(self) -> Tensor | None:
        """Embeddings put before every prompt, (T, P, H); None: none."""

    def rows(self, index: Tensor) -> "Adapter":
        """The adapter whose row e is this one's row index[e]; it expands, reorders and compacts a
        batch."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was generated, by name; its first dimension is T."""

    def distance(self, other: "Adapter") -> Tensor:
        """|each task of this - other|^2 / |other|^2, (T,), with gradient; `other` is of the same
        kind and of one task, and the norms are of what they do, not of how they are written."""

    def over(self, offsets: Tensor | None) -> "Adapter":
        """The same for tokens laid end to end, task t ending at offsets[t]; None: every task has
        equally many tokens."""


@dataclass(frozen=True)
class LoraAdapter:
    """Low-rank updates: y += scaling * B A x (Hu et al. 2021), scaling = alpha / R as in `peft`.

    factors: module path -> (a_TRI, b_TOR).
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    scaling: float
    offsets: Tensor | None = None

    @property
    def num_tasks(self) -> int:
        return len(next(iter(self.factors.values()))[0])

    def delta(self, path: str, x: Tensor) -> Tensor | None:
        if path not in self.factors:
            return None
        a_TRI, b_TOR = self.factors[path]
        # B is far smaller than the output
        return segment_lora(x, a_TRI, b_TOR * self.scaling, self.offsets)

    def virtual_tokens(self) -> Tensor | None:
        return None

    def rows(self, index: Tensor) -> "LoraAdapter":
        return replace(
            self,
            factors={path: (a[index], b[index]) for path, (a, b) in self.factors.items()},
            offsets=None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """A and B of each site."""
        return {
            f"{path}.{half}": factor
            for path, factors in self.factors.items()
            for half, factor in zip("AB", factors, strict=True)
        }

    def distance(self, other: Adapter) -> Tensor:
        """By the updates B A of every site: other factors of the same update are no distance."""
        assert isinstance(other, LoraAdapter)
        total = norm = torch.zeros(())
        for path, (a_TRI, b_TOR) in self.factors.items():
            total = total + self.scaling**2 * _inner(a_TRI, b_TOR, a_TRI, b_TOR)
            if path in other.factors:
                a_1RI, b_1OR = other.factors[path]
                square = other.scaling**2 * _inner(a_1RI, b_1OR, a_1RI, b_1OR)
                both = self.scaling * other.scaling * _inner(a_TRI, b_TOR, a_1RI, b_1OR)
                total, norm = total + square - 2 * both, norm + square
        return total / norm.clamp(min=1e-12)

    def over(self, offsets: Tensor | None) -> "LoraAdapter":
        return replace(self, offsets=offsets)


def _inner(a_TRI: Tensor, b_TOR: Tensor, other_a_TRI: Tensor, other_b_TOR: Tensor) -> Tensor:
    """<B A, B' A'> = sum of (B^T B') * (A A'^T), (T,): no update is ever formed."""
    return ((b_TOR.mT @ other_b_TOR) * (a_TRI @ other_a_TRI.mT)).sum((1, 2))


@dataclass(frozen=True)
class SoftPrompt:
    """Embeddings that precede the prompt (Lester et al. 2021): prompt_TPH."""

    prompt_TPH: Tensor

    @property
    def num_tasks(self) -> int:
        return len(self.prompt_TPH)

    def delta(self, path: str, x: Tensor) -> Tensor | None:
        return None

    def virtual_tokens(self) -> Tensor | None:
        return self.prompt_TPH

    def rows(self, index: Tensor) -> "SoftPrompt":
        return SoftPrompt(self.prompt_TPH[index])

    def tensors(self) -> dict[str, Tensor]:
        """The embeddings."""
        return {"prompt": self.prompt_TPH}

    def distance(self, other: Adapter) -> Tensor:
        """By the embeddings."""
        assert isinstance(other, SoftPrompt)
        difference_TPH = self.prompt_TPH - other.prompt_TPH
        norm = other.prompt_TPH.square().sum().clamp(min=1e-12)
        return difference_TPH.square().sum((1, 2)) / norm

    def over(self, offsets: Tensor | None) -> "SoftPrompt":
        return self


class AdaptedLinear(nn.Module):
    """A target linear, wrapped once. It calls `base(x)`, where ZeRO-3 gathers and bitsandbytes
    dequantises."""

    def __init__(self, base: nn.Module, path: str) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self.adapter: Adapter | None = None

    @property
    def weight(self) -> Any:
        """The base's: some families (T5) look at its type before they call the linear."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        delta = self.adapter.delta(self.path, x) if self.adapter is not None else None
        return out if delta is None else out + delta.to(out.dtype)


class AdaptedBlock(nn.Module):
    """A decoder block that takes `ship_adapter` and, with `ship_checkpoint`, recomputes itself in
    the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        # A plain list: they are registered below `block` already.
        self.sites = [module for module in block.modules() if isinstance(module, AdaptedLinear)]

    def forward(
        self,
        hidden: Tensor,
        *args: Any,
        ship_adapter: Adapter | None = None,
        ship_checkpoint: bool = False,
        **kwargs: Any,
    ) -> Any:
        def run(hidden: Tensor) -> Any:
            for site in self.sites:
                site.adapter = ship_adapter
            try:
                return self.block(hidden, *args, **kwargs)
            finally:
                for site in self.sites:
                    site.adapter = None

        if ship_checkpoint and torch.is_grad_enabled():
            return checkpoint(run, hidden, use_reentrant=False)
        return run(hidden)


def wrap_sites(model: nn.Module, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Wrap the target linears and the blocks of a transformers model, once.

    Args:
        model: of any architecture that language_model.py knows.
        targets: names of linear modules, such as "q_proj", in each block.

    Returns:
        Module path before the wrapping -> (in, out) of each site.

    Raises:
        UserError: the model cannot be adapted, or a block lacks a target.
    """
    lm = language_model(model)
    reason = lm.missing("adapters")
    if reason is not None:
        raise UserError(reason)
    blocks, linears = lm.blocks(), lm.linears()
    # All targets are looked for before the first module is replaced.
    found = {path: _targets_in(type(model).__name__, path, linears, targets) for path in blocks}
    for block_path, block in blocks.items():
        for path in found[block_path]:
            model.set_submodule(path, AdaptedLinear(linears[path], path))
        model.set_submodule(block_path, AdaptedBlock(block))
    return {
        path: (linears[path].in_features, linears[path].out_features)
        for paths in found.values()
        for path in paths
    }


def _targets_in(
    model_name: str, block_path: str, linears: Mapping[str, nn.Linear], targets: tuple[str, ...]
) -> list[str]:
    """Paths of the block's target linears, target by target."""
    paths = [path for path in linears if path.startswith(f"{block_path}.")]
    names = {path.rpartition(".")[2] for path in paths}
    for target in targets:
        if target not in names:
            raise UserError(
                f"hypernetwork.targets: {model_name} has no linear module {target!r}; "
                f"its blocks have {', '.join(sorted(names))}"
            )
    return [path for target in targets for path in paths if path.rpartition(".")[2] == target]


def sites_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """As `wrap_sites` gave them when it wrapped this model."""
    wrapped = {
        module.path: module.base for module in model.modules() if isinstance(module, AdaptedLinear)
    }
    return {
        path: (linear.in_features, linear.out_features)
        for path, linear in wrapped.items()
        if isinstance(linear, nn.Linear)
    }
