"""Whether a machine can hold the weights of a run at all, told before any of them is made.

    check_weights_fit(config, num_ranks=8, memory=Memory.here(ranks=2))

A CPU's kernel kills what takes more memory than there is, without a word. So what is certain to end
like that is refused: the same model on the meta device says how many weights there are, and all
that may be smaller than planned, or that another program may give back, is left out.
"""

from dataclasses import dataclass

import torch

from ship_ds.config import Config
from ship_ds.console import log
from ship_ds.errors import UserError, first_line
from ship_ds.model.budget import host_bytes
from ship_ds.planner.plan import managed
from ship_ds.planner.shapes import Shapes, build_whole
from ship_ds.planner.zero import Zero, held_by_a_rank
from ship_ds.runtime.deepspeed_config import complete, read_deepspeed_config
from ship_ds.runtime.engine import engine_dtype

_IN_16_BITS = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
"""With these a file of the user's own has less optimiser state than the plan counts."""


@dataclass(frozen=True)
class Memory:
    """What one machine has, in bytes, whoever uses it now.

    ranks: processes of the run that share `host`. gpu: of each rank's own card; None: the run
    computes on the CPU.
    """

    ranks: int
    host: int
    gpu: int | None

    @classmethod
    def here(cls, ranks: int) -> "Memory":
        """Of the machine and the card that this process runs on."""
        gpu = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
        return cls(ranks, host_bytes(), gpu)


def check_weights_fit(config: Config, num_ranks: int, memory: Memory) -> None:
    """Refuse a run whose weights, gradients and optimiser state alone are more than there is.

    Args:
        config: of the run.
        num_ranks: of the whole run.
        memory: of the machine of this rank.

    Raises:
        UserError: they are, or the model cannot be put together.
    """
    try:
        shapes = build_whole(config.model, engine_dtype(config.training), config.loss)
    except UserError:
        raise
    except Exception as error:
        # A kind from outside that reads a value as it is made has none on the meta device, and
        # trains all the same.
        log(f"the weights' memory is not compared with the machine's: {first_line(error)}")
        return
    device, host = _least(config, num_ranks, memory, shapes)
    if memory.gpu is None:
        device, host = 0, device + host
    for owner, needed, there in (
        ("a GPU", device, memory.gpu or 0),
        (f"{memory.ranks} rank(s) of this machine", memory.ranks * host, memory.host),
    ):
        if needed > there:
            raise UserError(_line(owner, needed, there, shapes))


def _least(config: Config, num_ranks: int, memory: Memory, shapes: Shapes) -> tuple[int, int]:
    """Bytes that a rank holds on its device, and on the host beside it, at the very least."""
    settings = complete(read_deepspeed_config(config.training.deepspeed), memory.ranks)
    zero = Zero.read(settings, num_ranks, memory.ranks)
    held = held_by_a_rank(zero, *managed(config, shapes, zero))
    # Made as they are needed, and perhaps smaller.
    passing = {"communication buckets", "gathered layers"}
    if memory.gpu is None:
        # These may stay in their file, from which the kernel reads them again.
        passing.add("frozen weights")
    if zero.optimiser_on != "gpu":
        # Below stage 3 they leave the GPU bucket by bucket.
        passing.add("gradients")
    if any(settings["bf16"][key] for key in _IN_16_BITS):
        passing.add("optimiser state")
    # What is counted beside the device lies on a disk, if on any.
    is_on_disk = "nvme" in (zero.optimiser_on, zero.parameters_on)
    return (
        sum(count for name, count in held.gpu.items() if name not in passing),
        0 if is_on_disk else sum(count for name, count in held.host.items() if name not in passing),
    )


def _line(owner: str, needed: int, there: int, shapes: Shapes) -> str:
    trained = {
        part: sum(weight.numel for weight in shapes.weights(part) if weight.is_trained)
        for part in shapes.parts
    }
    parts = ", ".join(f"{part} {count:,}" for part, count in trained.items() if count)
    return (
        f"model: {owner} would hold {needed / 1e9:,.1f} GB or more of weights, gradients and "
        f"optimiser state, and there are {there / 1e9:,.1f} GB (trained parameters: {parts}): make "
        "model.latent_size or the largest part smaller, or take a file of ds_configs/ that shards "
        "more over more ranks"
    )
