"""A hang between two real gloo ranks: the stacks, the collective and the missing rank are named."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ship_ds.exit_codes import HUNG
from ship_ds.runtime import watchdog as watchdog_module
from ship_ds.runtime.watchdog import Position, Watchdog, missing_ranks
from tests.conftest import REPOSITORY, environment, free_port, start

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
    time.sleep(2)  # or it gives no sign of life at all
    {hang}
ranks.barrier()
"""


def of_two(rank: int, port: str) -> dict[str, str]:
    """What tells a process that it is this rank of two."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {"RANK": str(rank), "WORLD_SIZE": "2", **place}


def hang(folder: Path, train: str, hang: str) -> tuple[list[int], str]:
    """The codes of two ranks, of which the second hangs, and what the first said."""
    port = free_port()
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", RANK.format(train=train, hang=hang), str(folder)],
            cwd=REPOSITORY,
            text=True,
            stderr=subprocess.PIPE,
            env=environment(**of_two(rank, port)),
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
    assert codes[0] == HUNG
    last = waiting.strip().splitlines()[-1]
    assert "rank 0: no sign of life of rank 1 for 0.05 minutes (training.hang_minutes)" in last
    assert "Missing: rank 1 (no sign of life for" in last


def say(folder: Path, rank: int, when: float, hours_ahead: float = 0) -> None:
    """What that rank's watchdog writes at that time, its node's clock being ahead."""
    row = {"step": 3, "collective": "all_reduce", "line": "train.py:1 train"}
    path = folder / f"rank-{rank}.json"
    path.write_text(json.dumps(row | {"time": when + 3600 * hours_ahead}))
    os.utime(path, (when, when))


@pytest.mark.distributed
def test_a_rank_that_never_comes_is_named_where_all_should_meet(tmp_path: Path) -> None:
    """The process group itself would wait for hours."""
    meet = """
import sys
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from ship_ds.runtime.watchdog import Watchdog
watchdog = Watchdog(Path(sys.argv[1]), 0.05)
watchdog.begin()
with watchdog.meeting():
    dist.init_process_group("gloo", timeout=timedelta(hours=6))
"""
    done = start(["-c", meet, str(tmp_path)], **of_two(0, free_port()))
    assert done.returncode == HUNG
    last = done.stderr.strip().splitlines()[-1]
    assert "rank 0: the ranks have not met for 0.05 minutes (training.hang_minutes)" in last
    assert "Missing: rank 1 (never seen)" in last and "GLOO_SOCKET_IFNAME" in last


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watchdog:
    """Of rank 0 of two, which looks every 6 s; what rank 1 said in the start before is there."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "ranks").mkdir()
    say(tmp_path / "ranks", 1, 5.0)
    return Watchdog(tmp_path, 1)


def looks(watchdog: Watchdog, number: int) -> list[str]:
    found = [watchdog._describe_silence(60) for _ in range(number)]
    return [text for text in found if text is not None]


@pytest.mark.parametrize("hours_ahead", [-2, 0, 2])
def test_silence_is_told_whatever_the_clock_of_the_other_node_says(
    first: Watchdog, hours_ahead: int
) -> None:
    for i in range(20):
        say(first.folder, 1, time.time() + 6 * i, hours_ahead)
        assert not looks(first, 5)
    assert not looks(first, 6)
    assert looks(first, 1) == ["no sign of life of rank 1 for 1 minutes"]


def test_a_rank_that_has_left_or_has_not_begun_is_not_missed(
    first: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not looks(first, 30)
    monkeypatch.setenv("RANK", "1")
    second = Watchdog(first.folder.parent, 1)
    second._write_position()
    monkeypatch.setenv("RANK", "0")
    assert not looks(first, 11)
    assert looks(first, 1)
    monkeypatch.setenv("RANK", "1")
    second.deregister()
    monkeypatch.setenv("RANK", "0")
    assert not looks(first, 30)


@pytest.mark.parametrize("text", ["", "[1]", '{"step": 1}', "\udcff"])
def test_what_cannot_be_understood_ends_no_watching(first: Watchdog, text: str) -> None:
    path = first.folder / "rank-1.json"
    path.write_text(text, errors="surrogateescape")
    assert not looks(first, 30)
    path.unlink()
    path.mkdir()
    assert not looks(first, 30)


class Ended(Exception):  # noqa: N818, in the place of the process's end
    """With the reason."""


def watch(
    watchdog: Watchdog, seconds: list[float], monkeypatch: pytest.MonkeyPatch, steps: bool = False
) -> None:
    """Let it watch, with so many seconds between its looks, and a step between them."""
    clock = [0.0]
    left = iter(seconds)

    def wait(_: float) -> bool:
        if steps:
            watchdog.record_step(1)
        passed = next(left, None)
        clock[0] += passed or 0
        return passed is None

    def end(_: object, reason: str, advice: str = "") -> None:
        raise Ended(f"{reason}. {advice}")

    times = SimpleNamespace(monotonic=lambda: clock[0], time=time.time)
    monkeypatch.setattr(watchdog_module, "time", times)
    monkeypatch.setattr(watchdog, "_done", SimpleNamespace(wait=wait))
    monkeypatch.setattr(watchdog, "_report_and_exit", end)
    watchdog._watch(60)


def test_the_time_in_which_the_process_was_stopped_does_not_count(
    first: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(first, [6.0] * 50, monkeypatch)
    first.start()
    watch(first, [*[6.0] * 4, 5000.0, *[6.0] * 4], monkeypatch)
    with pytest.raises(Ended, match="no step for 1 minutes"):
        watch(first, [6.0] * 11, monkeypatch)


def test_a_meeting_that_ends_in_time_is_not_missed(
    first: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with first.meeting():
        watch(first, [6.0] * 8, monkeypatch)
    watch(first, [6.0] * 50, monkeypatch)
    line = "the ranks have not met for 1 minutes.*NCCL_SOCKET_IFNAME"
    with pytest.raises(Ended, match=line), first.meeting():
        watch(first, [6.0] * 12, monkeypatch)


def test_the_others_are_not_missed_while_there_are_steps(
    first: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(first.folder, 1, time.time())
    watch(first, [6.0] * 8, monkeypatch)
    first.start()
    watch(first, [6.0] * 40, monkeypatch, steps=True)
    first.stop()
    watch(first, [6.0] * 10, monkeypatch)
    with pytest.raises(Ended, match="no sign of life of rank 1 for 1 minutes"):
        watch(first, [6.0], monkeypatch)


def test_the_line_is_written_where_the_positions_cannot_be_read(
    first: Watchdog, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def leave(code: int) -> None:
        raise Ended(str(code))

    (first.folder / "rank-1.json").write_text("{")
    monkeypatch.setattr(watchdog_module.os, "_exit", leave)
    monkeypatch.setattr(watchdog_module.faulthandler, "dump_traceback", lambda *_, **__: None)
    with pytest.raises(Ended, match=str(HUNG)):
        first._report_and_exit(Position(3, None, "train.py:1 train", 0.0), "no step for 1 minutes")
    (line,) = capfd.readouterr().err.splitlines()
    assert "no step for 1 minutes" in line and "Missing: not known, as " in line


@pytest.mark.parametrize("hours_ahead", [-2, 0, 2])
def test_a_rank_without_a_sign_of_life_is_missing(tmp_path: Path, hours_ahead: int) -> None:
    """Whatever the clocks of its node and of the ones that are there say."""
    for rank, age in ((0, 0), (1, 60), (2, 1)):
        say(tmp_path, rank, time.time() - age, hours_ahead * rank)
    one, three = missing_ranks(tmp_path, 4, stale_seconds=30)
    assert one.startswith(
        "rank 1 (no sign of life for 60 s; last at step 3, all_reduce, train.py:1 train"
    )
    assert three == "rank 3 (never seen)"
