"""A checkpoint goes on with another number of ranks, under another ZeRO stage, or with its state on
NVMe.

DeepSpeed's shards are flat slices, whose layout depends on the first two. Here the fp32 weights and
Adam's moments are put together by parameter name from all ranks' shards, as DeepSpeed's own
zero_to_fp32 does for the weights, and each rank of the new engine takes its slices. Under ZeRO-3
with as many ranks as before each rank's own shard has them as they are. The frozen base is in no
checkpoint and takes no part. (DeepSpeed's universal checkpoint wants the same, but writes a second
copy on the disk first.) The shards are memory-mapped: a node reads them once, and holds one
parameter of each kind at a time.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.model.parameter_names import by_current_name, current_name
from ship_ds.runtime import ranks
from ship_ds.runtime.engine import Engine
from ship_ds.runtime.pickles import load_shard

FP32_WEIGHTS = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class SavedState:
    """Whole tensors by parameter name (or DeepSpeed's stand-ins, whole once `.contiguous()` is
    called), in fp32.

    moments: by kind, {} where every step so far was skipped. num_steps: Adam's.
    """

    weights: Mapping[str, Any]
    moments: Mapping[str, Mapping[str, Any]]
    num_steps: int


def layout(folder: Path) -> tuple[int, int]:
    """(ZeRO stage, number of ranks) of the DeepSpeed shards in `folder`."""
    shards = sorted(folder.glob("*_optim_states.pt"))
    return int(_optimiser(shards[0])["zero_stage"]), len(shards)


def was_bf16(folder: Path) -> bool:
    """Whether an engine in bf16 wrote the DeepSpeed shards in `folder`: it names them otherwise."""
    return any(folder.glob("bf16_*_optim_states.pt"))


def read(folder: Path) -> SavedState:
    """From DeepSpeed shards of any number of ranks; they have been verified against their
    manifest."""
    shards = [_optimiser(path) for path in _by_rank(folder, "*_optim_states.pt")]
    is_stage_3 = int(shards[0]["zero_stage"]) == 3
    weights = [
        shard["fp32_flat_groups" if is_stage_3 else "single_partition_of_fp32_groups"]
        for shard in shards
    ]
    inner = [
        shard["optimizer_state_dict" if is_stage_3 else "base_optimizer_state"] for shard in shards
    ]
    states = [[state for _, state in sorted(adam["state"].items())] for adam in inner]
    moments = {
        key: [[state[key] for state in of_rank] for of_rank in states]
        for key in MOMENTS
        if states[0]
    }
    if not is_stage_3:
        # The weights were saved without the padding at the end of the last rank's slice, the
        # moments with it.
        moments = {
            key: [
                [m[: len(w)] for m, w in zip(*pair, strict=True)]
                for pair in zip(flat, weights, strict=True)
            ]
            for key, flat in moments.items()
        }
    return SavedState(
        by_current_name(_merge(folder, shards[0], weights)),
        {key: by_current_name(_merge(folder, shards[0], flat)) for key, flat in moments.items()},
        _num_steps(inner[0]),
    )


def _num_steps(inner: Mapping[str, Any]) -> int:
    """The same for all parameters. torch's AdamW counts in a tensor, DeepSpeed's for the CPU in an
    int."""
    return int(next((state["step"] for state in inner["state"].values()), 0))


def _optimiser(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = load_shard(path)["optimizer_state_dict"]
    return state


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    from deepspeed.utils.zero_to_fp32 import natural_keys

    return sorted(folder.glob(pattern), key=lambda path: natural_keys(path.name))


def _merge(folder: Path, shard: Mapping[str, Any], flat: list[list[Tensor]]) -> dict[str, Any]:
    """flat: of each rank, the flat slices of its groups. DeepSpeed's script does it, with notices
    and bars that nobody needs."""
    from deepspeed.utils import zero_to_fp32

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        models = zero_to_fp32.parse_model_states(
            [str(path) for path in _by_rank(folder, "*_model_states.pt")]
        )
        # Private in DeepSpeed 0.19.8 (utils/zero_to_fp32.py): its public function reads the fp32
        # weights alone, and these take any flat vectors of the same layout, so the moments, too.
        if int(shard["zero_stage"]) == 3:
            return dict(
                zero_to_fp32._get_fp32_state_dict_from_zero3_checkpoint(
                    len(flat), flat, models, True
                )
            )
        paddings = shard.get("param_alignment_paddings")
        return dict(
            zero_to_fp32._get_fp32_state_dict_from_zero2_checkpoint(
                len(flat), flat, models, True, paddings
            )
        )


def load(engine: Engine[Any], folder: Path) -> None:
    """Put weights and optimiser state into the slices of an engine that has taken no step; every
    rank calls it."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimiser, trainable = engine.deepspeed.optimizer, engine.trainable()
    if isinstance(optimiser, DeepSpeedZeroOptimizer_Stage3):
        _put_stage_3(optimiser, source(optimiser, trainable, folder))
    else:
        assert isinstance(optimiser, DeepSpeedZeroOptimizer)
        _put_stage_1_or_2(optimiser, trainable, read(folder))


@dataclass(frozen=True)
class ShardOfRank:
    """What this rank of as many wrote under ZeRO-3, with the engine's parameters in its sub-groups
    and order.

    weights: a flat fp32 vector a sub-group. states: Adam's of each, its moments of the same
    lengths.
    """

    weights: Sequence[Tensor]
    states: Sequence[Mapping[str, Any]]
    num_steps: int

    def fill(self, kind: str, index: int, parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
        """Copy what this rank wrote of a sub-group.

        Args:
            kind: `FP32_WEIGHTS`, or the name of one of `MOMENTS`.
            index: of the sub-group.
            parameters: of the sub-group; not read, since the shard has their slices as they are.
            flat: takes the numbers; as long as the slices together.
        """
        flat.copy_(self.weights[index] if kind == FP32_WEIGHTS else self.states[index][kind])


@dataclass(frozen=True)
class WholeParameters:
    """Out of whole parameters, one after the other."""

    saved: SavedState
    names: Mapping[nn.Parameter, str]

    @property
    def num_steps(self) -> int:
        return self.saved.num_steps

    def fill(self, kind: str, index: int, parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
        """Copy this rank's slices of the whole parameters of a sub-group.

        Args:
            kind: `FP32_WEIGHTS`, or the name of one of `MOMENTS`.
            index: of the sub-group; not read, since the parameters say what is in it.
            parameters: of the sub-group, in the engine's order.
            flat: takes the numbers; as long as the slices together.
        """
        whole = self.saved.weights if kind == FP32_WEIGHTS else self.saved.moments[kind]
        start = 0
        for parameter in parameters:
            length = parameter.partition_numel()  # type: ignore[attr-defined]
            flat[start : start + length] = _slice_of_rank(whole[self.names[parameter]], length)
            start += length


def source(
    optimiser: Any, trainable: Mapping[str, nn.Parameter], folder: Path
) -> ShardOfRank | WholeParameters:
    """Where the slices of a ZeRO-3 optimiser come from: `fill` puts this rank's of one kind
    (`FP32_WEIGHTS` or a moment's name) of sub-group `index`, which `parameters` make up, into
    `flat`, a vector as long as their slices together.

    Args:
        optimiser: DeepSpeed's, of the engine that goes on.
        trainable: that engine's parameters, by name.
        folder: of DeepSpeed's shards.

    Returns:
        This rank's own shard, where as many ranks wrote it under ZeRO-3 in the same sub-groups;
        else the parameters put together out of all shards.
    """
    names = {parameter: name for name, parameter in trainable.items()}
    shards, models = (_by_rank(folder, f"*_{what}_states.pt") for what in ("optim", "model"))
    shard = _optimiser(shards[ranks.rank() % len(shards)])
    if len(shards) == ranks.world_size() and int(shard["zero_stage"]) == 3:
        written = [
            [(current_name(name), tuple(shape)) for name, shape in group.items()]
            for group in load_shard(models[0])["param_shapes"]
        ]
        if written == [
            [(names[p], tuple(p.ds_shape)) for p in group] for group in optimiser.fp16_groups
        ]:
            inner = shard["optimizer_state_dict"]
            states = [state for _, state in sorted(inner["state"].items())]
            return ShardOfRank(shard["fp32_flat_groups"], states, _num_steps(inner))
    return WholeParameters(read(folder), names)


def _slice_of_rank(whole: Any, length: int) -> Tensor:
    """This rank's of equally long slices; the last ones end in padding."""
    flat: Tensor = whole.contiguous().flatten()
    part = flat[length * ranks.rank() : length * (ranks.rank() + 1)]
    return nn.functional.pad(part, (0, length - len(part)))


def _put_stage_3(optimiser: Any, saved: ShardOfRank | WholeParameters) -> None:
    """As a step does it: one sub-group after the other is there (read from NVMe, where it is kept),
    changed, and put back."""
    # What a step of DeepSpeed 0.19.8 calls (runtime/zero/stage3.py); its names are private, so
    # pyproject.toml caps the version. The prologue shards what is still
    # gathered, which would else keep its old values.
    optimiser.checkpoint_event_prologue()
    for i, (parameters, flat) in enumerate(
        zip(optimiser.fp16_groups, optimiser.fp32_partitioned_groups_flat, strict=True)
    ):
        is_swapped = optimiser._swappable_optimizer_subgroup(i)
        if is_swapped:
            optimiser._optimizer_states_and_gradient_swap_in(i)
        saved.fill(FP32_WEIGHTS, i, parameters, flat.data)
        if saved.num_steps:
            state = optimiser.optimizer.state[flat] = _adam_state(optimiser, saved.num_steps, flat)
            for kind in MOMENTS:
                saved.fill(kind, i, parameters, state[kind])
        optimiser._reassign_or_swap_out_partitioned_parameters(i)
        if is_swapped:
            optimiser._optimizer_states_and_gradient_swap_out(i)
    optimiser.checkpoint_event_epilogue()


def _adam_state(optimiser: Any, num_steps: int, flat: Tensor) -> dict[str, Any]:
    """With moments that are zero still. Fused AdamW counts its steps on the device, DeepSpeed's
    Adam for the CPU in an int."""
    is_torchs = isinstance(optimiser.optimizer, torch.optim.Adam | torch.optim.AdamW)
    count = torch.tensor(float(num_steps), device=flat.device) if is_torchs else num_steps
    return {"step": count, **{kind: torch.zeros_like(flat.data) for kind in MOMENTS}}


def _put_stage_1_or_2(
    optimiser: Any, trainable: Mapping[str, nn.Parameter], saved: SavedState
) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if saved.num_steps:
        for flat in optimiser.single_partition_of_fp32_groups:
            optimiser.optimizer.state[flat] = _adam_state(optimiser, saved.num_steps, flat)
        # Private in DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py): it ties each parameter to its
        # place in the moments that have just been made, which a first step would do, too.
        optimiser._lazy_init_hp_params_optimizer_state()
    for name, parameter in trainable.items():
        weight = saved.weights[name].contiguous()
        parameter.data.copy_(weight)
        safe_set_full_fp32_param(parameter, weight)
        for kind, whole in saved.moments.items():
            safe_set_full_optimizer_state(parameter, whole[name].contiguous(), kind)
