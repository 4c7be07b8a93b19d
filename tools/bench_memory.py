"""The plan against the measured peak: training, evaluation, report and decoding, on one rank and,
under ZeRO-2 and ZeRO-3, on two; writes tools/results/memory.json.

    python tools/bench_memory.py                  # about ten minutes on two cores
    python tools/bench_memory.py --only "embedded; zero2"    # these again, in today's report

Measured in fp32 on CPU ranks, each case in fresh processes: the bytes of every
tensor that is alive at a step's boundary, and the most that PyTorch's allocator hands out on top
while a step, a forward or a batch of evaluation runs, gloo's own copies left out. Planned: what
`ship-ds plan` says of the same case, without the memory that it reserves for CUDA. Batches are as
long as their limits, since that is what a plan counts with.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ship_ds.config import Config, load_config
from ship_ds.loss import sum_cross_entropy
from ship_ds.model.batch import TokenBatch
from ship_ds.monitor.machine import describe_machine, versions
from ship_ds.planner.activations import Workload, count_activations, planned_batch
from ship_ds.planner.evaluation import passes
from ship_ds.planner.plan import Machines, make_plan, shapes_of
from ship_ds.planner.shapes import Shapes
from ship_ds.runtime.deepspeed_config import read_deepspeed_config

RESULTS = Path(__file__).parent / "results" / "memory.json"
FORWARD, RUN = "ship_forward", "ship_run"
TASKS_OF_EVALUATION, ROWS_OF_TASK = 8, 5
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's shape (config.json of HuggingFaceTB/SmolLM2-135M); the weights are random."""
LORA_ROLES = (
    "model.encoder={tuning: {kind: lora, rank: 8}}",
    "model.decoder={tuning: {kind: lora, rank: 8}, max_examples: 1}",
    "model.task_llm.quantisation=none",
)
LENGTHS = (48, 96, 32)
"""Tokens of an instruction, an input and a target."""
RECOMPUTED = tuple(
    f"model.{role}.checkpointing=true" for role in ("encoder", "decoder", "task_llm")
)
CASES: dict[str, tuple[str, ...]] = {
    "embedded": (),
    "embedded, recomputed": RECOMPUTED,
    "smollm2": LORA_ROLES,
    "smollm2, recomputed": (*LORA_ROLES, *RECOMPUTED),
}
STAGES = {"zero2, 1 rank": 1, "zero2, 2 ranks": 2, "zero3_shard_all, 2 ranks": 2}
"""File of ds_configs/ and ranks. Two ranks only where a case says so, since they take longest."""
ON_TWO_RANKS = ("embedded", "smollm2, recomputed")


def stages_of(case: str) -> list[str]:
    """Under which a case runs."""
    return [name for name, ranks in STAGES.items() if ranks == 1 or case in ON_TWO_RANKS]


def file_of(stage: str) -> str:
    """Of ds_configs/."""
    return stage.partition(",")[0]


def settings(case: str, stage: str, folder: Path) -> Config:
    """Of a case: no evaluation of its own, four tasks of two examples a rank."""
    ranks = STAGES[stage]
    base = "embedded" if case.startswith("embedded") else str(folder / "smollm2")
    shard = "always" if file_of(stage) == "zero3_shard_all" else "never"
    return load_config(
        "quickstart-smoke",
        [
            f"run.folder={folder / 'run'}",
            f"training.deepspeed={with_small_bucket(stage, folder)}",
            f"training.tasks_per_step={4 * ranks}",
            "training.examples_per_task=2",
            "evaluation.max_new_tokens=32",
            *(f"model.{role}.base={base}" for role in ("encoder", "decoder", "task_llm")),
            *CASES[case],
            f"model.task_llm.shard={shard}",
        ],
    )


def with_small_bucket(stage: str, folder: Path) -> Path:
    """The shipped file with a bucket that does not dwarf these models: 16 MB instead of 2 GB."""
    values = read_deepspeed_config(file_of(stage))
    values["zero_optimization"]["reduce_bucket_size"] = 4_000_000
    file = folder / f"{file_of(stage)}.json"
    file.write_text(json.dumps(values))
    return file


def make_base(folder: Path) -> None:
    """A random model of SmolLM2's shape, with the embedded model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from ship_ds.config import base_folder

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_dict(SMOLLM2)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder("embedded")).save_pretrained(folder)


def storages(tensors: Iterable[Tensor]) -> int:
    """Bytes, each storage once."""
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(sizes.values())


def alive() -> int:
    """Bytes of all tensors that Python holds."""
    gc.collect()
    things = gc.get_objects()
    return storages(one for one in things if issubclass(type(one), Tensor) and not one.is_meta)


def allocated(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes beyond what was: when the range "forward" ends, and at most.

    What gloo allocates is not counted. It gathers into copies of its own (0.69 GB of SmolLM2's
    shape under ZeRO-3), where NCCL writes into the tensors that it is given; a plan is for GPUs.

    Args:
        run: what allocates; the range is optional.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
        torch.profiler.record_function(RUN),
    ):
        run()
    events = list(_with_children(profile.profiler.kineto_results.experimental_event_tree()))
    [own_thread] = {one.start_tid for one in events if one.name == RUN}
    ends = [one.end_time_ns for one in events if one.name == FORWARD]
    changes = _changes([one for one in events if one.name == "[memory]"], own_thread)
    at_end = sum(size for when, size in changes if ends and when <= ends[0])
    return at_end, max(accumulate(size for _, size in changes), default=0)


def _with_children(events: Iterable[Any]) -> Iterator[Any]:
    """Every event of the profiler's tree. Not by recursion: a chain may be longer than a stack."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        yield event


def _changes(events: Iterable[Any], own_thread: int) -> list[tuple[int, int]]:
    """When how many bytes were allocated, or with a minus released, by others than gloo: it works
    in threads of its own and in c10d's operations."""
    changes, of_gloo = [], set()
    for event in sorted(events, key=lambda one: int(one.start_time_ns)):
        place, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0 and (event.start_tid != own_thread or _is_within(event, "c10d::")):
            of_gloo.add(place)
        elif place in of_gloo:
            of_gloo.remove(place)
        else:
            changes.append((int(event.start_time_ns), int(size)))
    return changes


def _is_within(event: Any, operations: str) -> bool:
    """Whether an event is part of an operation whose name begins so."""
    while (event := event.parent) is not None:
        if event.name.startswith(operations):
            return True
    return False


def mark_forward(model: torch.nn.Module) -> None:
    """Let every forward of the model be a range of the profiler."""
    forward_range = torch.profiler.record_function(FORWARD)
    model.register_forward_pre_hook(lambda *_: forward_range.__enter__() and None)
    model.register_forward_hook(lambda *_: forward_range.__exit__(None, None, None))


def on_a_rank(case: str, stage: str, folder: Path) -> None:
    """Measure one case; rank 0 writes what it found."""
    from ship_ds.runtime import ranks
    from ship_ds.train import Trainer

    config = settings(case, stage, folder)
    trainer = Trainer(config)
    mark_forward(trainer.model)
    shapes = Shapes(config.model, torch.float32, trainer.model, frozenset())
    work = Workload.of(config, 4, LENGTHS)
    batch = planned_batch(shapes, work)
    counts = trainer.count([batch])
    for _ in range(2):
        trainer.losses_and_gradients([batch], counts)
        trainer.engine.step()
    held = alive()
    end, step = allocated(lambda: trainer.losses_and_gradients([batch], counts))
    trainer.engine.step()
    measured = {
        "at a step's boundary": held,
        "at the end of the forward": held + end,
        "training, at most": held + step,
    }
    if ranks.world_size() == 1:
        measured |= {
            name: held + allocated(run)[1]
            for name, run in evaluations(shapes, work, config).items()
        }
    if ranks.rank() == 0:
        (folder / "measured.json").write_text(json.dumps(measured))
    ranks.barrier()
    ranks.exit_process(0)


def evaluations(shapes: Shapes, work: Workload, config: Config) -> dict[str, Callable[[], Any]]:
    """What evaluation and report run, by the names of a plan: every answer of its full length."""
    ship, rows = shapes.ship, TASKS_OF_EVALUATION * ROWS_OF_TASK
    new_tokens = config.evaluation.max_new_tokens
    latents = torch.zeros(TASKS_OF_EVALUATION, config.model.latent_size)
    nothing_ends_it = -1

    def under_adapters() -> None:
        prompts = TokenBatch.of_lengths(rows, work.input_tokens, 0, device="cpu")
        adapter = ship.adapt(latents)
        ship.task_llm.generate(adapter, prompts, nothing_ends_it, new_tokens)

    def prompted() -> None:
        width = work.instruction_tokens + work.input_tokens
        prompts = TokenBatch.of_lengths(rows, width, 0, device="cpu")
        ship.task_llm.generate(None, prompts, nothing_ends_it, new_tokens)

    @torch.no_grad()
    def losses() -> None:
        batch = TokenBatch.of_lengths(rows, work.input_tokens, work.target_tokens, device="cpu")
        sum_cross_entropy(*ship.task_llm.score(ship.adapt(latents), batch, TASKS_OF_EVALUATION))

    ship.eval()
    return {
        "answers under adapters": under_adapters,
        "answers to prompts": prompted,
        "losses of examples": losses,
    }


def planned(case: str, stage: str, folder: Path) -> dict[str, int]:
    """The same by the plan."""
    config, ranks = settings(case, stage, folder), STAGES[stage]
    plan = make_plan(config, Machines(1, ranks, 10**12), LENGTHS)
    counted = count_activations(shapes_of(config), plan.work, stage.startswith("zero3"))
    during_a_step = counted.peak + plan.memory["working memory"] - counted.working
    held = sum(plan.memory.values()) - during_a_step
    # gathered weights stay from one step to the next only where a pass holds them
    boundary = held - plan.memory["gathered layers"]
    if stage.startswith("zero2"):
        boundary -= plan.memory["gradients"] + plan.memory["communication buckets"]
    figures = {
        "at a step's boundary": boundary,
        "at the end of the forward": boundary
        + plan.memory["gathered layers"]
        + counted.at_end_of_forward,
        "training, at most": sum(plan.memory.values()),
    }
    if ranks == 1:
        batches = passes(
            shapes_of(config), plan.work, config.evaluation, TASKS_OF_EVALUATION, ROWS_OF_TASK
        )
        figures |= {
            one.name: boundary + one.num_bytes for one in batches if one.name != "reconstruction"
        }
    return figures


def compare(case: str, stage: str, folder: Path, repeats: int) -> dict[str, Any]:
    """One row a figure: planned, measured (median), spread and error."""
    runs = [measure(case, stage, folder) for _ in range(repeats)]
    rows = {}
    for name, plan in planned(case, stage, folder).items():
        values = sorted(run[name] for run in runs)
        middle = values[len(values) // 2]
        rows[name] = {
            "planned": plan,
            "measured": middle,
            "measured_min_max": [values[0], values[-1]],
            "error_percent": error_percent(plan, middle),
        }
    return rows


def measure(case: str, stage: str, folder: Path) -> dict[str, int]:
    """In fresh processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [sys.executable, *launcher, str(STAGES[stage]), __file__]
    options = ["--case", case, "--stage", stage, "--folder", str(folder)]
    subprocess.run([*command, *options], check=True)
    measured: dict[str, int] = json.loads((folder / "measured.json").read_text())
    return measured


def error_percent(plan: int, measured: int) -> float:
    """Above zero where the plan says too much."""
    return round(100 * (plan / measured - 1), 1)


def main() -> None:
    """Measure every case under every stage, and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases; stages whose name begins so")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each, default 2")
    for hidden in ("--case", "--stage", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        return on_a_rank(args.case, args.stage, Path(args.folder))
    names = [f"{case}; {stage}" for case in CASES for stage in stages_of(case)]
    if not any(name.startswith(args.only) for name in names):
        parser.error(f"--only {args.only!r}: no case begins so; there are {' | '.join(names)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_base(folder / "smollm2")
        report = header(args.repeats)
        report["results"] = earlier(report) if args.only else {}
        for case in CASES:
            for stage in stages_of(case):
                name = f"{case}; {stage}"
                if name.startswith(args.only):
                    report["results"][name] = compare(case, stage, folder, args.repeats)
                    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
                    show(name, report["results"][name])


def header(repeats: int) -> dict[str, Any]:
    """What all results of a report have in common."""
    return {
        "command": "python tools/bench_memory.py",
        "machine": describe_machine(),
        "versions": versions(),
        "repeats": repeats,
        "tokens of instruction, input, target": list(LENGTHS),
    }


def earlier(report: dict[str, Any]) -> dict[str, Any]:
    """Results of the report that is there, if its header is the same: one day, one machine."""
    there = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"results": {}}
    results: dict[str, Any] = there.pop("results")
    return results if there == report else {}


def show(where: str, rows: dict[str, Any]) -> None:
    """A result's rows on the terminal."""
    for what, row in rows.items():
        print(
            f"{where:<45} {what:<26} {row['planned']:>14,} {row['measured']:>14,} "
            f"{row['error_percent']:>6} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
