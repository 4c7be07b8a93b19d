"""A hang between two real gloo ranks: the stacks, the collective and the missing rank are named."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ship_ds.runtime.stopping import HUNG
from ship_ds.runtime.watchdog import Watchdog, missing_ranks
from tests.conftest import REPOSITORY, environment

RANK = """
import os, signal, sys, time
from pathlib import Path
import torch.distributed as dist
from ship_ds.runtime import ranks
from ship_ds.runtime.watchdog import Watchdog
dist.init_process_group("gloo")
watchdog = Watchdog(Path(sys.argv[1]), 0.05)
watchdog.begin()
{train}
if ranks.rank() == 1:
    time.sleep(1)  # or it gives no sign of life at all
    {hang}
ranks.barrier()
"""


def hang(folder: Path, train: str, hang: str) -> tuple[list[int], str]:
    """The codes of two ranks, of which the second hangs, and what the first said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", RANK.format(train=train, hang=hang), str(folder)],
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
    )
    said = first.communicate(timeout=200)[1]
    # As a launcher does; one that has ended already keeps its code.
    second.kill()
    second.communicate()
    return [first.returncode, second.returncode], said


@pytest.mark.distributed
def test_the_rank_that_is_in_no_collective_is_named(tmp_path: Path) -> None:
    train = "watchdog.start(); watchdog.record_step(7)"
    codes, waiting = hang(tmp_path, train, "time.sleep(600)")
    assert HUNG in codes
    assert "most recent call first" in waiting and "in barrier" in waiting
    last = waiting.strip().splitlines()[-1]
    assert (
        "no step for 0.05 minutes" in last
        and "waiting at step 7, barrier, runtime/ranks.py:" in last
    )
    assert "Missing: rank 1 (step 7, in no collective" in last


@pytest.mark.distributed
@pytest.mark.parametrize(
    "train", ["", "watchdog.start(); watchdog.stop()"], ids=["before", "after"]
)
def test_a_stopped_rank_is_named_where_no_steps_are_expected(tmp_path: Path, train: str) -> None:
    codes, waiting = hang(tmp_path, train, "os.kill(os.getpid(), signal.SIGSTOP)")
    assert codes == [HUNG, -signal.SIGKILL]
    last = waiting.strip().splitlines()[-1]
    assert "rank 0: no sign of life of rank 1 for 0.05 minutes (training.hang_minutes)" in last
    assert "Missing: rank 1 (no sign of life for" in last


def test_a_rank_that_has_left_or_has_not_begun_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    first, second = Watchdog(tmp_path, 1), Watchdog(tmp_path, 1)
    first.folder.mkdir()
    monkeypatch.setenv("RANK", "1")
    second._write_position()
    monkeypatch.setenv("RANK", "0")
    time.sleep(0.1)
    assert first._describe_silence(0.05) == "no sign of life of rank 1 for 0.000833333 minutes"
    # The start that comes next finds what this one has left.
    assert Watchdog(tmp_path, 1)._describe_silence(0.05) is None
    monkeypatch.setenv("RANK", "1")
    second.leave()
    monkeypatch.setenv("RANK", "0")
    assert first._describe_silence(0.05) is None


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
