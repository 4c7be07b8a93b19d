"""Checkpoints of runs whose state is on NVMe: the same files as those of any other run.

DeepSpeed 0.19 copies its swap files beside shards that hold no weights, and on loading forgets that
there were any moments (the next step is a first one of Adam's). So nothing but a resume on as many
ranks could read such a checkpoint, and that not exactly. Here the swap files are mapped into memory
while DeepSpeed writes its shards, and `repartition` reads those.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def map_swap_files(engine: Any) -> Iterator[None]:
    """At a step boundary, for `engine.save_checkpoint`: the optimiser's tensors that are swapped
    out are there to be read, page by page from their files, and DeepSpeed makes no copy of
    these."""
    swapper = getattr(engine.optimizer, "optimizer_swapper", None)
    if swapper is None:
        yield
        return
    swapped_out: list[tuple[torch.Tensor, torch.Tensor]] = []
    # `save_checkpoint` (DeepSpeed 0.19.8, runtime/engine.py) asks it before it copies swap files.
    # An attribute of the instance hides the method until it is deleted below.
    engine.zero_nvme_offload_optimizer = lambda: False
    try:
        for info in swapper.swap_params_info.values():
            for tensor, path in zip(info.get_compute_tensors(), info.get_swap_paths(), strict=True):
                swapped_out.append((tensor, tensor.data))
                # shared, or the kernel would count every page as memory that may be asked for
                tensor.data = torch.from_file(
                    path, shared=True, size=info.numel(), dtype=info.dtype()
                )
        yield
    finally:
        del engine.zero_nvme_offload_optimizer
        for tensor, data in swapped_out:
            tensor.data = data
