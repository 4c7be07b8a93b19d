"""What the planner says that ZeRO holds and sends against two gloo ranks; writes
tools/results/planner.json.

    python tools/bench_planner.py         # about four minutes on two cores

Measured: under each stage, after two steps, the bytes of every tensor alive in a rank, told apart
by what they are, and what a rank's links carry in the third step. Peaks: tools/bench_memory.py.
"""

import argparse
import gc
import inspect
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ship_ds.config import Config, load_config
from ship_ds.monitor.machine import describe_machine, versions
from ship_ds.planner.plan import Machines, make_plan

RESULTS = Path(__file__).parent / "results" / "planner.json"
_SHORT = {"short reuse": 1_000_000, "short reuse, one base for all": 100_000}
"""Stages in which not all that is gathered stays until its next use -> how far that may be off, in
elements."""
STAGES = ("zero1", "zero2", "zero3", "zero3_bf16", "zero3_shard_all", *_SHORT)
_ONE_BASE = [
    "model.backbone=shared",
    *(f"model.{role}.quantisation=nf4" for role in ("encoder", "decoder")),
    *(f"model.{role}.tuning={{kind: lora, rank: 4}}" for role in ("encoder", "decoder")),
]
_SENT = {
    "all_gather_into_tensor": ("output_tensor", 1),
    "reduce_scatter_tensor": ("input", 1),
    "all_reduce": ("tensor", 2),
}
"""Which argument of a collective is the whole, and how often a ring moves it."""


def stage_config(stage: str, folder: Path) -> Config:
    name = stage
    if stage in _SHORT:
        name = str(folder / "short_reuse.json")
        zero = {
            "stage": 3,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 1_000_000,
            "stage3_max_reuse_distance": _SHORT[stage],
            "stage3_prefetch_bucket_size": 0,
        }
        Path(name).write_text(
            json.dumps({"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False})
        )
    shard = "always" if stage in ("zero3_shard_all", *_SHORT) else "never"
    return load_config(
        "quickstart-smoke",
        [
            f"run.folder={folder / 'run'}",
            "evaluation.every_steps=0",
            f"training.deepspeed={name}",
            f"model.task_llm.shard={shard}",
            *(_ONE_BASE if "one base" in stage else ()),
        ],
    )


def num_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(storages.values())


def alive(trainer: Any) -> dict[str, int]:
    """Bytes by the planner's names."""
    gc.collect()
    tensors = [
        thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and not thing.is_meta
    ]
    total = num_bytes(tensors)
    parameters = [*trainer.model.parameters(), *trainer.model.task_llm.parameters()]
    shards = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    buckets = [
        tensor
        for tensor in tensors
        if tensor.numel() == trainer.engine.deepspeed.optimizer.reduce_bucket_size
    ]
    states = trainer.engine.deepspeed.optimizer.optimizer.state
    flat = [
        tensor
        for state in states.values()
        for tensor in state.values()
        if torch.is_tensor(tensor) and tensor.dim()
    ]
    nf4 = [p for p in parameters if getattr(p, "quant_state", None) is not None]
    scales = [
        t
        for p in nf4
        for t in (
            p.quant_state.absmax,
            p.quant_state.code,
            p.quant_state.offset,
            p.quant_state.state2.absmax,
            p.quant_state.state2.code,
        )
    ]
    return {
        "trained weights": num_bytes(
            [p for p in parameters if p.requires_grad]
            + [
                s
                for s, p in zip(
                    shards, [p for p in parameters if hasattr(p, "ds_tensor")], strict=True
                )
                if p.requires_grad
            ]
        ),
        "4-bit weights": num_bytes([getattr(p, "ds_tensor", p) for p in nf4] + nf4),
        "quantisation scales": num_bytes(scales),
        "optimiser state": num_bytes([*flat, *states]),
        "communication buckets": num_bytes(buckets),
        "all at a step boundary": total,
    }


def watch_collectives(sent: Counter[str]) -> None:
    """Count what a rank's links carry: (N - 1) / N of the whole, twice for an all-reduce."""
    for name, (argument, times) in _SENT.items():
        setattr(dist, name, _counted(getattr(dist, name), argument, times, sent))


def _counted(
    real: Callable[..., Any], argument: str, times: int, sent: Counter[str]
) -> Callable[..., Any]:
    signature = inspect.signature(real)

    def counted(*args: Any, **kwargs: Any) -> Any:
        whole = signature.bind(*args, **kwargs).arguments[argument]
        if whole.numel() > 4096:  # the trainer's own sums are smaller
            ring = (dist.get_world_size() - 1) / dist.get_world_size()
            sent["sent"] += int(times * whole.numel() * whole.element_size() * ring)
        return real(*args, **kwargs)

    return counted


def on_a_rank(stage: str, folder: Path) -> None:
    from ship_ds.runtime import ranks
    from ship_ds.train import Trainer

    sent: Counter[str] = Counter()
    watch_collectives(sent)
    trainer = Trainer(stage_config(stage, folder))
    for _ in range(2):
        trainer.take_step()
    sent.clear()
    trainer.take_step()
    found = ranks.gather_objects({**alive(trainer), **sent})
    if ranks.rank() == 0:
        (folder / "measured.json").write_text(json.dumps(found[0]))
    ranks.exit_process(0)


def planned(stage: str, folder: Path) -> dict[str, int]:
    """At a step boundary nothing is gathered but under ZeRO-3, the first stages' buckets come with
    the backward pass."""
    plan = make_plan(stage_config(stage, folder), Machines(1, 2, 10**12))
    names = (
        "trained weights",
        "4-bit weights",
        "quantisation scales",
        "optimiser state",
        "communication buckets",
    )
    found = {name: plan.memory[name] for name in names}
    if stage in ("zero1", "zero2"):
        found["communication buckets"] = 0
    boundary = sum(found.values()) + plan.memory["frozen weights"]
    if stage not in ("zero1", "zero2"):
        boundary += plan.memory["gradients"]
    return {**found, "all at a step boundary": boundary, "sent": plan.traffic.total}


def compare_stage(stage: str, folder: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
    ]
    subprocess.run([*command, "--stage", stage, "--folder", str(folder)], check=True)
    return table(planned(stage, folder), json.loads((folder / "measured.json").read_text()))


def table(plan: dict[str, int], measured: dict[str, int]) -> dict[str, Any]:
    pairs = {name: (value, measured.get(name, 0)) for name, value in plan.items()}
    return {
        name: {"planned": a, "measured": b, "error_percent": error(a, b)}
        for name, (a, b) in pairs.items()
    }


def error(plan: int, measured: int) -> float | None:
    return round(100 * (plan / measured - 1), 1) if measured else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        return on_a_rank(args.stage, Path(args.folder))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stages = {stage: compare_stage(stage, folder) for stage in STAGES}
    report = {
        "command": "python tools/bench_planner.py",
        "ranks": "two, gloo",
        "machine": describe_machine(),
        "versions": versions(),
        "stages": stages,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    for where, rows in stages.items():
        for what, row in rows.items():
            print(
                f"{where:<22} {what:<24} {row['planned']:>14,} {row['measured']:>14,} "
                f"{row['error_percent']} %"
            )


if __name__ == "__main__":
    main()
