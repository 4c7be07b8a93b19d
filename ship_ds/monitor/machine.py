"""What a figure was measured on: stands beside it in every report and benchmark."""

import datetime
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ship_ds import __version__
from ship_ds.placement import processor

_STACK = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in _STACK},
        # Not by its metadata: those of an installation with -e are as old as the installation.
        "ship-ds": __version__,
    }


def describe_machine() -> dict[str, str | int]:
    """Date, processor, cores that this process may use, torch's threads, and the GPU or "none"."""
    names = [line.split(":")[1].strip() for line in processor() if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def add_row(path: Path, label: str, row: Mapping[str, Any]) -> None:
    """Put a benchmark's figures, and what they were measured on, under a label into a JSON file
    that keeps its other labels, and print them.

    Args:
        path: of the file, which is made where it is missing; its folder has to be there.
        label: of these figures; older ones under it go.
        row: the figures by name.
    """
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows[label] = {"machine": describe_machine(), "versions": versions(), **row}
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=1))
