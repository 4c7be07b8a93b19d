"""ZeRO-3 with parameters and optimiser state on a local disk by libaio; DeepSpeed's op for it
compiles for some minutes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator

from ship_ds.runtime.checkpoint import trainable_state
from ship_ds.runtime.deepspeed_config import read_deepspeed_config
from tests.conftest import REPOSITORY, environment
from tests.runtime.test_resume import LOSSES

pytestmark = pytest.mark.soak


def train(folder: Path, deepspeed: str, *more: str) -> None:
    """Four steps on two ranks, a checkpoint after each two; goes on where the folder has one."""
    settings = [
        f"run.folder={folder}",
        f"training.deepspeed={deepspeed}",
        "training.steps=4",
        "checkpoint.every_steps=2",
        "evaluation.every_steps=0",
        "evaluation.ends_with_report=false",
        *more,
    ]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ship_ds.train",
    ]
    done = subprocess.run(
        [*launcher, "--config", "quickstart-smoke", *settings],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def losses(folder: Path) -> list[tuple[float, ...]]:
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return [tuple(row[name] for name in LOSSES) for row in rows]


def goes_on(start: Path, folder: Path, deepspeed: str, *more: str) -> list[tuple[float, ...]]:
    """The losses of all four steps where the last two are repeated from the second step's
    checkpoint."""
    shutil.copytree(start, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    train(folder, deepspeed, *more)
    assert json.loads((folder / "starts.jsonl").read_text().splitlines()[-1])["step"] == 2
    return losses(folder)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    if not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible():
        pytest.skip("DeepSpeed's async_io cannot be built here: apt-get install libaio-dev")
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def onto(disk: Path, **zero: Any) -> str:
    """zero3_offload_nvme with its state on `disk`, as a file."""
    config = read_deepspeed_config("zero3_offload_nvme")
    for part in ("offload_param", "offload_optimizer"):
        config["zero_optimization"][part] |= {"nvme_path": str(disk), **zero.pop(part, {})}
    config["zero_optimization"] |= zero
    path = disk.parent / f"nvme-{len(list(disk.parent.glob('nvme-*')))}.json"
    path.write_text(json.dumps(config))
    return str(path)


def test_nvme_trains_as_offload_to_memory_does_and_each_goes_on_from_the_others_checkpoint(
    disk: Path, tmp_path: Path
) -> None:
    path = onto(disk)
    train(tmp_path / "nvme", path)
    train(tmp_path / "memory", "zero3_offload_cpu")
    whole = losses(tmp_path / "memory")
    assert len(whole) == 4 and losses(tmp_path / "nvme") == whole
    assert len(list(disk.rglob("exp_avg-*.swp"))) >= 2, "each rank's moments were on the disk"
    on_disk, in_memory = (
        trainable_state(tmp_path / name / "checkpoints" / "step-00000004")
        for name in ("nvme", "memory")
    )
    assert on_disk.keys() == in_memory.keys() and all(
        on_disk[name].equal(in_memory[name]) for name in on_disk
    )
    assert goes_on(tmp_path / "nvme", tmp_path / "again", path) == whole
    assert goes_on(tmp_path / "nvme", tmp_path / "into memory", "zero3_offload_cpu") == whole
    assert goes_on(tmp_path / "memory", tmp_path / "onto the disk", path) == whole


def test_with_large_weights_on_the_disk_in_many_sub_groups_and_pipelined_it_goes_on_too(
    disk: Path, tmp_path: Path
) -> None:
    """DeepSpeed keeps weights of less than 1 MiB a rank in memory, and the first `max_in_cpu` of
    the others."""
    wide = "model.hypernetwork.width=2048"
    pipelined = {"pipeline_read": True, "pipeline_write": True, "buffer_count": 12}
    path = onto(
        disk, sub_group_size=1_000_000, offload_param={"max_in_cpu": 0}, offload_optimizer=pipelined
    )
    train(tmp_path / "nvme", path, wide)
    assert len(list(disk.rglob("exp_avg-*.swp"))) > 4 and list(disk.rglob("*_param.tensor.swp"))
    whole = losses(tmp_path / "nvme")
    assert goes_on(tmp_path / "nvme", tmp_path / "again", path, wide) == whole
    in_memory = goes_on(tmp_path / "nvme", tmp_path / "into memory", "zero3_offload_cpu", wide)
    assert in_memory[:2] == whole[:2]
    for row, expected in zip(in_memory[2:], whole[2:], strict=True):
        assert row == pytest.approx(expected, rel=1e-4), (
            "another number of sub-groups sums in another order"
        )
