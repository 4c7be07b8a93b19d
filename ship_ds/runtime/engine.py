"""The DeepSpeed engine: every number of the run's config enters its dict here, and nowhere else."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch
from pydantic import ValidationError
from torch import nn

from ship_ds.config import OptimiserConfig, TrainingConfig
from ship_ds.errors import UserError, first_line
from ship_ds.runtime import nvme, ranks, shards
from ship_ds.runtime.deepspeed_config import (
    complete,
    is_bf16,
    offloads_optimiser,
    read_deepspeed_config,
)
from ship_ds.runtime.gradient_norm import take_norms_at_once
from ship_ds.runtime.preflight import check_division
from ship_ds.section import first_error

Module = TypeVar("Module", bound=nn.Module)


def engine_dtype(training: TrainingConfig) -> torch.dtype:
    """The dtype that training.deepspeed makes of every floating-point parameter."""
    config = read_deepspeed_config(training.deepspeed)
    return torch.bfloat16 if is_bf16(config) else torch.float32


def parts_per_step(training: TrainingConfig) -> int:
    """Micro-batches of a global step over all ranks; raises UserError when they do not divide its
    tasks."""
    check_division(training.tasks_per_step, ranks.world_size(), training.accumulation)
    return ranks.world_size() * training.accumulation


def check_deepspeed_reads(optimiser: OptimiserConfig, training: TrainingConfig) -> None:
    """Have DeepSpeed read the file, for sections and pairs of settings that `read_deepspeed_config`
    knows nothing of.

    Raises:
        UserError: DeepSpeed refuses it; with DeepSpeed's words.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    settings = _settings(optimiser, training, [])
    try:
        DeepSpeedConfig(settings)
    except ValidationError as error:
        reason = f"{error.title}: {first_error(error).line}"
    # What it raises by itself and, for a section of another form, Python.
    except (DeepSpeedConfigError, ValueError, AssertionError, TypeError, AttributeError) as error:
        reason = first_line(error)
    else:
        return
    raise _refused(training, reason)


def _refused(training: TrainingConfig, reason: str) -> UserError:
    return UserError(
        f"training.deepspeed: {training.deepspeed}: DeepSpeed refuses it: {reason}: change "
        "that, or take it out"
    )


def _is_raised_in(error: Exception, package: ModuleType) -> bool:
    """Whether a package itself raised it, and nothing that it called."""
    place = Path(extract_tb(error.__traceback__)[-1].filename)
    return place.is_relative_to(Path(package.__path__[0]))


def learning_rate(step: int, config: OptimiserConfig, num_steps: int, spent: float = 0.0) -> float:
    """The lower one of a linear warm-up and of the schedule: constant, or a cosine from the first
    step to 2 % of the peak, at the last step or when the time is spent (spent = 1).

    Args:
        step: from 0.
        config: peak, warm-up and schedule.
        num_steps: of the training.
        spent: share of its time that is gone; 0 where time does not bound it.
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return config.lr * warm
    return config.lr * min(warm, cosine(min(1.0, max(step / num_steps, spent))))


def highest_rate(config: OptimiserConfig, num_steps: int) -> float:
    """The highest learning rate of a run, where its time does not end it before its steps."""
    # From the end of warm-up on none is higher.
    steps = range(min(num_steps, config.warmup_steps + 1))
    return max(learning_rate(step, config, num_steps) for step in steps)


def cosine(done: float) -> float:
    """From 1 at the start (done = 0) to 0.02 at the end (done = 1)."""
    return 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2


class Engine(Generic[Module]):
    """DeepSpeed's engine around a module, with what training needs of it and types.

    Attributes:
        module: The module that is trained, its parameters cast, moved and perhaps sharded.
        deepspeed: DeepSpeed's own engine, untyped. Read by the rest of `runtime/` alone.
    """

    def __init__(
        self,
        module: Module,
        optimiser: OptimiserConfig,
        training: TrainingConfig,
        pretrained: Collection[str] = (),
    ) -> None:
        """Shard, cast and move the module in place, and make its optimiser.

        Args:
            module: whole, or with parameters that shards.sharder has sharded already.
            optimiser: the settings of AdamW.
            training: batches and the file of ds_configs/.
            pretrained: names of the trainable parameters that learn at `pretrained_lr`, where the
                optimiser has one.

        Raises:
            UserError: the micro-batches do not divide the step's tasks, or DeepSpeed cannot do here
                what the file says.
        """
        import deepspeed
        from deepspeed.utils import nvtx

        if not torch.cuda.is_available():
            # Ranges for NVIDIA's profiler: ZeRO-3 opens hundreds a step, 3 % of it on a CPU.
            nvtx.enable_nvtx = False
        # DeepSpeed leaves these alone where it finds any parameter sharded before.
        shards.cast_and_move_rest(module, engine_dtype(training))
        parameter_groups = groups(module, optimiser, pretrained)
        self._shares_of_lr = [group["lr"] / optimiser.lr for group in parameter_groups]
        settings = _settings(optimiser, training, shards.whole_modules(module))
        try:
            self.deepspeed: Any = deepspeed.initialize(
                model=module, model_parameters=parameter_groups, config=settings
            )[0]
        # Pairs of settings that its optimisers do not have. A fault of ours, and one of a library
        # below, keeps its trace.
        except (AssertionError, ValueError, NotImplementedError) as error:
            if not _is_raised_in(error, deepspeed):
                raise
            raise _refused(training, first_line(error)) from error
        if self.zero_stage() == 3:
            shards.reduce_by_parameter(self.deepspeed.optimizer)
            shards.keep_signatures(module)
        else:
            take_norms_at_once(self.deepspeed.optimizer)
        self.module = module

    def train(self) -> None:
        """Turn dropout on."""
        self.deepspeed.train()

    def forward(self, *inputs: object, is_last: bool) -> Any:
        """What the module returns for a micro-batch.

        Args:
            inputs: of the module.
            is_last: of the step's micro-batches; the ranks average gradients after it.
        """
        # Before the forward pass: ZeRO-3 plans its gathers and reductions by it.
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        return self.deepspeed(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add to the gradients; DeepSpeed averages them over micro-batches and ranks."""
        self.deepspeed.backward(loss)

    def step(self) -> bool:
        """Take the optimiser's step; whether it was skipped, the same on all ranks.

        DeepSpeed skips it on all where loss or gradients are not finite on any.
        """
        self.deepspeed.step()
        return bool(self.deepspeed.optimizer.overflow)

    def set_learning_rate(self, value: float) -> None:
        """Set it: `lr`, and what `pretrained_lr` is of it for what was pretrained."""
        groups = self.deepspeed.optimizer.param_groups
        for group, share in zip(groups, self._shares_of_lr, strict=True):
            group["lr"] = value * share

    def gradient_norm(self) -> float:
        """Of the last step before clipping; NaN where DeepSpeed knows none."""
        norm = self.deepspeed.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def zero_stage(self) -> int:
        """0 to 3."""
        return int(self.deepspeed.zero_optimization_stage())

    def is_bf16(self) -> bool:
        """Whether the weights that are multiplied with are bf16; else they are fp32."""
        return bool(self.deepspeed.bfloat16_enabled())

    def trainable(self) -> dict[str, nn.Parameter]:
        """By name; under ZeRO-3 each is this rank's share."""
        named = self.module.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def gathered_state(self) -> dict[str, torch.Tensor]:
        """Every trainable parameter whole, on rank 0 alone (empty elsewhere), one gathered at a
        time. Every rank calls it."""
        import deepspeed

        state = {}
        for name, parameter in self.trainable().items():
            is_sharded = hasattr(parameter, "ds_id")
            with deepspeed.zero.GatheredParameters([parameter], enabled=is_sharded):
                if ranks.rank() == 0:
                    state[name] = parameter.detach().cpu().clone()
        return state

    def save_shards(self, folder: Path, name: str) -> None:
        """Write every rank's shards of trainable parameters and optimiser to FOLDER/NAME."""
        with nvme.map_swap_files(self.deepspeed):
            self.deepspeed.save_checkpoint(
                str(folder), tag=name, save_latest=False, exclude_frozen_parameters=True
            )

    def load_shards(self, folder: Path, name: str) -> None:
        """Read what as many ranks under the same ZeRO stage, 1 or 2, wrote with `save_shards`."""
        # Not strict, since the frozen base is not saved; checkpoint.py has compared the names.
        self.deepspeed.load_checkpoint(str(folder), tag=name, load_module_strict=False)


def groups(
    module: nn.Module, optimiser: OptimiserConfig, pretrained: Collection[str]
) -> list[dict[str, Any]]:
    """The trainable parameters as torch's optimisers take groups: one, as in 0.1.0, unless there
    are two rates.

    Args:
        module: whose parameters train.
        optimiser: its rates.
        pretrained: names of the parameters that take `pretrained_lr`.
    """
    named = [(name, one) for name, one in module.named_parameters() if one.requires_grad]
    if optimiser.pretrained_lr is None:
        return [{"params": [one for _, one in named], "lr": optimiser.lr}]
    return [
        {"params": [one for name, one in named if (name in pretrained) == is_pretrained], "lr": lr}
        for is_pretrained, lr in ((False, optimiser.lr), (True, optimiser.pretrained_lr))
    ]


def _settings(
    optimiser: OptimiserConfig, training: TrainingConfig, whole_modules: Sequence[str]
) -> dict[str, Any]:
    """The file of ds_configs/ with the run's batches and optimiser, and nothing left open."""
    config = complete(read_deepspeed_config(training.deepspeed), ranks.ranks_per_node())
    # The file's own classes come first, for a model whose blocks have no name in transformers.
    leaves = config["zero_optimization"]["leaf_module"]
    config["zero_optimization"]["leaf_module"] = leaves | {
        "classes": [*leaves.get("classes", ()), *whole_modules]
    }
    # torch's fused AdamW: one pass over the flat partition, and nothing to compile with nvcc. State
    # that a GPU offloads is DeepSpeed's own op's.
    fused = not (torch.cuda.is_available() and offloads_optimiser(config))
    adam = {
        "lr": optimiser.lr,
        "weight_decay": optimiser.weight_decay,
        "betas": list(optimiser.betas),
        "eps": 1e-8,
        "torch_adam": fused,
        **({"fused": True} if fused else {}),
    }
    return config | {
        "train_micro_batch_size_per_gpu": training.tasks_per_step // parts_per_step(training),
        "gradient_accumulation_steps": training.accumulation,
        "train_batch_size": training.tasks_per_step,
        "gradient_clipping": optimiser.clip,
        "optimizer": {"type": "AdamW", "params": adam},
        # Never: the monitor logs every step.
        "steps_per_print": 10**9,
    }
