"""Where an adapter acts: the target linears and the blocks of a language model, wrapped once.

After that nothing is patched: no forward is replaced, no hook is global. Sites are keyed by module
path, so a model may have several stacks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ship_ds.errors import UserError
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.language_model import language_model


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

    def __init__(self, block: nn.Module, path: str) -> None:
        super().__init__()
        self.block, self.path = block, path
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
            prefix = ship_adapter and ship_adapter.prefix(self.path, len(hidden))
            # The block hands what it does not know down to the attention function.
            extra = {} if prefix is None else {"ship_prefix": prefix}
            try:
                return self.block(hidden, *args, **kwargs, **extra)
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
    target_paths = {
        path: _targets_in(type(model).__name__, path, linears, targets) for path in blocks
    }
    for block_path, block in blocks.items():
        for path in target_paths[block_path]:
            model.set_submodule(path, AdaptedLinear(linears[path], path))
        model.set_submodule(block_path, AdaptedBlock(block, block_path))
    return {
        path: (linears[path].in_features, linears[path].out_features)
        for paths in target_paths.values()
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
