"""Kills, damaged checkpoints and changed configs: fresh processes, as a user or a cluster would
start and end them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ship_ds import cli
from ship_ds.api import Ship
from ship_ds.runtime import checkpoint
from tests.conftest import REPOSITORY, environment, start

pytestmark = pytest.mark.distributed

QUICK = ("evaluation.every_steps=0", "evaluation.ends_with_report=false")
"""What comes after the last step and between steps changes no loss;
test_an_evaluation_in_the_middle... shows it."""
LOSSES = ("loss/total", "loss/task", "loss/reconstruction", "loss/kl", "optimiser/gradient_norm")
Rows = Callable[[Path], list[dict[str, Any]]]


def command(folder: Path, overrides: Sequence[str] = QUICK) -> list[str]:
    return [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ship_ds.train",
        "--config",
        "quickstart-smoke",
        f"run.folder={folder}",
        *overrides,
    ]


def kill_after(folder: Path, num_rows: int) -> int:
    """Start a two-rank run, kill it and its ranks with SIGKILL once it took `num_rows` steps; the
    rows it had written."""
    metrics = folder / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, *command(folder)],
        cwd=REPOSITORY,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= num_rows:
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for rank in _ranks_of(folder):
        os.kill(rank, signal.SIGKILL)
    return metrics.read_text().count("\n")


def _ranks_of(folder: Path) -> list[int]:
    """Processes that still have the run's folder in their command line: torchrun's ranks lead
    sessions of their own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"run.folder={folder}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def resumed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed") / "run"
    assert 6 <= kill_after(folder, 6) < 12
    assert not (folder / "bundle").exists()
    done = start(command(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resumed from" in done.stderr
    return folder


def test_a_killed_and_resumed_run_repeats_the_losses_bit_for_bit(
    two_rank_run: Path, resumed_run: Path, rows: Rows
) -> None:
    whole, resumed = rows(two_rank_run), rows(resumed_run)
    assert [row["step"] for row in resumed] == list(range(12))
    for left, right in zip(whole, resumed, strict=True):
        assert {name: left[name] for name in LOSSES} == {name: right[name] for name in LOSSES}, (
            left["step"]
        )


def test_a_killed_and_resumed_run_ends_with_the_same_weights(
    two_rank_run: Path, resumed_run: Path
) -> None:
    whole, resumed = (
        load_file(run / "bundle" / "ship.safetensors") for run in (two_rank_run, resumed_run)
    )
    assert whole.keys() == resumed.keys() and all(
        whole[name].equal(resumed[name]) for name in whole
    )


def test_the_last_two_and_the_best_on_dev_are_kept(two_rank_run: Path) -> None:
    names = sorted(path.name for path in (two_rank_run / "checkpoints").glob("step-*"))
    assert names[-2:] == ["step-00000008", "step-00000012"]
    assert (two_rank_run / "checkpoints" / "latest").read_text() == "step-00000012\n"


@pytest.fixture(scope="module")
def gone_on_as_one(two_rank_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two-rank run, its newest checkpoint damaged, started again as one process; what it said
    is in `stderr`."""
    run = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(two_rank_run, run)
    shard = min((run / "checkpoints" / "step-00000012" / "state").glob("*optim_states.pt"))
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    done = start(
        ["-m", "ship_ds.train", "--config", "quickstart-smoke", f"run.folder={run}", *QUICK]
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (run / "stderr").write_text(done.stderr)
    return run


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(gone_on_as_one: Path, rows: Rows) -> None:
    said = (gone_on_as_one / "stderr").read_text()
    assert (
        "zero_pp_rank_0_mp_rank_00_optim_states.pt has" in said
        and "going on from step-00000008" in said
    )
    assert [row["step"] for row in rows(gone_on_as_one)] == list(range(12))


def test_two_ranks_go_on_as_one(two_rank_run: Path, gone_on_as_one: Path, rows: Rows) -> None:
    """Without Adam's moments the losses of the last steps would be off by more than 1e-4."""
    said = (gone_on_as_one / "stderr").read_text()
    assert (
        "step-00000008: written by 2 rank(s) under ZeRO-3: shared out anew over 1 under ZeRO-3"
        in said
    )
    for left, right in zip(rows(two_rank_run), rows(gone_on_as_one), strict=True):
        assert {name: left[name] for name in LOSSES} == pytest.approx(
            {name: right[name] for name in LOSSES}, rel=1e-5
        )


def test_bundle_from_a_two_rank_checkpoint_is_the_runs_own(
    two_rank_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = two_rank_run / "checkpoints" / "step-00000012"
    assert cli.main(["bundle", str(newest), "--out", str(tmp_path / "bundle")]) == 0
    made, own = (
        load_file(folder / "ship.safetensors")
        for folder in (tmp_path / "bundle", two_rank_run / "bundle")
    )
    assert made.keys() == own.keys() and all(made[name].equal(own[name]) for name in own)
    assert Ship.from_run(tmp_path / "bundle").answer("put 7 at the front", ["1 2"])


def test_a_bundle_of_a_run_is_of_its_best_checkpoint_on_dev(
    two_rank_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_rank_run, run)
    first, *_, last = checkpoint.checkpoints(run / "checkpoints")
    for folder, score in ((first, 0.75), (last, 0.5)):
        checkpoint.record_evaluation(folder, 1, score, is_owed=False)
    assert cli.main(["bundle", str(run), "--out", str(tmp_path / "best")]) == 0
    line = f"{tmp_path / 'best'}: bundle of {first}, the best on dev by exact_match"
    assert capsys.readouterr().out.splitlines() == [line]
    best, own = (
        load_file(folder / "ship.safetensors") for folder in (tmp_path / "best", run / "bundle")
    )
    assert best.keys() == own.keys() and not all(best[name].equal(own[name]) for name in own)


def test_progress_names_step_config_and_revision(two_rank_run: Path) -> None:
    progress = checkpoint.read_progress(two_rank_run / "checkpoints" / "step-00000012")
    assert progress.step == 12 and progress.world_size == 2 and progress.config["run"]["seed"] == 0
    assert progress.dev_score is not None and not progress.owes_evaluation
    assert len(progress.data_fingerprint) == 64
