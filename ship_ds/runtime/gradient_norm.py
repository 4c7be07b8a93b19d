"""The norm of all gradients, and whether they are finite, in a few kernels.

Between a backward pass and the optimiser's step DeepSpeed 0.19.8 goes through the parameters one by
one: ten kernels ask each gradient whether it is finite, five make its norm. LoRAs have hundreds of
small parameters: the engine's step of SHIP with 30 Llama blocks in each role (SmolLM2's number)
launched 13,213 kernels, and launches 58 now (docs/gpu.md). Where a GPU is quicker than its host can
launch, kernels are what a step costs.

The norm alone says both: a gradient that is not finite makes it so, and DeepSpeed from 0.19.8 on
skips a step by it too. An earlier one would take the step, so pyproject.toml excludes it.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def take_norms_at_once(optimiser: Any) -> None:
    """Let ZeRO-1 or 2 make the norm of all its gradients at once, and ask it alone whether they are
    finite.

    Args:
        optimiser: DeepSpeed's, in place. One that offloads is left as it is: it makes the norms
            while gradients move. (runtime/zero/stage_1_and_2.py, whose names are private.)
    """
    if optimiser.cpu_offload or not optimiser.compute_grad_norm:
        return
    optimiser.get_grad_norm_direct = partial(_norm, optimiser)
    optimiser.check_overflow = _leave_to_the_norm


def _norm(
    optimiser: Any, gradients: Iterable[Tensor], params: object, norm_type: int = 2
) -> Tensor:
    """Over all ranks, in fp32; -1 where it is not finite, as DeepSpeed's own says it.

    gradients: of this rank's partition. params: those they are of, whose kinds (pipelined, split
    over a tensor-parallel group) do not occur here.
    """
    import deepspeed.comm as dist

    assert norm_type == 2
    real = [one for one in gradients if not getattr(one, "_zero_padding", False)]
    total = torch.zeros((), device=optimiser.device)
    if real:
        norms = torch._foreach_norm(real, 2, dtype=torch.float64)
        total = torch.stack(norms).to(optimiser.device).square().sum().float()
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=optimiser.dp_process_group)
    total = total.sqrt()
    return torch.where(torch.isfinite(total), total, -1.0)


def _leave_to_the_norm(partition_gradients: bool = True) -> None:
    """In place of a look at each gradient."""
