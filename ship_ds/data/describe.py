"""What a file or folder of tasks holds, for `ship-ds data`."""

from pathlib import Path
from typing import Any

from ship_ds.data.filters import FilterConfig, apply_filters
from ship_ds.data.readers import detect_format, read_tasks

NUM_SAMPLES = 3
_WIDTH = 100


def describe(
    path: Path, format: str = "auto", filters: FilterConfig | None = None
) -> dict[str, Any]:
    """Counts before the filters, what the filters leave out by reason and what then stays, and
    three tasks with an example."""
    tasks = read_tasks(path, format)
    kept, filtered = apply_filters(tasks, filters or FilterConfig())
    picked = tasks[:: max(1, len(tasks) // NUM_SAMPLES)][:NUM_SAMPLES]
    return {
        "format": detect_format(path) if format == "auto" else format,
        "tasks": len(tasks),
        "examples": sum(len(task.examples) for task in tasks),
        "families": len({task.family for task in tasks if task.family}),
        "filtered": filtered,
        "kept": {"tasks": len(kept), "examples": sum(len(task.examples) for task in kept)},
        "samples": [
            {
                "id": task.id,
                "instruction": task.instruction,
                "input": task.examples[0].input,
                "target": task.examples[0].target,
            }
            for task in picked
            if task.examples
        ],
    }


def show(description: dict[str, Any]) -> str:
    """The description as lines for a terminal."""
    kept = description["kept"]
    lines = [
        f"format {description['format']}: {description['tasks']} tasks, {description['examples']} "
        "examples, "
        f"{description['families']} families",
        *(f"left out: {reason}: {count}" for reason, count in description["filtered"].items()),
        f"kept: {kept['tasks']} tasks, {kept['examples']} examples",
    ]
    for sample in description["samples"]:
        lines += ["", *(f"  {key:<12} {_short(str(value))}" for key, value in sample.items())]
    return "\n".join(lines)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else line[: _WIDTH - 3] + "..."
