"""A hang between two real gloo ranks: the stacks, the collective and the missing rank are named."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ship_ds.runtime.stopping import HUNG
from ship_ds.runtime.watchdog import missing_ranks
from tests.conftest import REPOSITORY, environment

RANK = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from ship_ds.runtime import ranks
from ship_ds.runtime.watchdog import Watchdog
dist.init_process_group("gloo")
watchdog = Watchdog(Path(sys.argv[1]), 0.05)
watchdog.start()
watchdog.record_step(7)
ranks.barrier() if ranks.rank() == 0 else time.sleep(600)
"""


@pytest.mark.distributed
def test_the_rank_that_is_in_no_collective_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path)],
            cwd=REPOSITORY,
            text=True,
            stderr=subprocess.PIPE,
            env={
                **environment(),
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=200)[1] for process in started]
    assert HUNG in [process.returncode for process in started]
    waiting = errors[0]
    assert "most recent call first" in waiting and "in barrier" in waiting
    last = waiting.strip().splitlines()[-1]
    assert (
        "no step for 0.05 minutes" in last
        and "waiting at step 7, barrier, runtime/ranks.py:" in last
    )
    assert "Missing: rank 1 (step 7, in no collective" in last


def test_a_rank_without_a_sign_of_life_is_missing(tmp_path: Path) -> None:
    for rank, age in ((0, 0), (1, 60)):
        row = {
            "step": 3,
            "collective": "all_reduce",
            "line": "train.py:1 train",
            "time": time.time() - age,
        }
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps(row))
    one, two = missing_ranks(tmp_path, 3, stale_seconds=30)
    assert one.startswith(
        "rank 1 (no sign of life for 60 s; last at step 3, all_reduce, train.py:1 train"
    )
    assert two == "rank 2 (never seen)"
