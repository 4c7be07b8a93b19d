"""Ranks of a run: started by deepspeed, torchrun or srun, or a single process."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def start(threads: int | None) -> None:
    """Join the process group; a process started by none of the launchers is a group of one."""
    import deepspeed

    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(defaults)
    if threads is not None:
        torch.set_num_threads(threads)
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    values = values.clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
