"""A program that two ranks run: two processes which meet by a file."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY, environment

_SECONDS = 120
MEET = """
import sys
from pathlib import Path
import torch.distributed as dist
number, root = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=number, world_size=2)
"""
"""What each begins with: `number` is its rank, `root` the folder that it was given."""


def run_two_ranks(program: str, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Of each rank its code and what it said; both are gone at the end.

    Args:
        program: Python, with what `MEET` defines.
        folder: of both ranks; they meet by a file in it.

    Raises:
        subprocess.TimeoutExpired: a rank takes longer than two minutes.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEET + program, str(rank), str(folder)],
            cwd=REPOSITORY,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]
