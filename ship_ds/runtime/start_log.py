"""RUN/starts.jsonl: one row for every start of a run, saying where it ran and from which step and
code."""

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

from ship_ds.allocator import allocator_in_use
from ship_ds.runtime import checkpoint, ranks


def append(folder: Path, step: int) -> None:
    """Rank 0 calls it. `job`, `nodes` and `restarts` are Slurm's, null elsewhere."""
    variables = os.environ
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "world_size": ranks.world_size(),
        "host": platform.node(),
        "job": variables.get("SLURM_JOB_ID"),
        "array_task": variables.get("SLURM_ARRAY_TASK_ID"),
        "nodes": _nodes(variables),
        "restarts": int(variables.get("SLURM_RESTART_COUNT", "0")),
        "git_revision": checkpoint.git_revision(),
        "malloc": allocator_in_use(),
    }
    with (folder / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _nodes(environment: Mapping[str, str]) -> list[str] | None:
    compact = environment.get("SLURM_JOB_NODELIST")
    return None if compact is None else ranks.slurm_nodes(compact, environment)
