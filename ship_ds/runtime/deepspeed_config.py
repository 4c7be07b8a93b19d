"""The files of ds_configs/: ZeRO and precision alone. Imports no torch."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ship_ds.errors import UserError
from ship_ds.parsing import read_json

# In a checkout a link to the folder at the top; in an installed package the files themselves.
FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"
AUTO = {f"zero{stage}_auto": (f"zero{stage}_bf16", f"zero{stage}") for stage in (1, 2, 3)}
"""What these names stand for: a file for devices that multiply in bf16, and one for others."""
_OWNED_BY_RUN = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "scheduler",
    "optimizer",
}


_ZERO = {
    "allgather_bucket_size": 500_000_000,
    "allgather_partitions": True,
    "contiguous_gradients": True,
    "elastic_checkpoint": False,
    "ignore_unused_parameters": True,
    "load_from_fp32_weights": True,
    "overlap_comm": False,
    "reduce_bucket_size": 500_000_000,
    "reduce_scatter": True,
    "round_robin_gradients": False,
    "use_multi_rank_bucket_allreduce": True,
    # Of stage 3, and without effect below it.
    "leaf_module": {"classes": []},
    "memory_efficient_linear": True,
    "stage3_allgather_sequential": False,
    "stage3_gather_16bit_weights_on_model_save": False,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_module_granularity_threshold": 0,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_use_all_reduce_for_fetch_params": False,
    "sub_group_size": 1_000_000_000,
    "zero_hpz_partition_size": 1,
    "zero_quantized_gradients": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_weights": False,
}
_OFFLOAD_PARAM = {
    "buffer_count": 5,
    "buffer_size": 100_000_000,
    "max_in_cpu": 1_000_000_000,
    "pin_memory": True,
}
_OFFLOAD_OPTIMIZER = {
    "buffer_count": 4,
    "fast_init": False,
    "pin_memory": True,
    "pipeline_read": False,
    "pipeline_write": False,
    "ratio": 1.0,
}
_BF16 = {
    "bf16_master_weights_and_grads": False,
    "bf16_optimizer_states": False,
    "check_grad_overflow": True,
    "enabled": False,
    "immediate_grad_update": False,
}
_TOP = {
    "gradient_predivide_factor": 1.0,
    "prescale_gradients": False,
    "wall_clock_breakdown": False,
    "zero_allow_untested_optimizer": False,
    "zero_force_ds_cpu_optimizer": False,
}


def complete(config: Mapping[str, Any], ranks_per_node: int = 1) -> dict[str, Any]:
    """A file's settings with everything that DeepSpeed would else choose by its version.

    Between 0.17 and 0.19 gradient clipping, the check for overflow in bf16 and pinned memory got
    other defaults, and a run that goes on under another version would train otherwise.

    Args:
        config: of `read_deepspeed_config`.
        ranks_per_node: what `"zero_hpz_partition_size": "node"` stands for.
    """
    zero = dict(config.get("zero_optimization") or {})
    zero = _ZERO | zero
    if zero.get("zero_hpz_partition_size") == "node":
        zero["zero_hpz_partition_size"] = ranks_per_node
    for part, defaults in (
        ("offload_param", _OFFLOAD_PARAM),
        ("offload_optimizer", _OFFLOAD_OPTIMIZER),
    ):
        if offload := offloads(config)[part]:
            zero[part] = defaults | offload
    accumulated = {"grad_accum_dtype": "bf16" if is_bf16(config) else "fp32"}
    return (
        _TOP
        | dict(config)
        | {
            "bf16": _BF16 | (config.get("bf16") or {}),
            "data_types": accumulated | (config.get("data_types") or {}),
            "zero_optimization": zero,
        }
    )


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """A file of ds_configs/ by name, or any path; of a name of AUTO, the one for bf16.

    Raises UserError when it is none, or holds fp16 or the run's keys."""
    name, _ = AUTO.get(name, (name, ""))
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.json")))
        raise UserError(
            f"training.deepspeed: {name}: no such file; ds_configs/ has {known}; {', '.join(AUTO)} "
            "choose one by the machine"
        )
    config: dict[str, Any] = read_json(path)
    _check_form(path, config)
    for key in sorted(_OWNED_BY_RUN & config.keys()):
        raise UserError(
            f"{path}: {key}: comes from the run's config (training and optimiser); remove it here"
        )
    if (config.get("fp16") or {}).get("enabled"):
        raise UserError(
            f"{path}: fp16: not supported, since its loss scale is in no checkpoint of "
            "ZeRO-3; use bf16, or neither"
        )
    accumulated = (config.get("data_types") or {}).get("grad_accum_dtype")
    stage = (config.get("zero_optimization") or {}).get("stage")
    if stage not in (1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage: expected 1, 2 or 3, got {stage}")
    if is_bf16(config) and stage == 1 and accumulated == "fp32":
        raise UserError(
            f"{path}: data_types.grad_accum_dtype: fp32 beside bf16 and stage 1 is another "
            "optimiser of DeepSpeed, whose checkpoints go on nowhere else: use stage 2, or leave "
            "it out"
        )
    return config


_SECTIONS = {
    "bf16": '{"enabled": true}',
    "data_types": '{"grad_accum_dtype": "fp32"}',
    "fp16": '{"enabled": false}',
    "zero_optimization": '{"stage": 2}',
}


def _check_form(path: Path, config: Any) -> None:
    """Raise UserError for what could not be read below: DeepSpeed itself may take it."""
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected an object of settings, such as ds_configs/zero2.json")
    for section, example in _SECTIONS.items():
        if not isinstance(config.get(section) or {}, dict):
            raise UserError(f"{path}: {section}: expected an object, such as {example}")
    for key, value in _leaves(config):
        if value == "auto":
            raise UserError(
                f'{path}: {key}: "auto" is filled in by transformers\' Trainer, not here: take the '
                "key out, or write a value"
            )
    _check_zero(path, config.get("zero_optimization") or {})
    if not isinstance((config.get("bf16") or {}).get("enabled", False), bool):
        raise UserError(f"{path}: bf16.enabled: expected true or false")


def _check_zero(path: Path, zero: Mapping[str, Any]) -> None:
    """Raise UserError for a value of another type than DeepSpeed's own."""
    for key, known in (*_ZERO.items(), ("stage", 2)):
        is_node = key == "zero_hpz_partition_size" and zero.get(key) == "node"
        if key in zero and not is_node and not _is_like(zero[key], known):
            raise UserError(
                f"{path}: zero_optimization.{key}: {json.dumps(zero[key])}: expected a value such "
                f"as {json.dumps(known)}"
            )
    for part in ("offload_param", "offload_optimizer"):
        if not isinstance(zero.get(part) or {}, dict):
            raise UserError(
                f'{path}: zero_optimization.{part}: expected an object, such as {{"device": "cpu"}}'
            )


def _is_like(value: Any, known: Any) -> bool:
    """Whether a setting is of the type of its default; a whole number may be written 5e8."""
    if isinstance(known, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(known, bool)
    if isinstance(known, int):
        return isinstance(value, int | float) and value == value // 1 and value >= 0
    return isinstance(value, type(known))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_bf16(config: Mapping[str, Any]) -> bool:
    """Whether the engine makes every floating-point parameter bf16; else they are fp32."""
    return bool((config.get("bf16") or {}).get("enabled"))


def offloads(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the file says of `offload_param` and `offload_optimizer`; {} where it says nothing or
    null."""
    zero = config.get("zero_optimization") or {}
    return {part: zero.get(part) or {} for part in ("offload_param", "offload_optimizer")}


def offloads_optimiser(config: Mapping[str, Any]) -> bool:
    """Whether the optimiser state is kept off the GPU."""
    return bool(offloads(config)["offload_optimizer"].get("device", "none") != "none")


def offloads_to_nvme(config: Mapping[str, Any]) -> bool:
    """Whether anything is kept on NVMe disks."""
    return any(offload.get("device") == "nvme" for offload in offloads(config).values())
