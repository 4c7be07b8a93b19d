"""Kills at random moments, other numbers of ranks, a lost node: the loss curve stays that of the
run nobody disturbed.

    # about half an hour on two cores; SOAK_KILLS (20) and SOAK_SEED (0) change it
    make soak      # figures: runs/soak.json

The tasks are read from a file, so that reading and tokenising them can be killed too.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, environment
from tests.runtime import slurm_cluster
from tests.runtime.test_resume import LOSSES, _ranks_of
from tests.runtime.test_slurm import TWO_NODES, submit, wait_for_end
from tests.soak.faults import OP

pytestmark = pytest.mark.soak
NUM_STEPS = 40
NUM_KILLS = int(os.environ.get("SOAK_KILLS", "20"))
NUM_COMPILE_KILLS = 3
SECONDS_A_START = 900


@dataclass
class Run:
    """One run folder, started again and again."""

    folder: Path
    data: Path

    @property
    def arguments(self) -> list[str]:
        return [
            "--config",
            "quickstart-smoke",
            f"run.folder={self.folder}",
            f"data={{kind: files, path: {self.data}}}",
            f"training.steps={NUM_STEPS}",
            "checkpoint.every_steps=3",
            "evaluation.every_steps=0",
            "evaluation.ends_with_report=false",
        ]

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def start(self, num_ranks: int = 2) -> "subprocess.Popen[bytes]":
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
            if num_ranks > 1
            else []
        )
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, *launcher, "-m", "ship_ds.train", *self.arguments],
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,
            )

    def finish(self, num_ranks: int = 2) -> None:
        assert self.start(num_ranks).wait(SECONDS_A_START) == 0, self.log.read_text()[-4000:]

    def num_rows(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def rows(self) -> list[dict[str, Any]]:
        lines = (
            (self.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
            if self.num_rows()
            else []
        )
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait(self, process: "subprocess.Popen[bytes]", condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS_A_START
        while not condition() and process.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.005)

    def ask_one_rank_to_stop(self) -> None:
        """USR1 to a rank, not to its launcher, which it would end."""
        ranks = [
            n
            for n in _ranks_of(self.folder)
            if b"torch.distributed.run" not in Path(f"/proc/{n}/cmdline").read_bytes()
        ]
        os.kill(ranks[-1], signal.SIGUSR1)

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        """SIGKILL for launcher and ranks, as a node's daemon would."""
        for number in (process.pid, *_ranks_of(self.folder)):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
        for number in _ranks_of(self.folder):
            os.kill(number, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run", data)
    run.finish()
    return run.rows()


@pytest.fixture(scope="module")
def figures() -> Any:
    """What was measured, for the README; written whatever part ran."""
    found: dict[str, Any] = {}
    yield found
    path = REPOSITORY / "runs" / "soak.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


def only_losses(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in ("step", *LOSSES)} for row in rows]


def largest_difference(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> float:
    return max(
        abs(one[name] - other[name]) / abs(other[name])
        for one, other in zip(left, right, strict=True)
        for name in LOSSES
    )


def moments(run: Run, rng: random.Random) -> dict[str, Callable[[], object]]:
    """When to kill a start, by what it is doing; each is followed by a random wait."""
    first, wanted = run.num_rows(), rng.randint(1, 4)
    return {
        "data": lambda: b" tasks, " in run.log.read_bytes(),
        "checkpoint": lambda: list((run.folder / "checkpoints").glob("*.part")),
        "step": lambda: run.num_rows() >= first + wanted,
    }


def test_kills_at_random_moments_change_no_loss(
    data: Path, undisturbed: list[dict[str, Any]], figures: dict[str, Any], tmp_path: Path
) -> None:
    rng = random.Random(int(os.environ.get("SOAK_SEED", "0")))
    run = Run(tmp_path / "run", data)
    kinds = [("data", "checkpoint", "step", "data", "step")[i % 5] for i in range(NUM_KILLS)]
    killed: dict[str, int] = {}
    for kind in kinds:
        process = run.start()
        run.wait(process, moments(run, rng)[kind])
        time.sleep(rng.uniform(0, {"data": 1.0, "checkpoint": 0.2, "step": 0.5}[kind]))
        if process.poll() is None:
            killed[kind] = killed.get(kind, 0) + 1
        run.kill(process)
        rows = run.rows()
        assert only_losses(rows) == only_losses(undisturbed[: len(rows)]), f"after a kill in {kind}"
    run.finish()
    figures["kills"] = killed | {"rows": len(run.rows())}
    assert only_losses(run.rows()) == only_losses(undisturbed)
    assert sum(killed.values()) >= NUM_KILLS - 2  # the last ones may find the run ended


def test_kills_while_an_op_compiles(figures: dict[str, Any], tmp_path: Path) -> None:
    """Of two processes that want it, as a node's ranks do. Their compilers are left to themselves,
    as a node's daemon would."""
    program = f"from ship_ds.runtime import compiled_ops; compiled_ops.build(['{OP}'], print)"
    ops, log = tmp_path / "ops", tmp_path / "log"

    def start_both() -> "list[subprocess.Popen[bytes]]":
        with log.open("wb") as file:
            return [
                subprocess.Popen(
                    [sys.executable, "-c", program],
                    stdout=file,
                    stderr=file,
                    env=environment(TORCH_EXTENSIONS_DIR=str(ops)),
                )
                for _ in range(2)
            ]

    rng = random.Random(int(os.environ.get("SOAK_SEED", "0")))
    for _ in range(NUM_COMPILE_KILLS):
        shutil.rmtree(ops, ignore_errors=True)
        both = start_both()
        deadline = time.monotonic() + SECONDS_A_START
        while not list(ops.glob("*/lock")):
            assert time.monotonic() < deadline and any(one.poll() is None for one in both)
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 5.0))
        assert all(one.poll() is None for one in both), log.read_text()
        for number in (signal.SIGSTOP, signal.SIGKILL):  # at once: the other would go on
            for one in both:
                one.send_signal(number)
        for one in both:
            one.wait()
        assert list(ops.glob("*/lock")) and not list(ops.glob("*/*.so"))
    assert [one.wait(SECONDS_A_START) for one in start_both()] == [0, 0], log.read_text()
    assert log.read_text().count("left behind by a process that was killed") == 1
    assert list(ops.glob("*/*.so")) and not list(ops.glob("*/lock"))
    figures["kills while an op compiles"] = NUM_COMPILE_KILLS


def test_one_two_four_one_ranks(
    data: Path, undisturbed: list[dict[str, Any]], figures: dict[str, Any], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", data)
    for num_ranks, until in ((1, 10), (2, 20), (4, 30)):
        process = run.start(num_ranks)
        run.wait(process, lambda until=until: run.num_rows() >= until)  # type: ignore[misc]
        run.ask_one_rank_to_stop()
        process.wait(SECONDS_A_START)
    run.finish(num_ranks=1)
    starts = [json.loads(line) for line in (run.folder / "starts.jsonl").read_text().splitlines()]
    assert [start["world_size"] for start in starts] == [1, 2, 4, 1]
    assert [row["step"] for row in run.rows()] == list(range(NUM_STEPS))
    figures["1-2-4-1 ranks"] = {
        "from steps": [start["step"] for start in starts],
        "largest relative difference of a loss": largest_difference(run.rows(), undisturbed),
    }
    assert largest_difference(run.rows(), undisturbed) < 1e-3


def test_a_lost_node_is_replaced_by_the_spare(
    data: Path, undisturbed: list[dict[str, Any]], figures: dict[str, Any], tmp_path: Path
) -> None:
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    run, log = Run(tmp_path / "run", data), tmp_path / "job.out"
    (tmp_path / "cluster").mkdir()
    with slurm_cluster.Cluster(tmp_path / "cluster") as cluster:
        job = submit(cluster, log, TWO_NODES, *run.arguments)
        cluster.wait("ten steps", lambda: run.num_rows() >= 10, SECONDS_A_START)
        lost_at = time.monotonic()
        cluster.lose("node2")
        cluster.wait("a start on the spare", lambda: len(starts_of(run)) == 2, SECONDS_A_START)
        seconds = time.monotonic() - lost_at
        assert wait_for_end(cluster, job, SECONDS_A_START) == "COMPLETED", log.read_text()
    first, second = starts_of(run)
    assert first["nodes"] == ["node1", "node2"] and second["nodes"] == ["node1", "node3"]
    figures["lost node"] = {"steps before": second["step"], "seconds to go on": round(seconds, 1)}
    assert only_losses(run.rows()) == only_losses(undisturbed)


def starts_of(run: Run) -> list[dict[str, Any]]:
    path = run.folder / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
