"""The planner's arithmetic for 8B and 70B on 8 to 1,024 GPUs, as the tables of docs/scaling.md.

Memory and bytes sent are counted; seconds are the forecast of planner/forecast.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ship_ds.config import load_config
from ship_ds.flops import PEAKS
from ship_ds.planner.plan import RESERVED, Machines, Plan, make_plan
from ship_ds.planner.public_shapes import with_shapes
from ship_ds.planner.show import size

RECIPES = {"lora-8b": "llama-3-8b", "lora-70b": "llama-3-70b"}
"""Recipe -> shape."""
GPUS = (8, 64, 1024)
TASKS = 4
"""Of a micro-batch, four examples each."""
GPU_MEMORY = 80 * 10**9
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Sharding:
    """How the weights lie on the ranks: a file of ds_configs/, and whether it shards the base."""

    name: str
    file: str
    shard_base: bool = False


SHARDINGS = (
    Sharding("ZeRO-2, all whole", "zero2_bf16"),
    Sharding("ZeRO-3, base whole", "zero3_bf16"),
    Sharding("ZeRO-3, all sharded", "zero3_bf16", shard_base=True),
    Sharding("ZeRO-3 with hpZ", "zero3_hpz", shard_base=True),
)


@lru_cache
def planned(recipe: str, num_ranks: int, sharding: Sharding) -> Plan:
    """The plan of a recipe on so many ranks, each with the same micro-batch.

    Args:
        recipe: of `RECIPES`.
        num_ranks: of the run; whole nodes of `GPUS_PER_NODE`.
        sharding: how the weights lie on them.
    """
    config = load_config(
        recipe,
        [
            f"training.deepspeed={sharding.file}",
            f"training.tasks_per_step={num_ranks * TASKS}",
            "training.accumulation=1",
            f"model.task_llm.shard={'always' if sharding.shard_base else 'never'}",
        ],
    )
    machines = Machines(num_ranks // GPUS_PER_NODE, GPUS_PER_NODE, GPU_MEMORY)
    return make_plan(with_shapes(config, RECIPES[recipe]), machines)


def scaling_tables() -> str:
    """Markdown."""
    return "\n\n".join(
        [
            "### Memory and traffic of one GPU",
            _markdown(_memory()),
            f"### A step of one of {GPUS[-1]:,} GPUs: forecast, not measured",
            _markdown(_steps()),
        ]
    )


def _memory() -> Iterator[tuple[str, ...]]:
    yield ("recipe", "GPUs", "way", "training", "evaluation", "fits 80 GB", "sent a step")
    for recipe in RECIPES:
        for num_ranks in GPUS:
            for sharding in SHARDINGS:
                plan = planned(recipe, num_ranks, sharding)
                yield (
                    recipe,
                    f"{num_ranks:,}",
                    sharding.name,
                    size(sum(plan.memory.values()) + RESERVED),
                    size(sum(plan.evaluating.values()) + RESERVED),
                    "yes" if plan.fits else "no",
                    size(plan.traffic.total),
                )


def _steps() -> Iterator[tuple[str, ...]]:
    yield ("recipe", "way", "computing", "sending", "launching", "share of an H100's peak")
    for recipe in RECIPES:
        for sharding in SHARDINGS:
            forecast = planned(recipe, GPUS[-1], sharding).forecast
            share = forecast.useful_flops / forecast.seconds / PEAKS["H100"]
            yield (
                recipe,
                sharding.name,
                f"{forecast.computing:.2f} s",
                f"{forecast.sending:.2f} s",
                f"{forecast.launching:.2f} s",
                f"{100 * share:.0f} %",
            )


def _markdown(rows: Iterator[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = [head, ("---",) * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
