"""Every shipped file is one that DeepSpeed takes."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)

from ship_ds.config import OptimiserConfig, TrainingConfig
from ship_ds.errors import UserError
from ship_ds.runtime import engine
from ship_ds.runtime.deepspeed_config import (
    FOLDER,
    complete,
    offloads_optimiser,
    read_deepspeed_config,
)

_OF_OTHER_MACHINERY = {
    # deprecated spellings
    "cpu_offload_param", "cpu_offload_use_pin_memory", "cpu_offload", "legacy_stage1",
    "stage3_gather_fp16_weights_on_model_save",
    # newer than the oldest DeepSpeed that pyproject.toml takes, which would refuse it
    "compute_grad_norm",
    # features that no file here turns on
    "zenflow", "stage3_model_persistence_threshold", "pipeline_loading_checkpoint",
    "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
    "save_muon_momentum_buffer_in_memory", "mics_shard_size", "mics_hierarchical_params_gather",
    "zeropp_loco_param", "parameter_alignment", "super_offload", "cpuadam_cores_perc",
    "offload_param", "offload_optimizer", "nvme_path",
}  # fmt: skip

STAGES = {
    "cpu": 2,
    "zero1": 1,
    "zero1_bf16": 1,
    "zero2": 2,
    "zero2_bf16": 2,
    "zero2_bf16_offload_optimiser": 2,
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
    read = DeepSpeedConfig(
        {**complete(config, 8), "train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}
    )
    assert read.zero_optimization_stage == STAGES[name]
    assert offloads_optimiser(config) == ("offload" in name)


@pytest.mark.parametrize("name", STAGES)
def test_nothing_is_left_to_the_defaults_of_a_version(name: str) -> None:
    """Clipping, the check for overflow and pinned memory had others before; so may the rest."""
    training = TrainingConfig(steps=1, deepspeed=name)
    settings = engine._settings(OptimiserConfig(), training, ["LlamaDecoderLayer"])
    zero = settings["zero_optimization"]
    assert settings["gradient_clipping"] == 1.0 and settings["optimizer"]["params"]["eps"] == 1e-8
    assert settings["bf16"].keys() == DeepSpeedBF16Config.model_fields.keys()
    for part, kind in (
        ("offload_param", DeepSpeedZeroOffloadParamConfig),
        ("offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
    ):
        if part in zero:
            assert not set(kind.model_fields) - zero[part].keys() - _OF_OTHER_MACHINERY
    fields = {field.alias or key for key, field in DeepSpeedZeroConfig.model_fields.items()}
    assert not fields - zero.keys() - _OF_OTHER_MACHINERY


def test_accumulation_in_fp32_beside_bf16_at_stage_1_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    own = read_deepspeed_config("zero1_bf16") | {"data_types": {"grad_accum_dtype": "fp32"}}
    path.write_text(json.dumps(own))
    with pytest.raises(UserError, match="grad_accum_dtype: fp32 beside bf16 and stage 1"):
        read_deepspeed_config(str(path))


def test_a_group_of_a_node_follows_its_ranks() -> None:
    hpz = read_deepspeed_config("zero3_hpz")
    assert complete(hpz, 4)["zero_optimization"]["zero_hpz_partition_size"] == 4
    assert (
        complete(hpz | {"zero_optimization": {"stage": 3}})["zero_optimization"][
            "zero_hpz_partition_size"
        ]
        == 1
    )


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


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], "expected an object of settings"),
        ({"bf16": True}, "bf16: expected an object, such as"),
        (
            {"zero_optimization": 2},
            "zero_optimization: expected an object, such as .*stage",
        ),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled: "auto" is filled in by transformers'),
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"}},
            'zero_optimization.stage3_prefetch_bucket_size: "auto" is filled in',
        ),
        (
            {"zero_optimization": {"stage": True}},
            "zero_optimization.stage: true: expected a value such as 2",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}},
            'zero_optimization.reduce_bucket_size: "5e8": expected a value such as 500000000',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": "cpu"}},
            "zero_optimization.offload_param: expected an object",
        ),
        ({"bf16": {"enabled": 1}}, "bf16.enabled: expected true or false"),
        ({}, "zero_optimization.stage: expected 1, 2 or 3, got None"),
        ({"zero_optimization": {"stage": 0}}, "expected 1, 2 or 3, got 0"),
    ],
)
def test_a_file_of_another_form_is_one_line(values: object, line: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=line):
        read_deepspeed_config(str(path))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{}".encode("utf-16"), "byte 0: not UTF-8"),
        (b'{"zero_optimization": {"stage": 2}, "zero_optimization": {}}', "is there twice"),
        (b"// zero 2\n{}", "line 1: not JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_usable_json_is_one_line(
    content: bytes, line: str, tmp_path: Path
) -> None:
    (tmp_path / "own.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"own\.json: .*{line}"):
        read_deepspeed_config(str(tmp_path / "own.json"))


def test_leaf_modules_of_a_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 3, "leaf_module": {"names": ["mlp"]}}})
    )
    training = TrainingConfig(deepspeed=str(path))
    leaves = engine._settings(OptimiserConfig(), training, ["Block"])["zero_optimization"]
    assert leaves["leaf_module"] == {"names": ["mlp"], "classes": ["Block"]}
