"""`ship-ds convert` as a user or a Slurm job starts it: checkpoint -> bundle -> adapters -> merged
models."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from ship_ds import cli
from tests.conftest import start


def test_a_checkpoint_becomes_a_merged_model_and_nothing_is_made_twice(
    two_rank_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "-m",
        "ship_ds.cli",
        "convert",
        str(two_rank_run / "checkpoints" / "step-00000012"),
        "--out",
        str(tmp_path / "out"),
        "--instruction",
        "put 7 at the front",
        "--target",
        "dequantised",
        "--no-drift",
    ]
    done = start(command)
    assert done.returncode == 0, done.stderr[-3000:]
    # Standard error is for what a user can act on.
    assert "Loading weights" not in done.stderr and "FutureWarning" not in done.stderr
    made, own = (
        load_file(folder / "ship.safetensors")
        for folder in (tmp_path / "out" / "bundle", two_rank_run / "bundle")
    )
    assert made.keys() == own.keys() and all(made[name].equal(own[name]) for name in own)
    merged = tmp_path / "out" / "merged" / "00001-put-7-at-the-front-dequantised"
    written = (merged / "model.safetensors").stat().st_mtime_ns
    assert cli.main(command[2:]) == 0 and not capsys.readouterr().out
    assert (merged / "model.safetensors").stat().st_mtime_ns == written


def test_a_folder_with_nothing_in_it_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no checkpoint here" in capsys.readouterr().err.strip().splitlines()[-1]
