"""A plan as text and as JSON."""

from typing import Any

from rich.console import Console
from rich.table import Table

from ship_ds.planner.plan import RESERVED, Change, Plan


def size(num_bytes: float) -> str:
    """In decimal units, as GPU memory and links are sold."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"


def verdict(plan: Plan, changes: list[Change]) -> str:
    """One line: fits or not, and what to change."""
    need, have = size(plan.needed), size(plan.machines.gpu_memory)
    if plan.fits:
        return f"fits: {need} of {have} on each of {plan.machines.num_ranks} GPUs"
    overrides = " ".join(
        override for change in changes for override in _last_of_each(changes, change)
    )
    if changes and changes[-1].plan.fits:
        needed = size(changes[-1].plan.needed)
        return f"does not fit: {need} of {have}; fits with {overrides} ({needed})"
    last = changes[-1].plan if changes else plan
    largest = max(last.memory, key=lambda name: last.memory[name])
    tried = f", nor with {overrides} ({size(last.needed)})" if overrides else ""
    return (
        f"does not fit: {need} of {have}{tried}; the largest term left is {largest} "
        f"({size(last.memory[largest])}): "
        "use more or larger GPUs, shorter texts or a smaller model"
    )


def _last_of_each(changes: list[Change], change: Change) -> tuple[str, ...]:
    """The overrides of `change` that no later change replaces."""
    later = {
        override.partition("=")[0]
        for other in changes[changes.index(change) + 1 :]
        for override in other.overrides
    }
    return tuple(
        override for override in change.overrides if override.partition("=")[0] not in later
    )


def as_json(plan: Plan, changes: list[Change]) -> dict[str, Any]:
    """Bytes throughout."""
    return {
        "fits": plan.fits,
        "verdict": verdict(plan, changes),
        "ranks": plan.machines.num_ranks,
        "needed": plan.needed,
        "gpu_memory": plan.machines.gpu_memory,
        "memory": plan.memory,
        "reserved": RESERVED,
        "host": plan.host,
        "traffic_per_step": plan.traffic.wire,
        "traffic_inside_node": plan.traffic.inside_node,
        "parameters": plan.parameters,
        "task_llm_is_sharded": plan.is_sharded,
        "largest_gathered": {"weight": plan.largest_gathered[0], "bytes": plan.largest_gathered[1]},
        "micro_batch": {
            "tasks": plan.work.tasks,
            "examples_per_task": plan.work.examples_per_task,
            "instruction_tokens": plan.work.instruction_tokens,
            "input_tokens": plan.work.input_tokens,
            "target_tokens": plan.work.target_tokens,
            "shown_examples": plan.work.shown_examples,
        },
        "changes": [list(change.overrides) for change in changes],
    }


def show(plan: Plan, changes: list[Change]) -> str:
    """The plan as text: what takes memory, what is sent, and the verdict."""
    console = Console(width=100, force_terminal=False, highlight=False)
    with console.capture() as captured:
        console.print(
            "parameters: "
            + ", ".join(f"{name} {count:,}" for name, count in plan.parameters.items())
        )
        console.print(_micro_batch(plan))
        console.print(
            _table(
                "on each GPU",
                {**plan.memory, "context, NCCL, fragments (assumed)": RESERVED},
                plan.needed,
            )
        )
        if plan.host:
            console.print(
                _table(
                    "beside each GPU, in the host's memory or on NVMe",
                    plan.host,
                    sum(plan.host.values()),
                )
            )
        console.print(_table("sent by each GPU in a step", plan.traffic.wire, plan.traffic.total))
        if plan.traffic.inside_node:
            console.print(f"inside a node (hpZ): {size(plan.traffic.inside_node)}")
        if plan.largest_gathered[1]:
            console.print(
                f"largest weight gathered at once: {plan.largest_gathered[0]}, "
                f"{size(plan.largest_gathered[1])}"
            )
        console.print(verdict(plan, changes), soft_wrap=True)
    return captured.get().rstrip()


def _micro_batch(plan: Plan) -> str:
    work = plan.work
    return (
        f"a micro-batch: {work.tasks} tasks x {work.examples_per_task} examples; at most "
        f"{work.instruction_tokens} tokens of "
        f"instruction, {work.input_tokens} of input, {work.target_tokens} of target; "
        f"{work.shown_examples} examples shown; "
        f"Task LLM {'sharded' if plan.is_sharded else 'whole on every GPU'}"
    )


def _table(title: str, rows: dict[str, int], total: int) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2))
    table.add_column(min_width=36)
    table.add_column(justify="right")
    for name, num_bytes in rows.items():
        if num_bytes:
            table.add_row(name, size(num_bytes))
    table.add_row("together", size(total))
    return table
