"""Every shipped file is one that DeepSpeed takes."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from ship_ds.errors import UserError
from ship_ds.runtime.deepspeed_config import FOLDER, offloads_optimiser, read_deepspeed_config

STAGES = {
    "cpu": 2,
    "zero1": 1,
    "zero2": 2,
    "zero3": 3,
    "zero3_bf16": 3,
    "zero3_hpz": 3,
    "zero3_offload_cpu": 3,
    "zero3_offload_nvme": 3,
    "zero3_shard_all": 3,
}


def test_no_file_is_untested() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == STAGES.keys()


@pytest.mark.parametrize("name", STAGES)
def test_deepspeed_reads_it(name: str) -> None:
    config = read_deepspeed_config(name)
    read = DeepSpeedConfig({**config, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 8})
    assert read.zero_optimization_stage == STAGES[name]
    assert offloads_optimiser(config) == ("offload" in name)


def test_a_file_with_a_key_of_the_run_or_without_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"gradient_clipping": 1.0}))
    with pytest.raises(UserError, match="gradient_clipping: comes from the run's config"):
        read_deepspeed_config(str(path))
    path.write_text(json.dumps({"fp16": {"enabled": True}}))
    with pytest.raises(UserError, match="fp16: not supported"):
        read_deepspeed_config(str(path))
    path.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_deepspeed_config(str(path))
