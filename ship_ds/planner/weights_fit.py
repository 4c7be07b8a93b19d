"""Whether the weights of a run fit a machine at all, told before any of them is made.

    check_weights_fit(config, num_ranks=8, free=FreeMemory.here())

A CPU's kernel kills what takes more memory than there is, without a word. So what is certain to end
like that is refused: the sizes are exact (the same model on the meta device), and activations,
buffers and what the libraries take come on top. `ship-ds plan` counts these too.
"""

import os
from dataclasses import dataclass

import torch

from ship_ds.config import Config
from ship_ds.errors import UserError
from ship_ds.model.budget import host_bytes_free, ranks_on_node
from ship_ds.planner.plan import managed, shapes_of
from ship_ds.planner.shapes import Shapes
from ship_ds.planner.zero import Zero, held_by_a_rank
from ship_ds.runtime.deepspeed_config import read_deepspeed_config

_PASSING = ("communication buckets", "gathered layers")
"""Of what a rank holds, that which is made as it is needed and may stay smaller."""
_READ_IN_PLACE = "frozen weights"
"""On a CPU these may stay in their file, from which the kernel reads them again."""
_MADE_IN_FP32 = ("hypernetwork", "prior", "objectives")
"""Parts that are new: made whole on every rank, whatever they are cast to and sharded over."""


@dataclass(frozen=True)
class FreeMemory:
    """What one machine has free, in bytes.

    ranks: processes of the run that share `host`. gpu: of each rank's own card; None: the run
    computes on the CPU.
    """

    ranks: int
    host: int
    gpu: int | None

    @classmethod
    def here(cls) -> "FreeMemory":
        """Of the machine and the card that this process runs on."""
        gpu = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
        return cls(ranks_on_node(os.environ), host_bytes_free(), gpu)


def check_weights_fit(config: Config, num_ranks: int, free: FreeMemory) -> None:
    """Refuse a run whose weights, gradients and optimiser state alone are more than there is.

    Args:
        config: of the run.
        num_ranks: of the whole run.
        free: on the machine of this rank.

    Raises:
        UserError: they are, or the model cannot be put together.
    """
    shapes = shapes_of(config)
    zero = Zero.read(read_deepspeed_config(config.training.deepspeed), num_ranks, free.ranks)
    held = held_by_a_rank(zero, *managed(config, shapes, zero))
    device = {name: count for name, count in held.gpu.items() if name not in _PASSING}
    # The plan's host holds what lies on a local disk too.
    on_disk = "nvme" in (zero.optimiser_on, zero.parameters_on)
    on_host = 0 if on_disk else sum(held.host.values())
    if free.gpu is None:
        device.pop(_READ_IN_PLACE)
        on_host += sum(device.values())
    elif sum(device.values()) > free.gpu:
        raise UserError(_line("a GPU", sum(device.values()), free.gpu, shapes))
    on_host = free.ranks * max(on_host, _first_bytes(shapes))
    if on_host > free.host:
        raise UserError(_line(f"{free.ranks} rank(s) of this machine", on_host, free.host, shapes))


def _trained(shapes: Shapes) -> dict[str, int]:
    """Trained parameters of each part."""
    return {
        part: sum(weight.numel for weight in shapes.weights(part) if weight.is_trained)
        for part in shapes.parts
    }


def _first_bytes(shapes: Shapes) -> int:
    return 4 * sum(count for part, count in _trained(shapes).items() if part in _MADE_IN_FP32)


def _line(owner: str, needed: int, free: int, shapes: Shapes) -> str:
    trained = ", ".join(f"{part} {count:,}" for part, count in _trained(shapes).items() if count)
    return (
        f"model: {owner} would hold {needed / 1e9:.1f} GB of weights, gradients and optimiser "
        f"state, with {free / 1e9:.1f} GB free (trained parameters: {trained}): make "
        "model.latent_size or the largest part smaller, or see `ship-ds plan` for what spreads it"
    )
