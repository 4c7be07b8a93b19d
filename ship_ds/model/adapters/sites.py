"""Where an adapter acts: the target linears and the blocks of a language model, wrapped once.

After that nothing is patched: no forward is replaced, no hook is global. Sites are keyed by module
path, so a model may have several stacks.

Letters: E sequences, N packed tokens, I inputs of a linear.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from ship_ds.config import ALL_LINEAR
from ship_ds.errors import UserError
from ship_ds.model.adapters.adapter import Adapter, Sites
from ship_ds.model.attention import Prefix
from ship_ds.model.batch import RowGroups
from ship_ds.model.language_model import LanguageModel, language_model, linear_sizes
from ship_ds.model.nf4_linear import Nf4Linear


class AdaptedLinear(nn.Module):
    """A target linear, wrapped once. It calls `base(x)`, where ZeRO-3 gathers and the weight is
    dequantised, and adds what the adapter says, in place: a base gives a tensor of its own, which
    no custom function made as a view."""

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
        out = self._changed(x)
        after = None if self.adapter is None else self.adapter.after(self.path, out)
        return out if after is None else out + after.to(out.dtype)

    def _changed(self, x: Tensor) -> Tensor:
        """The base's output with what the adapter makes of its input."""
        if self.adapter is None:
            plain: Tensor = self.base(x)
            return plain
        low_rank = self.adapter.low_rank(self.path)
        if low_rank is not None and isinstance(self.base, Nf4Linear):
            # By name: DeepSpeed's hooks look at positional arguments, and know tensors alone.
            fused: Tensor = self.base(x, low_rank=low_rank)
            return fused
        # As rows: the output of a linear over more dimensions is a view, and to add to that in
        # place makes autograd copy its gradient.
        x_NI = x.flatten(0, -2)
        out: Tensor = self.base(x_NI)
        if low_rank is not None:
            out = low_rank.add_to(out, x_NI)
        elif (delta := self.adapter.delta(self.path, x)) is not None:
            out = out.add_(delta.to(out.dtype).flatten(0, -2))
        return out.unflatten(0, x.shape[:-1])


class AdaptedBlock(nn.Module):
    """A decoder block that takes `ship_adapter` and, with `ship_checkpoint`, recomputes itself in
    the backward pass.

    Parameters below it are named as if it were not there: a run may turn checkpointing on or off,
    and its checkpoints and bundles stay the same.
    """

    def __init__(self, block: nn.Module, path: str, attentions: Sequence[str] = ()) -> None:
        """Wrap a block.

        Args:
            block: of a transformers model.
            path: its module path.
            attentions: where a prefix is met in it (`LanguageModel.attentions`); the block's own
                first.
        """
        super().__init__()
        self.block, self.path = block, path
        self.names_of_block = {*vars(block), *dict(block.named_children())}
        self.prefixes = list(zip(_PREFIXES, attentions or (path,), strict=False))
        self.find_sites()
        self.register_state_dict_post_hook(_leave_block_out)
        self.register_load_state_dict_pre_hook(_put_block_in)

    def find_sites(self) -> None:
        """Look for wrapped linears, at the beginning and when more of them were wrapped."""
        # A plain list: they are registered below `block` already.
        self.sites = [m for m in self.block.modules() if isinstance(m, AdaptedLinear)]

    def __getattr__(self, name: str) -> Any:
        # Stacks look at their blocks: Nemotron-H's at `block_type`, RecurrentGemma's at a module.
        # At what a block has from the beginning alone: DeepSpeed notes things on every module, and
        # would take the block's for the wrapper's.
        if name in self.__dict__.get("names_of_block", ()) and name not in ("block", "path"):
            return getattr(super().__getattr__("block"), name)
        return super().__getattr__(name)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """See `nn.Module`; the block has the name of its wrapper.

        Args:
            memo: modules that were given already, which are left out; those given here are added.
                None: none was.
            prefix: the name of the wrapper.
            remove_duplicate: whether a module that is there twice is given once.

        Yields:
            (name, module) of the wrapper, of the block and of all that is below it.
        """
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
            yield from self.block.named_modules(memo, prefix, remove_duplicate)

    def forward(
        self,
        hidden: Tensor | None = None,
        *args: Any,
        ship_adapter: Adapter | None = None,
        ship_checkpoint: bool = False,
        **kwargs: Any,
    ) -> Any:
        """What the block gives under an adapter; its wrapped linears know it for this call alone.

        Args:
            hidden: the states that come in, a row a sequence, or all packed tokens as one row.
                None: they are among kwargs, as `hidden_states` (LongCat-Flash).
            args: what else the block takes, by position.
            ship_adapter: of all rows; None: the bare base.
            ship_checkpoint: recompute the block in the backward pass, where there are gradients.
            kwargs: what else the block takes, by name. `ship_rows` (`batch.RowGroups`), where it is
                among them, says how many sequences the packed tokens are.
        """

        if hidden is None:
            hidden = kwargs.pop("hidden_states")

        def run(hidden: Tensor) -> Any:
            try:
                for site in self.sites:
                    site.adapter = ship_adapter
                # The block hands what it does not know down to the attention function.
                extra = self._prefixes(ship_adapter, hidden, kwargs.get("ship_rows"))
                return self.block(hidden, *args, **kwargs, **extra)
            finally:
                # Whatever happens, a prefix that finds no memory among it: they are shared.
                for site in self.sites:
                    site.adapter = None

        if ship_checkpoint and torch.is_grad_enabled():
            return checkpoint(run, hidden, use_reentrant=False)
        return run(hidden)

    def _prefixes(
        self, adapter: Adapter | None, hidden: Tensor, rows: RowGroups | None
    ) -> dict[str, Prefix]:
        """What the adapter puts before the keys and values of the block's attentions, by the names
        under which it travels."""
        if adapter is None:
            return {}
        # Packed tokens lie as one row. Gemma 3n's states have one more dimension before the rows.
        num_rows = hidden.shape[-3] if rows is None else len(rows.row_E)
        made = {name: adapter.prefix(place, num_rows) for name, place in self.prefixes}
        return {name: prefix for name, prefix in made.items() if prefix is not None}


_BLOCK = "block."
_PREFIXES = ("ship_prefix", "ship_cross_prefix")
"""What the prefixes of a block's own attention, and of its attention to another stack, are called
on their way to attention.py."""


def _leave_block_out(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    for name in [name for name in state if name.startswith(prefix + _BLOCK)]:
        state[prefix + name.removeprefix(prefix + _BLOCK)] = state.pop(name)


def _put_block_in(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[prefix + _BLOCK + name.removeprefix(prefix)] = state.pop(name)


def wrap_sites(model: nn.Module, targets: tuple[str, ...]) -> Sites:
    """Wrap the linears that a hypernetwork's adapters change, and all blocks.

    Args:
        model: of any architecture that language_model.py knows, not wrapped yet.
        targets: names of linear modules, such as "q_proj", in each block.

    Returns:
        The sites.

    Raises:
        UserError: the model cannot be adapted, or a block lacks a target.
    """
    sites = sites_in_each_block(model, targets)
    wrap(model, sites)
    return sites


def wrap(model: nn.Module, sites: Iterable[str]) -> None:
    """Wrap the linears at these module paths and all blocks of a transformers model, once.

    Raises:
        UserError: the model cannot be adapted.
    """
    lm = _adaptable(model)
    for path in dict.fromkeys(sites):
        model.set_submodule(path, AdaptedLinear(model.get_submodule(path), path))
    attentions = lm.attentions()
    for path, block in lm.blocks().items():
        places = [place for place, block_path in attentions.items() if block_path == path]
        model.set_submodule(path, AdaptedBlock(block, path, places))


def sites_in_each_block(model: nn.Module, targets: tuple[str, ...]) -> Sites:
    """The linears that a hypernetwork's adapters change: block after block, target after target,
    which is the order of its heads.

    Raises:
        UserError: the model cannot be adapted, or a block lacks a target.
    """
    lm = _adaptable(model)
    linears = lm.linears()
    paths = [
        path
        for block_path in lm.blocks()
        for path in _targets_in(type(model).__name__, block_path, linears, targets)
    ]
    return sizes({path: linears[path] for path in paths})


def sites_anywhere(model: nn.Module, targets: tuple[str, ...]) -> Sites:
    """The linears that a static LoRA changes, in the order of the model's modules: a target may be
    missing in some blocks, as `peft` allows.

    Raises:
        UserError: the model cannot be adapted, or no block has a target.
    """
    linears = _adaptable(model).linears()
    _check_targets("tuning.targets", type(model).__name__, linears, targets)
    return sizes({path: linears[path] for path in linears if is_target(path, targets)})


def _adaptable(model: nn.Module) -> LanguageModel:
    lm = language_model(model)
    reason = lm.missing("adapters")
    if reason is not None:
        raise UserError(reason)
    return lm


def _targets_in(
    model_name: str, block_path: str, linears: Mapping[str, nn.Module], targets: tuple[str, ...]
) -> list[str]:
    """Paths of the block's target linears, target by target."""
    paths = [path for path in linears if path.startswith(f"{block_path}.")]
    _check_targets("model.hypernetwork.targets", model_name, paths, targets)
    target_paths = (path for target in targets for path in paths if is_target(path, (target,)))
    return list(dict.fromkeys(target_paths))


def _check_targets(
    key: str, model_name: str, paths: Iterable[str], targets: tuple[str, ...]
) -> None:
    names = {path.rpartition(".")[2] for path in paths}
    for target in targets:
        if target not in names and not (names and target == ALL_LINEAR):
            raise UserError(
                f"{key}: {model_name} has no linear module {target!r}; its blocks have "
                f"{', '.join(sorted(names))}: name of these, or {ALL_LINEAR} for all"
            )


def is_target(path: str, targets: Sequence[str]) -> bool:
    """Whether a linear's last name is one of these; `all-linear` is, as in `peft`, any."""
    return ALL_LINEAR in targets or path.rpartition(".")[2] in targets


def sizes(linears: Mapping[str, nn.Module]) -> Sites:
    """Inputs and outputs of each."""
    return {path: linear_sizes(one) for path, one in linears.items()}


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of a model's blocks by its module path, wrapped or not.

    Raises:
        UserError: the model cannot be adapted.
    """
    wrapped = {f"{m.path}.base": m.path for m in model.modules() if isinstance(m, AdaptedLinear)}
    return {wrapped.get(path, path): one for path, one in _adaptable(model).linears().items()}


def weight_of(linear: nn.Module) -> Tensor:
    """A linear's weight (O, I) in fp32, as the model computes with it."""
    if isinstance(linear, Nf4Linear):
        # A copy: on a CPU the next linear writes over it.
        return linear.dequantised(torch.float32).clone()
    weight: Tensor = linear.get_parameter("weight").detach().float()
    return weight.T if isinstance(linear, Conv1D) else weight


def wrap_also(model: nn.Module, paths: Iterable[str]) -> None:
    """Wrap linears of a model that is wrapped already, for an adapter of other modules than the
    run's; those that are wrapped stay.

    Args:
        model: see `wrap`.
        paths: of linears in its blocks.
    """
    linears, modules = linears_of(model), dict(model.named_modules())
    for path in paths:
        parent, _, name = path.rpartition(".")
        if not isinstance(getattr(modules[parent], name), AdaptedLinear):
            setattr(modules[parent], name, AdaptedLinear(linears[path], path))
    for block in model.modules():
        if isinstance(block, AdaptedBlock):
            block.find_sites()


def sites_of(model: nn.Module) -> Sites:
    """Every linear of this model that was wrapped, in the order of its modules."""
    wrapped = {
        module.path: module.base for module in model.modules() if isinstance(module, AdaptedLinear)
    }
    return sizes(wrapped)
