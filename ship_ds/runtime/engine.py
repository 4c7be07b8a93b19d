"""The DeepSpeed engine: every number of the run's config enters its dict here, and nowhere else."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ship_ds.config import OptimiserConfig, TrainingConfig
from ship_ds.errors import UserError
from ship_ds.runtime import ranks

_CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
_OWNED_BY_RUN = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "scheduler", "optimizer",
}


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """A file of ds_configs/ by name, or any path. Raises UserError when it is neither or holds what the run's config owns."""
    path = Path(name) if name.endswith(".json") else _CONFIG_FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in _CONFIG_FOLDER.glob("*.json")))
        raise UserError(f"training.deepspeed: {name}: no such file; ds_configs/ has {known}")
    config: dict[str, Any] = json.loads(path.read_text())
    for key in sorted(_OWNED_BY_RUN & config.keys()):
        raise UserError(f"{path}: {key}: comes from the run's config (training and optimiser); remove it here")
    return config


def engine_dtype(training: TrainingConfig) -> torch.dtype:
    """The dtype that training.deepspeed makes of every floating-point parameter."""
    return torch.bfloat16 if read_deepspeed_config(training.deepspeed).get("bf16", {}).get("enabled") else torch.float32


def parts_per_step(training: TrainingConfig) -> int:
    """Micro-batches of a global step over all ranks; raises UserError when they do not divide its tasks."""
    parts = ranks.world_size() * training.accumulation
    if training.tasks_per_step % parts:
        raise UserError(
            f"training.tasks_per_step ({training.tasks_per_step}) must be a multiple of ranks x training.accumulation "
            f"({ranks.world_size()} x {training.accumulation}): change one of them"
        )
    return parts


def learning_rate(step: int, config: OptimiserConfig, num_steps: int) -> float:
    """Linear warm-up, then constant or a cosine to 2 % of the peak."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return config.lr * warm
    return config.lr * min(warm, 0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, step / num_steps))) / 2)


def build_engine(model: nn.Module, optimiser: OptimiserConfig, training: TrainingConfig) -> Any:
    import deepspeed

    config = read_deepspeed_config(training.deepspeed)
    # On a CPU, torch's fused AdamW: one pass over the flat partition where the plain one makes a dozen.
    on_cpu = not torch.cuda.is_available()
    micro = training.tasks_per_step // parts_per_step(training)
    config |= {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": training.accumulation,
        "train_batch_size": training.tasks_per_step,
        "gradient_clipping": optimiser.clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimiser.lr, "weight_decay": optimiser.weight_decay, "betas": [0.9, 0.98],
                "torch_adam": on_cpu, **({"fused": True} if on_cpu else {}),
            },
        },
        "steps_per_print": 10**9,
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
    return engine


def set_learning_rate(engine: Any, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def take_step(engine: Any) -> bool:
    """The optimiser's step. Where loss or gradients are not finite on any rank DeepSpeed skips it on all; True says so."""
    engine.step()
    return bool(engine.optimizer.overflow)


def gathered_state(engine: Any) -> dict[str, torch.Tensor]:
    """Every trainable parameter whole, on rank 0 alone (empty elsewhere), one gathered at a time."""
    import deepspeed

    state = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if ranks.rank() == 0:
                state[name] = parameter.detach().cpu().clone()
    return state
