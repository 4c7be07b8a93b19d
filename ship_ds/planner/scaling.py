"""The planner's arithmetic for 7B and 70B on 8 to 1,024 GPUs, as the tables of docs/scaling.md.

Time is a bound, not a forecast: multiplications of the frozen language models at a sustained rate,
nothing else. The bandwidth at which sending takes as long as computing follows from it; below it a
step waits for the network.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ship_ds.config import Config, load_config
from ship_ds.planner.plan import Machines, Plan, plan_under, shapes_of
from ship_ds.planner.public_shapes import PUBLIC_SHAPES, with_shapes
from ship_ds.planner.show import size
from ship_ds.planner.zero import Zero
from ship_ds.runtime.deepspeed_config import read_deepspeed_config

MODELS = ("llama-2-7b", "llama-2-70b")
GPUS = (8, 64, 256, 1024)
TASKS = (1, 4, 16)
"""Tasks of a micro-batch, one example each."""
GPU_MEMORY = 80 * 10**9
SUSTAINED = 400e12
"""Multiply-adds count as two: about 40 % of an H100's dense bf16 peak (989e12)."""
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Sharding:
    """How the weights lie on the ranks."""

    name: str
    stage: int
    shard_task_llm: bool
    hpz: bool = False


SHARDINGS = (
    Sharding("ZeRO-3, all sharded", 3, True),
    Sharding("ZeRO-3 with hpZ", 3, True, True),
    Sharding("ZeRO-3, Task LLM whole", 3, False),
    Sharding("ZeRO-2, all whole", 2, False),
)


@dataclass(frozen=True)
class Row:
    """A line of the table: a plan, and the seconds that a step computes."""

    model: str
    sharding: Sharding
    plan: Plan
    seconds: float

    @property
    def critical_bandwidth(self) -> float:
        """Bytes a second and GPU at which a step's sending takes as long as its computing."""
        return self.plan.traffic.total / self.seconds


def recipe(model: str, num_ranks: int, tasks: int, sharding: Sharding) -> Config:
    """The published recipe, its latent as wide as the base asks for."""
    hidden = PUBLIC_SHAPES[model]["hidden_size"]
    config = load_config(
        "pretrain-7b",
        [
            f"model.latent_size={10 * hidden}",
            f"training.tasks_per_step={num_ranks * tasks}",
            f"model.task_llm.shard={'always' if sharding.shard_task_llm else 'never'}",
        ],
    )
    return with_shapes(config, model)


def row(model: str, num_ranks: int, tasks: int, sharding: Sharding) -> Row:
    """Plan one model on so many ranks under one way to shard."""
    config = recipe(model, num_ranks, tasks, sharding)
    zero = Zero.read(read_deepspeed_config(config.training.deepspeed), num_ranks)
    zero = replace(zero, stage=sharding.stage, hpz_ranks=GPUS_PER_NODE if sharding.hpz else 1)
    plan = plan_under(zero, config, Machines(num_ranks // GPUS_PER_NODE, GPUS_PER_NODE, GPU_MEMORY))
    return Row(model, sharding, plan, compute_seconds(config, plan))


def compute_seconds(config: Config, plan: Plan) -> float:
    """Forward and the gradients of inputs; a third pass where the Task LLM is recomputed. Weights'
    gradients are left out."""
    shapes = shapes_of(config)
    tokens = plan.work.tokens(shapes)
    passes = {
        "encoder": 2,
        "decoder": 2,
        "task LLM": 3 if config.model.task_llm.checkpointing else 2,
    }
    weights = {
        part: sum(weight.numel for weight in shapes.weights(part) if weight.is_nf4)
        for part in passes
    }
    return sum(2 * passes[part] * weights[part] * tokens[part] for part in passes) / SUSTAINED


def tables() -> str:
    """Markdown."""
    return "\n\n".join(
        [
            "### Memory and traffic of one GPU, one task a micro-batch",
            _markdown(_by_gpus()),
            "### The bandwidth below which a step waits, on 1,024 GPUs",
            _markdown(_by_tasks()),
        ]
    )


def _by_gpus() -> Iterator[tuple[str, ...]]:
    yield ("model", "GPUs", "way", "needs", "fits 80 GB", "sent a step", "waits below")
    for model in MODELS:
        for num_ranks in GPUS:
            for sharding in SHARDINGS:
                planned = row(model, num_ranks, 1, sharding)
                yield (
                    model,
                    f"{num_ranks:,}",
                    sharding.name,
                    size(planned.plan.needed),
                    "yes" if planned.plan.fits else "no",
                    size(planned.plan.traffic.total),
                    f"{size(planned.critical_bandwidth)}/s",
                )


def _by_tasks() -> Iterator[tuple[str, ...]]:
    yield ("model", "way", *(f"{tasks} task{'s' if tasks > 1 else ''}" for tasks in TASKS))
    for model in MODELS:
        for sharding in SHARDINGS:
            # what is sent is the same however many tasks there are
            one = row(model, GPUS[-1], 1, sharding).critical_bandwidth
            yield (model, sharding.name, *(f"{size(one / tasks)}/s" for tasks in TASKS))


def _markdown(rows: Iterator[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = [head, ("---",) * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
