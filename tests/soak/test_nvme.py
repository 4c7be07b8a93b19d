"""ZeRO-3 with parameters and optimiser state on a local disk by libaio; DeepSpeed's op for it compiles for some minutes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator

from ship_ds.runtime.deepspeed_config import read_deepspeed_config
from tests.conftest import REPOSITORY, environment
from tests.runtime.test_resume import LOSSES

pytestmark = pytest.mark.soak
SAYS = "DeepSpeed does not take Adam's moments back from NVMe: they start anew"


def train(folder: Path, deepspeed: str) -> str:
    """Four steps on two ranks, a checkpoint after two. Gives what it printed."""
    settings = [
        f"run.folder={folder}", f"training.deepspeed={deepspeed}", "training.steps=4", "checkpoint.every_steps=2",
        "evaluation.every_steps=0", "evaluation.ends_with_report=false",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ship_ds.train"]
    done = subprocess.run(
        [*launcher, "--config", "quickstart-smoke", *settings], cwd=REPOSITORY, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def losses(folder: Path) -> list[tuple[float, ...]]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[name] for name in LOSSES) for row in rows]


def test_nvme_trains_as_offload_to_memory_does_and_says_what_a_resume_loses(tmp_path: Path) -> None:
    if not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible():
        pytest.skip("DeepSpeed's async_io cannot be built here: apt-get install libaio-dev")
    config = read_deepspeed_config("zero3_offload_nvme")
    (tmp_path / "disk").mkdir()
    for part in ("offload_param", "offload_optimizer"):
        config["zero_optimization"][part]["nvme_path"] = str(tmp_path / "disk")
    (tmp_path / "nvme.json").write_text(json.dumps(config))
    run = tmp_path / "nvme"
    assert SAYS not in train(run, str(tmp_path / "nvme.json"))
    train(tmp_path / "memory", "zero3_offload_cpu")
    whole = losses(run)
    assert len(whole) == 4 and whole == losses(tmp_path / "memory")
    (run / "checkpoints" / "step-00000004").rename(tmp_path / "aside")
    assert SAYS in train(run, str(tmp_path / "nvme.json"))
    again = losses(run)
    assert len(again) == 4 and again[:3] == whole[:3], "the weights came back"
    assert again[3] != whole[3], "the moments came back: take out what says that they do not"
