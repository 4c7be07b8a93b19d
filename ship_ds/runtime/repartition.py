"""A checkpoint goes on with another number of ranks, or under another ZeRO stage.

DeepSpeed's shards are flat slices, whose layout depends on both. Here the fp32 weights and Adam's moments are put together
by parameter name from all ranks' shards, as DeepSpeed's own zero_to_fp32 does for the weights, and each rank of the new
engine takes its slices. The frozen base is in no checkpoint and takes no part. (DeepSpeed's universal checkpoint wants the
same, but writes a second copy on the disk first.) The shards are memory-mapped: a node reads them once, and holds one
parameter of each kind at a time.

Not with optimiser state on NVMe, whose slices are files of the old ranks.
"""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.errors import UserError
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
    """Put weights and optimiser state into the engine's own slices; every rank calls it."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    saved = read(folder)
    optimiser = engine.optimizer
    if getattr(optimiser, "swap_optimizer", False) or getattr(optimiser, "params_in_nvme_and_cpu", False):
        raise UserError(
            "training.deepspeed: a checkpoint of another number of ranks or ZeRO stage cannot be taken into NVMe; go on with "
            "zero3_offload_cpu or as many ranks as before"
        )
    assert isinstance(optimiser, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3)
    is_stage_3 = isinstance(optimiser, DeepSpeedZeroOptimizer_Stage3)
    flats = optimiser.fp32_partitioned_groups_flat if is_stage_3 else optimiser.single_partition_of_fp32_groups
    for flat in flats:
        moments = {key: torch.zeros_like(flat.data) for key in MOMENTS}
        optimiser.optimizer.state[flat] = {**{k: _copy(v, flat.device) for k, v in saved.scalars.items()}, **moments}
    for group in optimiser.optimizer.param_groups:
        group |= saved.group
    put = _put_stage_3 if is_stage_3 else _put_stage_1_or_2
    if not is_stage_3:
        optimiser._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            put(parameter, saved.weights[name].contiguous(), {key: saved.moments[key][name].contiguous() for key in MOMENTS})


def _copy(value: Any, device: torch.device) -> Any:
    """Fused AdamW counts its steps on the device."""
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def _put_stage_3(parameter: nn.Parameter, weight: Tensor, moments: Mapping[str, Tensor]) -> None:
    import deepspeed
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if ranks.rank() == 0:
            parameter.data.copy_(weight)
    length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]

    # Slices are of equal length, so the last one ends in padding.
    def mine(whole: Tensor) -> Tensor:
        padded = nn.functional.pad(whole.flatten(), (0, length * ranks.world_size() - whole.numel()))
        return padded[length * ranks.rank() : length * (ranks.rank() + 1)]

    safe_set_local_fp32_param(parameter, mine(weight))
    for key, value in moments.items():
        safe_set_local_optimizer_state(parameter, mine(value), key)


def _put_stage_1_or_2(parameter: nn.Parameter, weight: Tensor, moments: Mapping[str, Tensor]) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    parameter.data.copy_(weight)
    safe_set_full_fp32_param(parameter, weight)
    for key, value in moments.items():
        safe_set_full_optimizer_state(parameter, value, key)
