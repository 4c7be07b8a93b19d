"""The shipped `sbatch slurm/train.sh` on a real Slurm cluster of this machine: train on two nodes,
be preempted, go on."""

import http.client
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, environment
from tests.runtime import slurm_cluster
from tests.runtime.slurm_cluster import Cluster

pytestmark = pytest.mark.slurm

Rows = Callable[[Path], list[dict[str, Any]]]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none"]


def job_environment() -> dict[str, str]:
    """Node names of the pretended cluster resolve nowhere, so the address of the first rank is
    given."""
    return {
        **environment(),
        "PYTHON": sys.executable,
        "VENV": "/none",
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def submit(cluster: Cluster, log: Path, options: list[str], *arguments: str) -> str:
    return cluster.sbatch(
        "slurm/train.sh",
        *arguments,
        options=[*options, f"--output={log}"],
        cwd=REPOSITORY,
        environment=job_environment(),
    )


def wait_for_end(cluster: Cluster, job: str, seconds: float) -> str:
    cluster.wait(f"end of job {job}", lambda: cluster.field(job, "JobState") in ENDED, seconds)
    return cluster.field(job, "JobState")


def test_bad_input_fails_in_seconds_with_one_line(cluster: Cluster, tmp_path: Path) -> None:
    run = f"run.folder={tmp_path / 'run'}"
    cases = {
        "config": (
            ["--nodes=1", "--ntasks-per-node=1", "--gres=none"],
            ["--config", "none.yaml"],
            "no such config file",
        ),
        "data": (
            ["--nodes=1", "--ntasks-per-node=1", "--gres=none"],
            ["--config", "quickstart-smoke", run, "data={kind: files, path: /nowhere}"],
            "data.path: /nowhere",
        ),
        "gpus": (
            ["--nodes=1", "--ntasks-per-node=2", "--gres=gpu:1"],
            ["--config", "quickstart-smoke", run],
            "2 processes a node and 1 GPU(s)",
        ),
    }
    started = time.monotonic()
    jobs = {
        name: submit(cluster, tmp_path / f"{name}.out", [*options, "--cpus-per-task=1"], *arguments)
        for name, (options, arguments, _) in cases.items()
    }
    for name, job in jobs.items():
        assert (
            wait_for_end(cluster, job, 60) == "FAILED" and cluster.field(job, "ExitCode") == "2:0"
        )
        (line,) = (tmp_path / f"{name}.out").read_text().splitlines()
        assert line.startswith("ship-ds: ") and cases[name][2] in line
    assert time.monotonic() - started < 60


def test_a_preempted_run_goes_on_after_requeue_with_the_same_losses(
    cluster: Cluster, two_rank_run: Path, tmp_path: Path, rows: Rows
) -> None:
    run, log = tmp_path / "run", tmp_path / "job.out"
    job = submit(
        cluster,
        log,
        TWO_NODES,
        "--config",
        "quickstart-smoke",
        f"run.folder={run}",
        "evaluation.every_steps=0",
        "evaluation.ends_with_report=false",
        "checkpoint.every_steps=0",
    )
    metrics = run / "metrics.jsonl"
    cluster.wait(
        "two steps", lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, 300
    )
    cluster.run("scancel", "--signal=USR1", job)
    cluster.run("scancel", "--signal=USR1", job)
    assert wait_for_end(cluster, job, 300) == "COMPLETED", f"{log.read_text()}\n{cluster.logs()}"
    assert (
        cluster.field(job, "Restarts") == "1" and "preempted (code 75): requeued" in log.read_text()
    )
    names = ("loss/total", "loss/task", "loss/reconstruction", "loss/kl", "optimiser/gradient_norm")
    assert [{name: row[name] for name in names} for row in rows(run)] == [
        {name: row[name] for name in names} for row in rows(two_rank_run)
    ]
    check_what_the_run_recorded(run, job)


def check_what_the_run_recorded(run: Path, job: str) -> None:
    first, second = (json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines())
    assert (
        first["step"] == 0
        and 2 <= second["step"] < 12
        and (first["restarts"], second["restarts"]) == (0, 1)
    )
    for start in (first, second):
        assert (
            start["job"] == job
            and len(start["nodes"]) == start["world_size"] == 2
            and len(start["git_revision"]) == 40
        )
    for rank in range(2):
        log = (run / "logs" / f"job-{job}" / f"rank-{rank}.log").read_text()
        assert log.count("USR1: saving at the next step boundary") == 1
    assert json.loads((run / "config.json").read_text())["training"]["steps"] == 12


def test_crashes_are_counted_from_the_newest_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    """A trainer killed by USR1 while it starts (not counted), a crash, a crash behind a new
    checkpoint, one more: the end."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    trainer = tmp_path / "python"
    trainer.write_text(f"""#!/bin/bash
        [[ -n $IN_CONTAINER ]] || exit 7
        [[ $* != *preflight* ]] || {{ echo {run}; exit; }}
        echo >> {run}/tries
        case $(wc -l < {run}/tries) in
            1) kill -USR1 $$ ;;
            3) echo step-00000004 > {run}/checkpoints/latest ;;
        esac
        exit 9
    """)
    trainer.chmod(0o755)
    job = cluster.sbatch(
        "slurm/train.sh",
        "--config",
        "quickstart-smoke",
        options=[
            "--nodes=1",
            "--ntasks-per-node=1",
            "--gres=none",
            "--cpus-per-task=1",
            f"--output={tmp_path / 'out'}",
        ],
        cwd=REPOSITORY,
        environment={
            **job_environment(),
            "PYTHON": str(trainer),
            "MAX_FAILURES": "1",
            "CONTAINER": "env IN_CONTAINER=1",
        },
    )
    assert wait_for_end(cluster, job, 120) == "FAILED"
    assert (run / "tries").read_text().count("\n") == 4, (tmp_path / "out").read_text()
    assert "more than MAX_FAILURES=1 failures after step-00000004" in (tmp_path / "out").read_text()


def test_tensorboard_answers_on_the_port_that_its_job_names(
    cluster: Cluster, two_rank_run: Path, tmp_path: Path
) -> None:
    log = tmp_path / "out"
    job = cluster.sbatch(
        "slurm/tensorboard.sh",
        str(two_rank_run),
        options=["--cpus-per-task=1", f"--output={log}"],
        cwd=REPOSITORY,
        environment=job_environment(),
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    runs: list[str] = []

    def answers() -> bool:
        try:
            address = re.search(r"http://localhost:\d+", log.read_text())
            assert address is not None
            runs[:] = json.loads(direct.open(f"{address[0]}/data/runs", timeout=5).read())
        except (AssertionError, OSError, http.client.HTTPException):
            return False
        return True

    try:
        cluster.wait("tensorboard", answers, 120)
    finally:
        cluster.run("scancel", job)
    assert runs == ["tensorboard"]


@pytest.mark.parametrize(
    ("script", "arguments", "command"),
    [
        (
            "train.sh",
            ["--config", "quickstart-smoke", "run.folder=FOLDER/run"],
            "-u -m ship_ds.train --config quickstart-smoke",
        ),
        (
            "evaluate.sh",
            ["--run", "runs/quickstart"],
            "-u -m ship_ds.cli evaluate --run runs/quickstart",
        ),
        (
            "convert.sh",
            ["runs/quickstart", "--out", "x"],
            "-u -m ship_ds.cli convert runs/quickstart --out x",
        ),
        (
            "tensorboard.sh",
            ["runs"],
            "-u -m tensorboard.main --logdir runs --host 0.0.0.0 --port 6006",
        ),
    ],
)
def test_a_dry_run_prints_the_job(
    script: str, arguments: list[str], command: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            f"slurm/{script}",
            "--dry-run",
            *(text.replace("FOLDER", str(tmp_path)) for text in arguments),
        ],
        cwd=REPOSITORY,
        env=job_environment(),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "#SBATCH --time=" in done.stdout
        and f"{sys.executable} {command}" in done.stdout.splitlines()[-1]
    )


def dry_run_in_an_array(
    tmp_path: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["slurm/train.sh", "--dry-run", "--config", "quickstart-smoke", *arguments],
        cwd=REPOSITORY,
        text=True,
        env={**job_environment(), "SLURM_ARRAY_TASK_ID": "2", **variables},
        capture_output=True,
        check=False,
    )


def test_an_array_gives_each_index_its_seed_folder_and_line(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("optimiser.lr=1e-3\noptimiser.lr=2e-3 model.latent_size=32\n")
    done = dry_run_in_an_array(
        tmp_path, f"run.folder={tmp_path}/run-%a", "run.seed=%a", SWEEP=str(sweep)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(
        f"run.folder={tmp_path}/run-2 run.seed=2 optimiser.lr=2e-3 model.latent_size=32"
    )


@pytest.mark.parametrize("seed", ["0", "%a"])
def test_an_array_whose_jobs_would_share_a_folder_is_refused(seed: str, tmp_path: Path) -> None:
    done = dry_run_in_an_array(tmp_path, f"run.folder={tmp_path}/run", f"run.seed={seed}")
    assert done.returncode == 2 and "an array needs %a" in done.stderr and not os.listdir(tmp_path)
