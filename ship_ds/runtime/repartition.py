"""A checkpoint goes on with another number of ranks, or under another ZeRO stage.

DeepSpeed's shards are flat slices, whose layout depends on both. Here the fp32 weights and Adam's moments are put together
by parameter name from all ranks' shards, as DeepSpeed's own zero_to_fp32 does for the weights, and each rank of the new
engine takes its slices. The frozen base is in no checkpoint and takes no part. (DeepSpeed's universal checkpoint wants the
same, but writes a second copy on the disk first.) The shards are memory-mapped: a node reads them once, and holds one
parameter of each kind at a time.
"""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.runtime import ranks
from ship_ds.runtime.pickles import load_shard

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class SavedState:
    """Whole tensors by parameter name (or DeepSpeed's stand-ins, whole once `.contiguous()` is called), in fp32.

    `scalars` is the rest of Adam's state of a parameter ("step"); `group` that of its parameter group.
    """

    weights: Mapping[str, Any]
    moments: Mapping[str, Mapping[str, Any]]
    scalars: Mapping[str, Any]
    group: Mapping[str, Any]


def layout(folder: Path) -> tuple[int, int]:
    """(ZeRO stage, number of ranks) of the DeepSpeed shards in `folder`."""
    shards = sorted(folder.glob("*_optim_states.pt"))
    return int(_optimiser(shards[0])["zero_stage"]), len(shards)


def read(folder: Path) -> SavedState:
    """From DeepSpeed shards of any number of ranks; they have been verified against their manifest."""
    shards = [_optimiser(path) for path in _by_rank(folder, "*_optim_states.pt")]
    is_stage_3 = int(shards[0]["zero_stage"]) == 3
    weights = [shard["fp32_flat_groups" if is_stage_3 else "single_partition_of_fp32_groups"] for shard in shards]
    inner = [shard["optimizer_state_dict" if is_stage_3 else "base_optimizer_state"] for shard in shards]
    states = [[state for _, state in sorted(own["state"].items())] for own in inner]
    moments = {key: [[state[key] for state in own] for own in states] for key in MOMENTS}
    if not is_stage_3:
        # The weights were saved without the padding at the end of the last rank's slice, the moments with it.
        moments = {key: [[m[: len(w)] for m, w in zip(*pair, strict=True)] for pair in zip(flat, weights, strict=True)]
                   for key, flat in moments.items()}
    return SavedState(
        _merge(folder, shards[0], weights), {key: _merge(folder, shards[0], flat) for key, flat in moments.items()},
        {key: value for key, value in states[0][0].items() if key not in MOMENTS},
        {key: value for key, value in inner[0]["param_groups"][0].items() if key == "step"},
    )


def _optimiser(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = load_shard(path)["optimizer_state_dict"]
    return found


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    from deepspeed.utils.zero_to_fp32 import natural_keys

    return sorted(folder.glob(pattern), key=lambda path: natural_keys(path.name))


def _merge(folder: Path, shard: Mapping[str, Any], flat: list[list[Tensor]]) -> dict[str, Any]:
    """flat: of each rank, the flat slices of its groups. DeepSpeed's script does it, saying on standard output what it does."""
    from deepspeed.utils import zero_to_fp32

    with contextlib.redirect_stdout(io.StringIO()):
        models = zero_to_fp32.parse_model_states([str(path) for path in _by_rank(folder, "*_model_states.pt")])
        if int(shard["zero_stage"]) == 3:
            return dict(zero_to_fp32._get_fp32_state_dict_from_zero3_checkpoint(len(flat), flat, models, True))
        paddings = shard.get("param_alignment_paddings")
        return dict(zero_to_fp32._get_fp32_state_dict_from_zero2_checkpoint(len(flat), flat, models, True, paddings))


def load(engine: Any, folder: Path) -> None:
    """Put weights and optimiser state into the slices of an engine that has taken no step; every rank calls it."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    saved = read(folder)
    optimiser = engine.optimizer
    assert isinstance(optimiser, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3)
    for group in optimiser.optimizer.param_groups:
        group |= saved.group
    trainable = {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    put = _put_stage_3 if isinstance(optimiser, DeepSpeedZeroOptimizer_Stage3) else _put_stage_1_or_2
    put(optimiser, trainable, saved)


def _adam_state(saved: SavedState, flat: Tensor) -> dict[str, Any]:
    """For a flat slice: moments that are zero still, and the scalars; fused AdamW counts its steps on the device."""
    scalars = {k: v.to(flat.device, copy=True) if isinstance(v, Tensor) else v for k, v in saved.scalars.items()}
    return {**scalars, **{key: torch.zeros_like(flat.data) for key in MOMENTS}}


def _put_stage_3(optimiser: Any, trainable: Mapping[str, nn.Parameter], saved: SavedState) -> None:
    """As a step does it: one sub-group after the other is there (read from NVMe, where it is kept), changed, and put back."""
    names = {parameter: name for name, parameter in trainable.items()}
    optimiser.checkpoint_event_prologue()
    for i, (parameters, flat) in enumerate(zip(optimiser.fp16_groups, optimiser.fp32_partitioned_groups_flat, strict=True)):
        is_swapped = optimiser._swappable_optimizer_subgroup(i)
        if is_swapped:
            optimiser._optimizer_states_and_gradient_swap_in(i)
        state = optimiser.optimizer.state[flat] = _adam_state(saved, flat)
        start = 0
        for parameter in parameters:
            length = parameter.partition_numel()
            own = slice(start, start + length)
            flat.data[own] = _slice_of_rank(saved.weights[names[parameter]], length)
            for key in MOMENTS:
                state[key][own] = _slice_of_rank(saved.moments[key][names[parameter]], length)
            start += length
        optimiser._reassign_or_swap_out_partitioned_parameters(i)
        if is_swapped:
            optimiser._optimizer_states_and_gradient_swap_out(i)
    optimiser.checkpoint_event_epilogue()


def _slice_of_rank(whole: Any, length: int) -> Tensor:
    """This rank's of equally long slices; the last ones end in padding."""
    flat: Tensor = whole.contiguous().flatten()
    own = flat[length * ranks.rank() : length * (ranks.rank() + 1)]
    return nn.functional.pad(own, (0, length - len(own)))


def _put_stage_1_or_2(optimiser: Any, trainable: Mapping[str, nn.Parameter], saved: SavedState) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    for flat in optimiser.single_partition_of_fp32_groups:
        optimiser.optimizer.state[flat] = _adam_state(saved, flat)
    optimiser._lazy_init_hp_params_optimizer_state()
    for name, parameter in trainable.items():
        weight = saved.weights[name].contiguous()
        parameter.data.copy_(weight)
        safe_set_full_fp32_param(parameter, weight)
        for key in MOMENTS:
            safe_set_full_optimizer_state(parameter, saved.moments[key][name].contiguous(), key)
