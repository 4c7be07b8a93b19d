"""The files of ds_configs/: ZeRO and precision alone. Imports no torch."""

import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ship_ds.errors import UserError, did_you_mean
from ship_ds.parsing import read_json

# In a checkout a link to the folder at the top; in an installed package the files themselves.
CONFIGS_FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"
AUTO_CONFIGS = {f"zero{stage}_auto": (f"zero{stage}_bf16", f"zero{stage}") for stage in (1, 2, 3)}
"""What these names stand for: a file for devices that multiply in bf16, and one for others."""
_OWNED_BY_RUN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "scheduler",
    "optimizer",
)


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

_DEVICE = {"device": ("cpu", "none", "nvme"), "nvme_path": "/local_nvme"}
_FP32 = ("fp32", "float32", "float", "torch.float32")
_DTYPE = (
    *("bf16", "bfloat16", "torch.bfloat16"),
    *("fp16", "float16", "half", "torch.float16"),
    *_FP32,
)
_TRAVELS_AS = ("bf16", "fp16", "fp32")
_KNOWN: dict[str, Any] = {
    **_TOP,
    **dict.fromkeys(_OWNED_BY_RUN),
    "bf16": _BF16,
    "fp16": {
        "auto_cast": False,
        "consecutive_hysteresis": False,
        "enabled": False,
        "fp16_master_weights_and_grads": False,
        "hysteresis": 2,
        "initial_scale_power": 16,
        "loss_scale": 0.0,
        "loss_scale_window": 1000,
        "min_loss_scale": 1,
    },
    "data_types": {
        "buffer_dtype": _DTYPE,
        "grad_accum_dtype": _DTYPE,
        "keep_in_fp32_modules": [],
        "param_dtype": _DTYPE,
    },
    "zero_optimization": {
        **_ZERO,
        "compute_grad_norm": True,
        "enable_sanity_checks": False,
        "leaf_module": {"classes": [], "name_suffixes": [], "names": []},
        "log_trace_cache_warnings": False,
        "offload_optimizer": {
            **_OFFLOAD_OPTIMIZER,
            **_DEVICE,
            "cpuadam_cores_perc": 0.8,
            "super_offload": False,
        },
        "offload_param": {**_OFFLOAD_PARAM, **_DEVICE},
        "override_module_apply": True,
        "parameter_alignment": False,
        "pipeline_loading_checkpoint": False,
        "save_muon_momentum_buffer_in_memory": False,
        "stage": 2,
        "stage3_model_persistence_threshold": 1_000_000_000,
        "zenflow": {},
    },
    "aio": {
        "block_size": 1_048_576,
        "intra_op_parallelism": 1,
        "overlap_events": True,
        "queue_depth": 8,
        "single_submit": False,
        "use_gds": False,
    },
    "communication_data_type": _TRAVELS_AS,
    "data_parallel_size": 1,
    "dataloader_drop_last": False,
    "datastates_ckpt": None,
    "disable_allgather": False,
    "disable_python_gc": False,
    "dump_state": False,
    "gradient_allreduce_op": ("mean", "sum"),
    "log_level": None,
    "managed_gradient_accumulation": False,
    "memory_breakdown": False,
    "seq_parallel_communication_data_type": _TRAVELS_AS,
    "sequence_parallel_size": 1,
    "steps_per_print": None,
    "use_data_before_expert_parallelism": False,
    "vocabulary_size": 32_000,
    "activation_checkpointing": {},
    "autotuning": {},
    "checkpoint": {},
    "comet": {},
    "comms_logger": {},
    "compile": {},
    "csv_monitor": {},
    "data_efficiency": {},
    "expert_parallel": {},
    "flops_profiler": {},
    "hybrid_engine": {},
    "pipeline": {},
    "tensor_parallel": {},
    "tensorboard": {},
    "timers": {},
    "torch_autocast": {},
    "wandb": {},
    "weight_quantization": {},
}
"""What a file may hold. Of a setting: a value such as it takes, a tuple of all that it takes, or
None for anything; of a section: its settings, or {} where DeepSpeed alone knows them."""
_OLD = {
    "aio.thread_count": "aio.intra_op_parallelism",
    "bfloat16": '"bf16": {"enabled": true}',
    "zero_optimization.cpu_offload": 'zero_optimization.offload_optimizer: {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'zero_optimization.offload_param: {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "pin_memory in offload_param and "
    "offload_optimizer",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "zero_optimization."
    "stage3_gather_16bit_weights_on_model_save",
}
"""Names that DeepSpeed does not read, or turns into others that this package would not see."""
_MAY_BE_NULL = {
    *("aio", "bf16", "data_types", "zero_optimization"),
    *("buffer_dtype", "communication_data_type", "grad_accum_dtype", "param_dtype"),
    *("nvme_path", "offload_optimizer", "offload_param", "zenflow"),
}
_BOUNDS = {"cpuadam_cores_perc": (0, 1), "ratio": (0, 1), "reduce_bucket_size": (1, math.inf)}


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

    Raises:
        UserError: it is none, or holds fp16, the run's keys or what DeepSpeed has not.
    """
    name, _ = AUTO_CONFIGS.get(name, (name, ""))
    path = Path(name) if name.endswith(".json") else CONFIGS_FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CONFIGS_FOLDER.glob("*.json")))
        raise UserError(
            f"training.deepspeed: {name}: no such file; ds_configs/ has {known}; "
            f"{', '.join(AUTO_CONFIGS)} "
            "choose one by the machine"
        )
    config: dict[str, Any] = read_json(path)
    _check_form(path, config)
    for key in sorted(config.keys() & set(_OWNED_BY_RUN)):
        raise UserError(
            f"{path}: {key}: comes from the run's config (training and optimiser); remove it here"
        )
    if (config.get("fp16") or {}).get("enabled"):
        raise UserError(
            f"{path}: fp16: not supported, since its loss scale is in no checkpoint of "
            "ZeRO-3; use bf16, or neither"
        )
    _check_trainer_goes_on(path, config)
    _check_pairs(path, config)
    accumulated = (config.get("data_types") or {}).get("grad_accum_dtype")
    stage = (config.get("zero_optimization") or {}).get("stage")
    if stage not in (1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage: expected 1, 2 or 3, got {stage}")
    if is_bf16(config) and stage == 1 and accumulated in _FP32:
        raise UserError(
            f"{path}: data_types.grad_accum_dtype: {accumulated} beside bf16 and stage 1 is "
            "another optimiser of DeepSpeed, whose checkpoints go on nowhere else: use stage 2, or "
            "leave it out"
        )
    return config


def _check_pairs(path: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError for what DeepSpeed reads and refuses as the engine is made."""
    zero = config.get("zero_optimization") or {}
    # Stage 1 sums whole gradients and scatters none.
    scatters = zero.get("stage") != 1 and zero.get("reduce_scatter", _ZERO["reduce_scatter"])
    for key, default in (("gradient_predivide_factor", 1.0), ("prescale_gradients", False)):
        if scatters and config.get(key, default) != default:
            raise UserError(
                f"{path}: {key}: {json.dumps(config[key])}: DeepSpeed divides no gradients before "
                "it sums them where zero_optimization.reduce_scatter is true: take it out"
            )
    for key, library in _MONITORS.items():
        if (config.get(key) or {}).get("enabled") and importlib.util.find_spec(library) is None:
            raise UserError(
                f"{path}: {key}.enabled: the library {library} is not installed: install it, or "
                "take the section out"
            )


def _check_trainer_goes_on(path: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError for what DeepSpeed takes and this trainer cannot train, or resume, with."""
    for key, (works, reason) in _TRAINER_NEEDS.items():
        *sections, name = key.split(".")
        values: Mapping[str, Any] = config
        for section in sections:
            values = values.get(section) or {}
        # A null is a value: of datastates_ckpt it is one that turns it on.
        if name in values and values[name] not in works:
            raise UserError(f"{path}: {key}: {json.dumps(values[name])}: {reason}: take it out")


_NO_PARALLEL = "here every rank takes a share of a step's tasks"
_TRAINER_NEEDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "checkpoint.load_universal": (
        (False,),
        "a run goes on from DeepSpeed's plain checkpoints, also with other ranks, and finds no "
        "universal one",
    ),
    "checkpoint.writer": ((None,), "checkpoints are written by DeepSpeed's plain writer"),
    "data_efficiency.enabled": ((False,), "batches and tokens are chosen by the run's config"),
    "datastates_ckpt": ((False,), "checkpoints are written by DeepSpeed's plain writer"),
    "flops_profiler.enabled": ((False,), "training.profile says where the time of steps goes"),
    "expert_parallel.enabled": ((False,), _NO_PARALLEL),
    "gradient_allreduce_op": (
        ("mean",),
        "the loss is written for the mean over ranks; gradients and their norm would be so many "
        "times too large",
    ),
    "hybrid_engine.enabled": ((False,), "the trainer works with DeepSpeed's plain engine"),
    "managed_gradient_accumulation": (
        (True,),
        "the trainer says which micro-batch is a step's last, which DeepSpeed then refuses",
    ),
    "sequence_parallel_size": ((1,), _NO_PARALLEL),
    "tensor_parallel.autotp_size": ((0, 1), _NO_PARALLEL),
    "torch_autocast.enabled": (
        (False,),
        "adapters compute in the type of the weights; bf16.enabled makes these bf16",
    ),
    "zero_optimization.elastic_checkpoint": (
        (False,),
        "its checkpoints lack what a run goes on from; without it runs go on with other ranks, too",
    ),
    "zero_optimization.zenflow": (
        (None,),
        "the optimiser is torch's AdamW, which it does not take",
    ),
}
"""The values of a setting that the trainer works with, and what it needs."""
_MONITORS = {"comet": "comet_ml", "tensorboard": "tensorboard", "wandb": "wandb"}
_EXAMPLES = {
    "bf16": '{"enabled": true}',
    "data_types": '{"grad_accum_dtype": "fp32"}',
    "fp16": '{"enabled": false}',
    "offload_optimizer": '{"device": "cpu"}',
    "offload_param": '{"device": "cpu"}',
    "zero_optimization": '{"stage": 2}',
}


def _check_form(path: Path, config: Any) -> None:
    """Raise UserError for what could not be read below, and for what DeepSpeed would refuse with a
    traceback, or leave alone, once the ranks have started."""
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected an object of settings, such as ds_configs/zero2.json")
    for key, value in _leaves(config):
        if value == "auto":
            raise UserError(
                f'{path}: {key}: "auto" is filled in by transformers\' Trainer, not here: take the '
                "key out, or write a value"
            )
    _check_section(path, config, _KNOWN)


def _check_section(
    path: Path, values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = ""
) -> None:
    """Raise UserError for the first setting that DeepSpeed does not have, or has otherwise."""
    for name, value in values.items():
        key = prefix + name
        if key.startswith("_"):
            continue  # a comment, for which JSON has no form of its own
        if name not in known:
            raise UserError(f"{path}: {key}: {_instead(name, known, prefix)}")
        if value is None and name in _MAY_BE_NULL:
            continue
        if reason := _unlike(name, value, known[name]):
            raise UserError(f"{path}: {key}: {reason}")
        if isinstance(value, dict) and known[name]:
            _check_section(path, value, known[name], f"{key}.")


def _instead(name: str, known: Mapping[str, Any], prefix: str) -> str:
    """What there is in place of a setting that there is not."""
    if new := _OLD.get(prefix + name):
        return f"an old name, which is not read here: write {new}"
    places = [key for key in _names(_KNOWN) if key.split(".")[-1] == name]
    # One such as "enabled" is in many, and says nothing of where it should have been.
    hint = f"; did you mean {places[0]}?" if len(places) == 1 else did_you_mean(name, known)
    return "DeepSpeed has no such setting here" + (hint or ": take it out")


def _names(known: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The whole keys of settings and sections."""
    for name, value in known.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{name}.")


def _unlike(name: str, value: Any, known: Any) -> str | None:
    """What else was expected of a setting's value; None where DeepSpeed takes it."""
    if known is None or (name == "zero_hpz_partition_size" and value == "node"):
        return None
    if isinstance(known, dict):
        example = f", such as {_EXAMPLES[name]}" if name in _EXAMPLES else ""
        return None if isinstance(value, dict) else f"expected an object{example}"
    if isinstance(known, tuple):
        if isinstance(value, str) and (value.lower() if known is _TRAVELS_AS else value) in known:
            return None
        return f"{json.dumps(value)}: expected one of {', '.join(map(json.dumps, known))}"
    if _is_like(value, known, _BOUNDS.get(name, (0, math.inf))):
        return None
    if isinstance(known, bool):
        return f"expected true or false, got {json.dumps(value)}"
    if isinstance(known, list):
        return f"{json.dumps(value)}: expected a list of texts"
    return f"{json.dumps(value)}: expected a value such as {json.dumps(known)}"


_LARGEST = 2**63 - 1
"""Of a whole number that torch takes."""


def _is_like(value: Any, known: Any, bounds: tuple[float, float]) -> bool:
    """Whether a setting is of the type of an example; a whole number may be written 5e8."""
    if isinstance(known, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(known, bool)
    if isinstance(known, list):
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if isinstance(known, int | float):
        is_number = isinstance(value, int | float) and bounds[0] <= value <= bounds[1]
        if isinstance(known, int) and is_number and value > _LARGEST:
            return False
        # No bound of NaN holds, and infinity over 1 is none.
        return is_number and (
            value == value // 1 or (isinstance(known, float) and value < math.inf)
        )
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
