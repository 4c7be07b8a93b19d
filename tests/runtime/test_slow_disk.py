"""Two ranks on a disk that does not show both of them the same, as NFS may: what is no damage is
taken for none."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.two_ranks import run_two_ranks

_RANK = """
import errno, json
import torch
from ship_ds.config import CheckpointConfig
from ship_ds.runtime import checkpoint, ranks
found, said = {}, []

class Engine:
    def trainable(self):
        return {}

    def save_shards(self, folder, name):
        (folder / name).mkdir(exist_ok=True)
        torch.save(torch.zeros(9), folder / name / f"zero_pp_rank_{number}_optim_states.pt")

def save(step):
    progress = checkpoint.Progress(step, 0.0, 0, 0, 2, {}, "")
    return checkpoint.save(Engine(), root / "checkpoints", progress, CheckpointConfig())

def newest():
    try:
        good = checkpoint.newest_good_to_resume(root / "checkpoints", said.append)
        return [good and good.name, len(said)]
    except Exception as error:
        return [type(error).__name__, str(error)]
    finally:
        dist.barrier()
"""
_LISTINGS = """
real = Path.rglob
# Of the other rank's files none is listed here yet.
Path.rglob = lambda path, pattern: [
    one for one in real(path, pattern) if f"rank_{1 - number}" not in one.name
]
folder = save(1)
Path.rglob = real
found["files"] = sorted(json.loads((folder / "manifest.json").read_text()))
found["newest"] = newest()
"""
_READS = """
real_stat, real_open = Path.stat, Path.open
hidden, number_of_error = None, 0

def refuse(path):
    if number == 1 and path.name == hidden:
        raise OSError(number_of_error, "refused", str(path))

def stat(path, **options):
    refuse(path)
    return real_stat(path, **options)

def open_file(path, *arguments, **options):
    refuse(path)
    return real_open(path, *arguments, **options)

Path.stat, Path.open = stat, open_file
for step in (1, 2):
    save(step)
dist.barrier()
hidden = "rank-0.safetensors"  # the second of five files, and rank 1 hashes it
for number_of_error in (errno.EIO, errno.ENOENT, errno.EACCES):
    found[errno.errorcode[number_of_error]] = newest()
hidden = None
found["whole"] = newest()
if number == 0:
    (root / "checkpoints" / "step-00000002" / "rank-0.safetensors").unlink()
dist.barrier()
found["missing"] = newest()
"""
_END = """
print(json.dumps(found))
dist.barrier()
"""


def run(program: str, folder: Path) -> list[dict[str, Any]]:
    """What each rank of two has found."""
    both = run_two_ranks(_RANK + program + _END, folder)
    assert not any(one.returncode for one in both), both
    return [json.loads(one.stdout.splitlines()[-1]) for one in both]


@pytest.mark.distributed
def test_a_manifest_has_what_either_rank_has_written(tmp_path: Path) -> None:
    for found in run(_LISTINGS, tmp_path):
        assert found == {
            "files": [
                "progress.json",
                "rank-0.safetensors",
                "rank-1.safetensors",
                "state/zero_pp_rank_0_optim_states.pt",
                "state/zero_pp_rank_1_optim_states.pt",
            ],
            "newest": ["step-00000001", 0],
        }


@pytest.mark.distributed
def test_what_one_rank_cannot_read_sets_nothing_aside_and_ends_all(tmp_path: Path) -> None:
    """What is missing for both is damage."""
    path = tmp_path / "checkpoints" / "step-00000002" / "rank-0.safetensors"
    first, second = run(_READS, tmp_path)
    kinds = {"EIO": "OSError", "ENOENT": "FileNotFoundError", "EACCES": "UserError"}
    for name, kind in kinds.items():
        assert second[name][0] == kind and str(path) in second[name][1], second
        assert first[name][0] == ("UserError" if kind == "UserError" else "RankError"), first
        assert f"rank 1: {kind}: " in first[name][1] and str(path) in first[name][1]
    assert first["whole"] == second["whole"] == ["step-00000002", 0]
    assert first["missing"] == second["missing"] == ["step-00000001", 1]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "latest",
        "step-00000001",
        "step-00000002.damaged",
    }
