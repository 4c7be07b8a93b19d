"""`ship-ds convert` as a user or a Slurm job starts it: checkpoint -> bundle -> adapters -> merged
models."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from ship_ds import cli
from ship_ds.export.convert import find_bundle
from tests.conftest import start
from tests.inference.conftest import random_bundle


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
    assert cli.main(command[2:]) == 0
    adapters = tmp_path / "out" / "adapters"
    lines = [f"{adapters}: there already, 1 adapters", f"{merged}: there already"]
    assert capsys.readouterr().out.splitlines() == lines
    assert (merged / "model.safetensors").stat().st_mtime_ns == written
    # Of another checkpoint it is not taken; without the mark, as an earlier version left it, it is.
    other = sorted((two_rank_run / "checkpoints").glob("step-*"))[0]
    assert other.name != "step-00000012"
    command[3] = str(other)
    assert cli.main(command[2:]) == 2
    assert "bundle: is of another checkpoint" in capsys.readouterr().err.strip().splitlines()[-1]
    bundle = tmp_path / "out" / "bundle"
    # A run whose checkpoints have made room since.
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert find_bundle(tmp_path / "run", bundle, print) == bundle
    (tmp_path / "out" / "made_from.json").unlink()
    assert find_bundle(other, bundle, print) == bundle


@pytest.mark.slow
def test_what_is_there_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = random_bundle(tmp_path / "one")
    text = "remove every 3 and then remove every 4 and then remove every "
    given = [*("--out", str(tmp_path / "out")), "--no-drift", "--target", "original"]

    def convert(source: Path, instruction: str, *options: str) -> str:
        """The last line of what went wrong."""
        options = ("--instruction", instruction, *given, *options)
        code = cli.main(["convert", str(source), *options])
        said = capsys.readouterr()
        assert code == (2 if "--out" in said.err else 0), said.err
        return said.err.strip().splitlines()[-1] if code else said.out

    assert "1 adapters" in convert(first, text + "5")
    there = [line.rpartition(": ")[2] for line in convert(first, text + "5").splitlines()]
    assert there == ["there already, 1 adapters", "there already"]
    # Names of folders have the first forty letters of an instruction.
    assert f"is of other instructions (00001-remove-every-3-and-then-remove-every-4-a: '{text}" in (
        convert(first, text + "6")
    )
    assert "(no 00001-add-5)" in convert(first, "add 5")
    assert "is of another checkpoint" in convert(random_bundle(tmp_path / "two", 0.07), text + "5")
    assert "is of another --pad-to" in convert(first, text + "5", "--pad-to", "64")
    said = convert(first, text + "5", "--dtype", "float16")
    assert "is another merge (dtype 'auto', and 'float16' is asked for)" in said
    assert "is another merge (shard_gigabytes" in (
        convert(first, text + "5", "--shard-gigabytes", "1")
    )


def test_a_folder_with_nothing_in_it_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no checkpoint here" in capsys.readouterr().err.strip().splitlines()[-1]
