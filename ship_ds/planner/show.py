"""A plan as text and as JSON."""

from dataclasses import asdict
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
    when = ", while it evaluates" if plan.evaluation_needs_most else ""
    if plan.fits:
        return f"fits: {need} of {have} on each of {plan.machines.num_ranks} GPUs{when}"
    overrides = " ".join(
        override for change in changes for override in _last_of_each(changes, change)
    )
    if changes and changes[-1].plan.fits:
        needed = size(changes[-1].plan.needed)
        return f"does not fit: {need} of {have}{when}; fits with {overrides} ({needed})"
    last = changes[-1].plan if changes else plan
    terms = last.evaluating if last.evaluation_needs_most else last.memory
    largest = max(terms, key=lambda name: terms[name])
    tried = f", nor with {overrides} ({size(last.needed)})" if overrides else ""
    return (
        f"does not fit: {need} of {have}{when}{tried}; the largest term left is {largest} "
        f"({size(terms[largest])}): "
        "use more or larger GPUs, shorter texts or a smaller model"
    )


LARGE_HYPERNETWORK = 5 * 10**8
"""Weights from which a hypernetwork is pointed out: 6 GB of optimiser state."""


def warnings_of(plan: Plan) -> list[str]:
    """What fits, perhaps, and is hardly meant."""
    weights = plan.parameters["hypernetwork"]
    if weights < LARGE_HYPERNETWORK:
        return []
    heads = getattr(plan.config.model.hypernetwork, "heads", None)
    way_out = (
        "; model.hypernetwork.heads=per_module shares them between layers"
        if heads == "per_layer"
        else "; a smaller model.hypernetwork.width has fewer"
    )
    return [
        f"the hypernetwork alone has {weights / 1e9:.1f} billion weights, all of them trained: "
        f"{size(12 * weights)} of optimiser state over all ranks{way_out}"
    ]


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
        "evaluating": plan.evaluating,
        "evaluation_passes": [asdict(one) for one in plan.passes],
        "rows_answered_at_once": plan.rows_at_once,
        "reserved": RESERVED,
        "host": plan.host,
        "traffic_per_step": plan.traffic.wire,
        "traffic_inside_node": plan.traffic.inside_node,
        "forecast": {**asdict(plan.forecast), "seconds": plan.forecast.seconds},
        "warnings": warnings_of(plan),
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


def plan_text(plan: Plan, changes: list[Change]) -> str:
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
                "on each GPU, while it trains",
                {**plan.memory, "context, NCCL, fragments (assumed)": RESERVED},
                sum(plan.memory.values()) + RESERVED,
            )
        )
        if plan.evaluating:
            console.print(
                _table(
                    "on each GPU, while it evaluates or reports",
                    {**plan.evaluating, "context, NCCL, fragments (assumed)": RESERVED},
                    sum(plan.evaluating.values()) + RESERVED,
                )
            )
            console.print(f"rows answered at once: {plan.rows_at_once:,}, as the memory allows")
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
        console.print(plan.forecast.in_words())
        for warning in warnings_of(plan):
            console.print(f"warning: {warning}")
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
