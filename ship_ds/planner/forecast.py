"""How long a step may take: a forecast, with what it assumes in words.

Nothing here was measured on the machines that are planned for. The rate of computing and the cost
of a kernel's launch are SHIP's own on one H100 (docs/gpu.md); bandwidths are what links are sold
with.

Letters: T tasks, Z latent size.
"""

from dataclasses import dataclass

import torch

from ship_ds.flops import flops_of_parts
from ship_ds.model.ship import ShipModel
from ship_ds.model.sizes import step_rows
from ship_ds.planner.activations import Workload, planned_batch
from ship_ds.planner.shapes import Shapes
from ship_ds.planner.zero import Traffic

RATE = 217e12
"""Useful FLOPs a second: the recipe lora-8b in NF4, 16,349 tokens a micro-step, all recomputed,
Task LLM and decoder in two passes, on one H100 (docs/gpu.md)."""
BETWEEN_NODES, INSIDE_NODE = 50e9, 300e9
"""Bytes a second of one GPU's links: an InfiniBand NDR port; about two thirds of an H100's
NVLink."""
KERNELS_A_BLOCK = 230
"""Launched for one block of one role in forward and backward: assumed, of the size that a count
of dispatched operations on the CPU gave; a recomputed block launches its forward again."""
ROLES_OF_ONE_PASS = 1.5
"""How many roles' kernels a pass over the tokens of Task LLM and decoder launches: 19,049 beside
22,969 operations, the encoder's included, counted on the CPU (docs/gpu.md)."""
LAUNCH_SECONDS = 70e-6
"""Of the host, for each kernel and all the Python around it: 1.55 to 2.03 s for 22,080 of lora-8b
with 4,079 tokens in two passes, where the GPU waits for the host (docs/gpu.md). Every block was
recomputed, which launches more than those: without checkpointing this is too much."""


@dataclass(frozen=True)
class Forecast:
    """Seconds of one optimiser step, by what could take longest; the step takes the longest of
    them, if sending and launching hide behind computing."""

    useful_flops: int
    kernels: int
    computing: float
    sending: float
    launching: float
    between_nodes: bool

    @property
    def seconds(self) -> float:
        """Of a step."""
        return max(self.computing, self.sending, self.launching)

    def in_words(self) -> str:
        """The forecast with its assumptions."""
        bandwidth, where = (
            (BETWEEN_NODES, "between nodes") if self.between_nodes else (INSIDE_NODE, "in a node")
        )
        return (
            f"forecast for H100s, not measured: {self.seconds:.2f} s a step with texts at their "
            f"limits, the longest of computing {self.computing:.2f} s "
            f"({self.useful_flops / 1e12:,.0f} TFLOP at {RATE / 1e12:.0f} TFLOP/s, SHIP's rate on "
            f"one H100 with 16,000 tokens at once), sending {self.sending:.2f} s (at "
            f"{bandwidth / 1e9:.0f} GB/s a GPU {where}) and launching {self.launching:.2f} s "
            f"(about {self.kernels:,} kernels at {LAUNCH_SECONDS * 1e6:.0f} microseconds); it "
            "assumes that they overlap, and shorter texts compute less and launch as much"
        )


def forecast(
    shapes: Shapes,
    work: Workload,
    traffic: Traffic,
    micro_steps: int,
    num_nodes: int,
    is_zero3: bool = False,
) -> Forecast:
    """Of an optimiser step.

    Args:
        shapes: of the model.
        work: a micro-batch of one rank.
        traffic: of one rank in a step.
        micro_steps: micro-batches of a step.
        num_nodes: on more than one, everything sent crosses the slower links.
        is_zero3: trained weights are sharded (`ShipModel.reads_together`).
    """
    size = shapes.ship.flop_size()
    parts = flops_of_parts(size, step_rows(planned_batch(shapes, work), size.encoder))
    useful = sum(parts.values()) * micro_steps
    kernels = round(_blocks_read(shapes.ship, is_zero3) * KERNELS_A_BLOCK * micro_steps)
    between = num_nodes > 1
    sending = traffic.total / (BETWEEN_NODES if between else INSIDE_NODE)
    sending += traffic.inside_node / INSIDE_NODE
    return Forecast(useful, kernels, useful / RATE, sending, kernels * LAUNCH_SECONDS, between)


def _blocks_read(ship: ShipModel, is_zero3: bool) -> float:
    """In a micro-step, by as many roles' kernels as they launch."""
    encoder, task_llm, decoder = (
        len(role.language_model.blocks()) for role in (ship.encoder, ship.task_llm, ship.decoder)
    )
    latent_TZ = torch.zeros(1, ship.config.latent_size)
    if not is_zero3 and ship.reads_together(ship.adapt(latent_TZ)):
        return encoder + ROLES_OF_ONE_PASS * task_llm
    return encoder + task_llm + decoder
