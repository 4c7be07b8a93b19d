"""What stops a run in seconds, with one line and without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ship_ds.config import load_config
from ship_ds.errors import UserError
from ship_ds.runtime import preflight
from tests.conftest import REPOSITORY, environment

SLURM = {"SLURM_GPUS_ON_NODE": "4", "SLURM_TASKS_PER_NODE": "8(x2),4"}


def check(tmp_path: Path, *overrides: str, environment: dict[str, str] | None = None) -> None:
    preflight.check(
        load_config("quickstart-smoke", [f"run.folder={tmp_path / 'run'}", *overrides]),
        environment or {},
    )


def test_a_good_run_passes_and_leaves_an_empty_folder(tmp_path: Path) -> None:
    check(tmp_path, environment={**SLURM, "SLURM_TASKS_PER_NODE": "4(x3)"})
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data={kind: files, path: /nowhere}"], "data.path: /nowhere: No such file"),
        (
            ["model.task_llm.base=/nowhere"],
            "model.task_llm.base: /nowhere: expected a model folder",
        ),
        (["training.deepspeed=zero9"], "ds_configs/ has cpu, zero1, zero1_bf16, zero2"),
        (
            ["training.hang_minutes=26"],
            "training.hang_minutes: 26 is above 25.*set it lower, or null",
        ),
        (["run.folder=/dev/null/run"], "run.folder: /dev/null/run: Not a directory"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(tmp_path, *overrides)


@pytest.mark.parametrize("part", ["offload_param", "offload_optimizer"])
def test_an_nvme_path_that_is_no_folder_is_named(tmp_path: Path, part: str) -> None:
    path, disk = tmp_path / "own.json", tmp_path / "disk"
    disk.touch(mode=0o777)
    other = "offload_param" if part == "offload_optimizer" else "offload_optimizer"
    for where in (str(tmp_path / "nowhere"), str(disk), ""):
        path.write_text(
            json.dumps(
                {
                    "zero_optimization": {
                        "stage": 3,
                        part: {"device": "nvme", "nvme_path": where},
                        other: None,
                    }
                }
            )
        )
        with pytest.raises(
            UserError,
            match=rf"training.deepspeed: {part}.nvme_path: .*: no folder that can be written",
        ):
            check(tmp_path, f"training.deepspeed={path}")
    path.write_text(
        json.dumps(
            {
                "zero_optimization": {
                    "stage": 3,
                    part: {"device": "nvme", "nvme_path": str(tmp_path)},
                }
            }
        )
    )
    check(tmp_path, f"training.deepspeed={path}")


def test_an_optimiser_that_is_offloaded_in_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    for ratio in (0.5, 1.0):
        path.write_text(
            json.dumps(
                {
                    "zero_optimization": {
                        "stage": 2,
                        "offload_optimizer": {"device": "cpu", "ratio": ratio},
                    }
                }
            )
        )
        if ratio == 1:
            check(tmp_path, f"training.deepspeed={path}")
        else:
            with pytest.raises(
                UserError,
                match=r"training.deepspeed: offload_optimizer.ratio: 0.5: .* would lose them",
            ):
                check(tmp_path, f"training.deepspeed={path}")


def test_an_empty_folder_and_an_unreadable_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder is empty"):
        check(tmp_path, f"data={{kind: files, path: {tmp_path}}}")
    (tmp_path / "task.json").symlink_to(tmp_path / "task.json")  # root reads everything but a loop
    with pytest.raises(UserError, match=r"task\.json: Too many levels of symbolic links"):
        check(tmp_path, f"data={{kind: files, path: {tmp_path / 'task.json'}}}")


def test_fewer_gpus_than_processes_on_a_node_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"8 processes a node and 4 GPU.*--ntasks-per-node=4"):
        check(tmp_path, environment=SLURM)


def test_it_loads_no_torch() -> None:
    code = "import sys, ship_ds.runtime.preflight; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), check=False
        ).returncode
        == 0
    )
