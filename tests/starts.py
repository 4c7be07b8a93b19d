"""Trainings one after the other in one process, each by the entry point of
`python -m ship_ds.train`: what importing torch, DeepSpeed and transformers costs is paid once.

    python -m tests.starts '[{"arguments": ["--config", "quickstart-smoke", ...]}, ...]'

What has to be fresh in a start of its own (memory, signals, caches, plugins, the hashes of strings)
is tested by real ones: runtime/test_resume.py, and make soak.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ship_ds import train
from ship_ds.runtime import ranks

FIRST = "first.jsonl"
"""The metrics of a run before `crash` undid its end."""


def crash(folder: Path) -> None:
    """Leave of a finished run what a crash behind its last checkpoint but one leaves."""
    shutil.copy(folder / "metrics.jsonl", folder / FIRST)
    shutil.rmtree(max((folder / "checkpoints").glob("step-*")))
    shutil.rmtree(folder / "bundle")


def main(arguments: Sequence[str] | None = None) -> int:
    starts: list[dict[str, Any]] = json.loads((arguments or sys.argv[1:])[0])
    for one in starts:
        if "crashed" in one:
            crash(Path(one["crashed"]))
        if code := train.main(one["arguments"]):
            return code
    return 0


if __name__ == "__main__":
    ranks.run_program(main)
