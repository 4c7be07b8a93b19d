"""A run folder that is another one on another node ends all ranks with one line at the start."""

from pathlib import Path

import pytest

from ship_ds.runtime import ranks, shared_disk
from tests.runtime.two_ranks import run_two_ranks

_BOTH_FOLDERS = """
import platform
from ship_ds.errors import UserError
from ship_ds.runtime import shared_disk
platform.node = lambda: f"node{number}"
shared_disk._WAIT_SECONDS = 0.1
shared_disk.check_is_shared(root / "shared")
try:
    shared_disk.check_is_shared(root / f"disk-of-{number}" / "run")
except UserError as error:
    print(error)
dist.barrier()
"""


@pytest.mark.distributed
def test_a_folder_that_a_node_has_on_a_disk_of_its_own_is_one_line_on_every_rank(
    tmp_path: Path,
) -> None:
    folders = [tmp_path / "shared", *(tmp_path / f"disk-of-{rank}" / "run" for rank in range(2))]
    for folder in folders:
        folder.mkdir(parents=True)
    for rank, done in enumerate(run_two_ranks(_BOTH_FOLDERS, tmp_path)):
        assert done.stdout == (
            f"run.folder: {tmp_path}/disk-of-{rank}/run is not the same disk on node1 as on node0; "
            "give a folder that all nodes share\n"
        ), done.stderr
    assert not any(list(folder.iterdir()) for folder in folders)


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is rank 0 of two, and the other answers as it does."""
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "gather_results", lambda work: [work()] * 2)
    monkeypatch.setattr(ranks, "gather_objects", lambda value: [value] * 2)


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("before", [None, "of a start that was killed"])
def test_a_file_that_comes_late_is_waited_for(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS shows a folder for a minute as it was."""
    path, pauses = tmp_path / ".same-disk", []
    real = shared_disk._content

    def late(path: Path) -> str | None:
        return real(path) if len(pauses) == 3 else before

    monkeypatch.setattr(shared_disk, "_content", late)
    monkeypatch.setattr(shared_disk.time, "sleep", pauses.append)
    shared_disk.check_is_shared(tmp_path)
    assert len(pauses) == 3 and not path.exists()


def test_one_rank_asks_nothing(tmp_path: Path) -> None:
    shared_disk.check_is_shared(tmp_path / "nowhere")
