"""A full disk: a clear line, the checkpoints before it intact, and nothing half written."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ship_ds.config import CheckpointConfig
from ship_ds.errors import UserError
from ship_ds.runtime import checkpoint


class Engine:
    """Writes `num_bytes` as DeepSpeed does."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        (Path(folder) / tag).mkdir()
        torch.save(torch.zeros(self.num_bytes // 4), Path(folder) / tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def progress(step: int) -> checkpoint.Progress:
    return checkpoint.Progress(step, 0.0, 0, 0, 1, {}, "")


@pytest.mark.parametrize(("room", "num_bytes"), [(1_000_000, 9_000_000), (8_192, 0)])
def test_a_full_disk_leaves_the_checkpoint_before(small_disk: Path, room: int, num_bytes: int) -> None:
    """Full while DeepSpeed writes its shards, and after that, with the generators."""
    root = small_disk / "checkpoints"
    first = checkpoint.save(Engine(1_000_000), root, progress(1), CheckpointConfig())
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
    with pytest.raises(UserError, match="the checkpoint of step 2 was not written; the ones before are intact. Make room"):
        checkpoint.save(Engine(num_bytes), root, progress(2), CheckpointConfig())
    assert checkpoint.newest_good(root, print) == first
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001"]


def test_an_error_that_is_not_the_disks_is_raised_as_it_is(tmp_path: Path) -> None:
    class Broken(Engine):
        def save_checkpoint(self, *args: object, **kwargs: object) -> None:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        checkpoint.save(Broken(0), tmp_path, progress(1), CheckpointConfig())


def test_what_could_not_be_read_again_is_not_kept(tmp_path: Path) -> None:
    """A DeepSpeed whose shards hold another class fails at its first save, not at the resume."""
    class Newer(Engine):
        def save_checkpoint(self, folder: str, *args: object, **kwargs: object) -> None:
            (Path(folder) / "state").mkdir()
            torch.save({"settings": CheckpointConfig()}, Path(folder) / "state" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")

    checkpoint.save(Engine(1000), tmp_path, progress(1), CheckpointConfig())
    with pytest.raises(RuntimeError, match="writes ship_ds.config.CheckpointConfig: add it to ship_ds/runtime/pickles.py"):
        checkpoint.save(Newer(0), tmp_path, progress(2), CheckpointConfig())
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000001"]
