"""Threads sleep while they wait, and one line tells of too many."""

import subprocess
import sys
from pathlib import Path

import pytest

from ship_ds.threads import RankThreads, too_many_threads, wait_asleep
from tests.conftest import REPOSITORY, environment


def test_a_users_own_policy_stays() -> None:
    untouched = {"PATH": "/bin"}
    wait_asleep(untouched)
    assert untouched == {"PATH": "/bin", "OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
    for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT", "KMP_LIBRARY"):
        chosen = {name: "active"}
        wait_asleep(chosen)
        assert chosen == {name: "active"}


RANK = 'sys.argv[1:] = ["--config", "quickstart-smoke", f"run.folder={sys.argv[2]}"]; '
STARTS = {
    "module": RANK + 'runpy.run_module("ship_ds.train", run_name="__main__")',
    "file": RANK
    + 'sys.path[0] = "ship_ds"; runpy.run_path("ship_ds/train.py", run_name="__main__")',
    "verb": 'from ship_ds import cli; cli.main(["answer", "x", "1", "--run", sys.argv[1]])',
    "api": "from ship_ds import Ship",
}


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_it_is_set_before_torch_loads(start: str, tmp_path: Path) -> None:
    """The first import of torch prints what its threads would read, and ends the program."""
    program = f"""
import os, runpy, sys

class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Torch())
sys.path.insert(0, {str(REPOSITORY)!r})
{start}
"""
    surroundings = {k: v for k, v in environment().items() if not k.startswith(("OMP_W", "KMP"))}
    run = REPOSITORY / "tests" / "fixtures" / "v0_1" / "run"
    done = subprocess.run(
        [sys.executable, "-c", program, str(run), str(tmp_path / "run")],
        cwd=REPOSITORY,
        env=surroundings,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["passive"], done.stderr[-2000:]


def rank(host: str, threads: int, cores: set[int], quota: float | None = None) -> RankThreads:
    return RankThreads(host, threads, frozenset(cores), quota)


def test_ranks_that_share_a_nodes_cores_are_counted_together() -> None:
    assert too_many_threads([rank("a", 1, {0, 1}), rank("a", 1, {0, 1})]) is None
    line = too_many_threads([rank("a", 2, {0, 1}), rank("a", 2, {0, 1})])
    assert line is not None
    assert line.startswith("4 threads of 2 process(es) share 2 core(s) of a and wait")
    assert "OMP_NUM_THREADS=1" in line and "training.threads=1" in line


def test_ranks_with_cores_of_their_own_are_not() -> None:
    """As srun binds them, and on another node."""
    assert too_many_threads([rank("a", 2, {0, 1}), rank("a", 2, {2, 3})]) is None
    assert too_many_threads([rank("a", 2, {0, 1}), rank("b", 2, {0, 1})]) is None


def test_a_containers_share_counts() -> None:
    assert too_many_threads([rank("a", 8, set(range(64)), 8.0)]) is None
    line = too_many_threads([rank("a", 64, set(range(64)), 2.0)])
    assert line is not None and "64 threads of 1 process(es) share 2 core(s)" in line


def test_this_process_has_cores() -> None:
    here = RankThreads.of_this_process(1)
    assert here.cores and too_many_threads([here]) is None
    assert too_many_threads([RankThreads.of_this_process(len(here.cores) + 1)]) is not None
