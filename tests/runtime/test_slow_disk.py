"""Two ranks on a disk that does not show both of them the same, as NFS may: what is no damage is
taken for none."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, environment

_TWO_RANKS = """
import errno, json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from ship_ds.config import CheckpointConfig
from ship_ds.runtime import checkpoint, ranks
number, root = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=number, world_size=2)
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
_END = """
print(json.dumps(found))
dist.barrier()
"""


def run(program: str, folder: Path) -> list[dict[str, Any]]:
    """What each rank of two has found."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _TWO_RANKS + program + _END, str(rank), str(folder)],
            cwd=REPOSITORY,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(not process.returncode for process in processes), outputs
    return [json.loads(said.splitlines()[-1]) for said, _ in outputs]


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
