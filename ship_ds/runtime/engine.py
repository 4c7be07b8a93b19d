"""The DeepSpeed engine: every number of the run's config enters its dict here, and nowhere else."""

import math
from typing import Any

import torch
from torch import nn

from ship_ds.config import OptimiserConfig, TrainingConfig
from ship_ds.runtime import ranks
from ship_ds.runtime.deepspeed_config import offloads_optimiser, read_deepspeed_config
from ship_ds.runtime.preflight import check_division


def engine_dtype(training: TrainingConfig) -> torch.dtype:
    """The dtype that training.deepspeed makes of every floating-point parameter."""
    return (
        torch.bfloat16
        if read_deepspeed_config(training.deepspeed).get("bf16", {}).get("enabled")
        else torch.float32
    )


def parts_per_step(training: TrainingConfig) -> int:
    """Micro-batches of a global step over all ranks; raises UserError when they do not divide its
    tasks."""
    check_division(training.tasks_per_step, ranks.world_size(), training.accumulation)
    return ranks.world_size() * training.accumulation


def learning_rate(step: int, config: OptimiserConfig, num_steps: int, spent: float = 0.0) -> float:
    """Linear warm-up, then constant or a cosine to 2 % of the peak, at the last step or when the
    time is spent (spent = 1)."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return config.lr * warm
    done = min(1.0, max(step / num_steps, spent))
    return config.lr * min(warm, 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


def build_engine(model: nn.Module, optimiser: OptimiserConfig, training: TrainingConfig) -> Any:
    """The DeepSpeed engine around a model, under the run's batches, optimiser and ds_configs."""
    import deepspeed

    from ship_ds.runtime import shards

    config = read_deepspeed_config(training.deepspeed)
    # torch's fused AdamW: one pass over the flat partition, and nothing to compile with nvcc. State
    # that a GPU offloads is DeepSpeed's own op's.
    fused = not (torch.cuda.is_available() and offloads_optimiser(config))
    micro = training.tasks_per_step // parts_per_step(training)
    config |= {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": training.accumulation,
        "train_batch_size": training.tasks_per_step,
        "gradient_clipping": optimiser.clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimiser.lr,
                "weight_decay": optimiser.weight_decay,
                "betas": list(optimiser.betas),
                "torch_adam": fused,
                **({"fused": True} if fused else {}),
            },
        },
        "steps_per_print": 10**9,
    }
    shards.cast_and_move_rest(model, engine_dtype(training))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
    return engine


def set_learning_rate(engine: Any, value: float) -> None:
    """Set it for every parameter."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def take_step(engine: Any) -> bool:
    """The optimiser's step. Where loss or gradients are not finite on any rank DeepSpeed skips it
    on all; True says so."""
    engine.step()
    return bool(engine.optimizer.overflow)


def gathered_state(engine: Any) -> dict[str, torch.Tensor]:
    """Every trainable parameter whole, on rank 0 alone (empty elsewhere), one gathered at a
    time."""
    import deepspeed

    state = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if ranks.rank() == 0:
                state[name] = parameter.detach().cpu().clone()
    return state
