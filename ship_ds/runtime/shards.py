"""Under ZeRO-3, a frozen base is sharded while it is loaded, and what DeepSpeed then no longer does
for the rest is done.

DeepSpeed takes a model with sharded parameters as one that was built under `zero.Init`:
`initialize` shards the others, but neither casts nor moves them.
"""

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ship_ds.config import TrainingConfig
from ship_ds.model.streaming import Shard
from ship_ds.runtime import ranks
from ship_ds.runtime.deepspeed_config import complete, read_deepspeed_config


def sharder(training: TrainingConfig) -> Shard | None:
    """Shards a module's own parameters over the ranks, in place; None unless training.deepspeed is
    ZeRO-3.

    Every rank has to call it for the same modules in the same order: rank 0's weights are the ones
    that count.
    """
    import deepspeed

    settings = complete(read_deepspeed_config(training.deepspeed), ranks.ranks_per_node())
    if settings["zero_optimization"]["stage"] < 3:
        return None
    first: list[Any] = []

    def shard(module: nn.Module) -> None:
        parameters = list(module.parameters(recurse=False))
        # `zero.Init` starts with a model; what it has converted can convert more (DeepSpeed 0.19.8,
        # runtime/zero/partition_parameters.py), under the same settings and without a new group.
        if first:
            first[0].convert_to_zero_parameters(param_list=parameters)
        else:
            deepspeed.zero.Init(
                module=_ParametersAlone(parameters),
                config_dict_or_path=settings | {"train_micro_batch_size_per_gpu": 1},
            )
            first.append(parameters[0])

    return shard


def whole_modules(model: nn.Module) -> list[str]:
    """Classes of modules that ZeRO-3 gathers and lets go as a whole.

    DeepSpeed puts four hooks on every module, and each costs as much as a small kernel. A
    transformer block is called as a whole or not at all: transformers lists such classes in
    `_no_split_modules`, so that a block is never put on two devices. So is an MLP in a
    Sequential.
    """
    blocks = {name for module in model.modules() for name in _blocks_of(module)}
    return [*sorted(blocks), "Sequential"]


def _blocks_of(module: nn.Module) -> Collection[str]:
    return getattr(module, "_no_split_modules", None) or ()


def reduce_by_parameter(optimiser: Any) -> None:
    """Have ZeRO-3 reduce each gradient once it is complete, in whole modules as in any other.

    DeepSpeed 0.19.8 reduces those of a whole module in a hook of the module. That runs once for
    each call of the module, where the gradients are complete after the last; and where no input of
    the module needs a gradient, as in the first block over frozen embeddings, it runs before there
    are any. (runtime/zero/stage3.py: its names are private, so pyproject.toml caps the version.)
    """
    parameters = [parameter for group in optimiser.fp16_groups for parameter in group]
    for hook in (*optimiser._leaf_module_hooks, *optimiser._grad_acc_hooks):
        hook.remove()
    optimiser._leaf_module_hooks.clear()
    optimiser._grad_acc_hooks.clear()
    for parameter in parameters:
        if hasattr(parameter, "ds_z3_leaf_module"):
            del parameter.ds_z3_leaf_module
    optimiser.create_reduce_and_remove_grad_hooks()


def keep_signatures(model: nn.Module) -> None:
    """Have the signatures of ZeRO-3's functions made once.

    DeepSpeed puts two autograd functions on every module that it hooks, and one in the place of
    `linear`; torch asks Python for the signature of `forward` each time one is applied, and Python
    makes a new one each time.

    Args:
        model: that an engine has put hooks on.
    """
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    hooks = [
        vars(module)[name]
        for module in model.modules()
        for name in ("pre_bwd_fn", "post_bwd_fn")
        if name in vars(module)
    ]
    for function in (LinearFunctionForZeroStage3, *hooks):
        function.forward.__signature__ = inspect.signature(function.forward)


class _ParametersAlone(nn.Module):
    """Parameters without their module's children."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_alone = nn.ParameterList(parameters)


def cast_and_move_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Where some parameters are sharded already: cast the others to the engine's dtype and move
    them, the buffers and what the model holds outside the engine (`outside`)."""
    parameters = list(model.parameters())
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return
    device = ranks.device()
    for parameter in parameters:
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(
                device, dtype if parameter.dtype.is_floating_point else parameter.dtype
            )
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    for part in getattr(model, "outside", ()):
        part.to(device)
