"""Every shipped file is one that DeepSpeed takes."""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.config import (
    _REMOVED_TOP_LEVEL_CONFIG_KEYS,
    DeepSpeedConfig,
    DtypeEnum,
)
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from torch import nn

from ship_ds.config import OptimiserConfig, TrainingConfig
from ship_ds.errors import UserError
from ship_ds.runtime import deepspeed_config, engine
from ship_ds.runtime.deepspeed_config import (
    CONFIGS_FOLDER,
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
    assert {path.stem for path in CONFIGS_FOLDER.glob("*.json")} == STAGES.keys()


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
        (
            {"bf16": {"enbled": True}},
            r"bf16\.enbled: DeepSpeed has no such setting here; did you mean enabled\?",
        ),
        (
            {"bfloat16": {"enabled": True}, "zero_optimization": {"stage": 2}},
            'bfloat16: an old name, which is not read here: write "bf16": {"enabled": true}',
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 1}},
            r"stage3_prefetch_bucket: .*; did you mean stage3_prefetch_bucket_size\?",
        ),
        # DeepSpeed's own name for it, under which it refuses the one that is always written.
        (
            {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 1}},
            r"prefetch_bucket_size: .*; did you mean stage3_prefetch_bucket_size\?",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}},
            r'offload_param\.device: "gpu": expected one of "cpu", "none", "nvme"',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"pin_memory": "often"}}},
            r'offload_param\.pin_memory: expected true or false, got "often"',
        ),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            'cpu_offload: an old name.* write .*offload_optimizer: {"device": "cpu"}',
        ),
        (
            {"zero_optimization": {"stage": 2}, "overlap_comm": True},
            r"json: overlap_comm: .*; did you mean zero_optimization\.overlap_comm\?",
        ),
        (
            {"zero_optimization": {"stage": 2}, "aio": {"thread_count": 1}},
            r"aio\.thread_count: an old name.* write aio\.intra_op_parallelism",
        ),
        (
            {"zero_optimization": {"stage": 2}, "nebula": {"enabled": False}},
            "nebula: DeepSpeed has no such setting here: take it out",
        ),
        (
            {"zero_optimization": {"stage": 2}, "fp16": None},
            'fp16: expected an object, such as {"enabled": false}',
        ),
        ({}, "zero_optimization.stage: expected 1, 2 or 3, got None"),
        ({"zero_optimization": {"stage": 0}}, "expected 1, 2 or 3, got 0"),
    ],
)
def test_a_file_of_another_form_is_one_line(values: object, line: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=line):
        read_deepspeed_config(str(path))


VALUES = (
    *(None, True, False, 0, 1, 2, 0.5, -1, 5e8, math.nan, math.inf),
    *("cpu", "bf16", "mean", [], ["a"], {}),
)


@pytest.mark.parametrize("name", [*deepspeed_config._names(deepspeed_config._KNOWN)])
def test_deepspeed_takes_each_value_that_is_taken(name: str, tmp_path: Path) -> None:
    """Nothing is left to a traceback of its own; but what two settings are together it says."""
    section, _, key = name.rpartition(".")
    taken = []
    for value in VALUES:
        values: dict[str, Any] = {"zero_optimization": {"stage": 2}}
        inner = values
        for part in filter(None, section.split(".")):
            inner = inner.setdefault(part, {})
        inner[key] = value
        (tmp_path / "own.json").write_text(json.dumps(values))
        with contextlib.suppress(UserError):
            config = complete(read_deepspeed_config(str(tmp_path / "own.json")))
            if (name, value) not in TOGETHER:
                DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **config})
            taken.append(value)
    assert taken or name in {"zero_optimization", *deepspeed_config._OWNED_BY_RUN}


TOGETHER = (
    ("aio.use_gds", True),
    ("bf16.bf16_optimizer_states", True),
    ("zero_optimization.offload_optimizer.ratio", 0.5),
    ("zero_optimization.offload_optimizer.ratio", 0),
)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"comms_logger": {"enbled": True}}, "CommsLoggerConfig: enbled: unknown key"),
        ({"timers": {"throughput": 3}}, "TypeError: .* must be a mapping, not int"),
        ({"checkpoint": {"tag_validation": "maybe"}}, "invalid tag_validation value of MAYBE"),
        ({"bf16": {"bf16_optimizer_states": True}}, "requires bf16_master_weights_and_grads"),
    ],
)
def test_what_deepspeed_alone_can_say_is_one_line_too(
    values: dict[str, Any], line: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | values))
    training = TrainingConfig(deepspeed=str(path))
    with pytest.raises(UserError, match=rf"^training\.deepspeed: .*refuses it: .*{line}"):
        engine.check_deepspeed_reads(OptimiserConfig(), training)


def test_the_known_names_are_those_that_deepspeed_reads() -> None:
    known = deepspeed_config._KNOWN
    zero = known["zero_optimization"]
    for section, kind in (
        (known["bf16"], DeepSpeedBF16Config),
        (known["fp16"], DeepSpeedFP16Config),
        (zero, DeepSpeedZeroConfig),
        (zero["leaf_module"], DeepSpeedZeroLeafModuleConfig),
        (zero["offload_optimizer"], DeepSpeedZeroOffloadOptimizerConfig),
        (zero["offload_param"], DeepSpeedZeroOffloadParamConfig),
    ):
        names = {
            field.alias or name
            for name, field in kind.model_fields.items()
            if not (field.json_schema_extra or {}).get("deprecated")
        }
        # It ends a run that sets this one.
        assert section.keys() == names - {"legacy_stage1"}
    assert known["aio"].keys() == AIO_DEFAULT_DICT.keys()
    is_text = {one for one in DtypeEnum._value2member_map_ if isinstance(one, str)}
    assert set(known["data_types"]["grad_accum_dtype"]) == is_text - {"torch.int8", "int8"}


def test_the_known_sections_are_those_that_deepspeed_asks_for() -> None:
    asked: set[str] = set()

    class Asked(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

        def keys(self) -> Any:
            return self

    DeepSpeedConfig(Asked(train_micro_batch_size_per_gpu=1))
    gone = _REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()
    # Asked for by `deepspeed.initialize`.
    mesh = {"data_parallel_size", "sequence_parallel_size"}
    assert deepspeed_config._KNOWN.keys() == (asked - gone - {"bfloat16"}) | mesh


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


def test_what_travels_is_named_in_letters_of_any_size(tmp_path: Path) -> None:
    """As DeepSpeed reads it; devices it does not."""
    path = tmp_path / "own.json"
    settings = {"communication_data_type": "FP32", "zero_optimization": {"stage": 2}}
    path.write_text(json.dumps(settings))
    assert read_deepspeed_config(str(path)) == settings
    path.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "CPU"}}}')
    with pytest.raises(UserError, match='offload_optimizer.device: "CPU": expected one of "cpu"'):
        read_deepspeed_config(str(path))


def test_a_comment_at_the_top_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"_comment": {"of": "us"}, "zero_optimization": {"stage": 2}}')
    assert read_deepspeed_config(str(path))["zero_optimization"] == {"stage": 2}
    path.write_text('{"zero_optimization": {"stage": 2, "_comment": "DeepSpeed refuses it here"}}')
    with pytest.raises(UserError, match=r"zero_optimization\._comment: DeepSpeed has no such"):
        read_deepspeed_config(str(path))


def _ask_deepspeed(**_: object) -> None:
    """What it refuses itself."""
    deepspeed.DeepSpeedConfig({"train_batch_size": 3, "train_micro_batch_size_per_gpu": 2})


def _ask_torch(**_: object) -> None:
    """A fault of ours, that torch meets below it."""
    torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=-1.0)


@pytest.mark.parametrize(("fail", "is_the_files"), [(_ask_deepspeed, True), (_ask_torch, False)])
def test_only_what_deepspeed_itself_refuses_is_the_files_fault(
    fail: Callable[..., None], is_the_files: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its engine is made; what else fails there keeps its class and its trace."""
    monkeypatch.setattr(deepspeed, "initialize", fail)
    with pytest.raises(UserError if is_the_files else ValueError) as raised:
        engine.Engine(nn.Linear(1, 1), OptimiserConfig(), TrainingConfig(steps=1))
    assert isinstance(raised.value, UserError) is is_the_files
    assert not is_the_files or "DeepSpeed refuses it" in str(raised.value)


def test_leaf_modules_of_a_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 3, "leaf_module": {"names": ["mlp"]}}})
    )
    training = TrainingConfig(deepspeed=str(path))
    leaves = engine._settings(OptimiserConfig(), training, ["Block"])["zero_optimization"]
    assert leaves["leaf_module"] == {"names": ["mlp"], "classes": ["Block"]}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"prescale_gradients": True}, "prescale_gradients: true: DeepSpeed divides no gradients"),
        ({"gradient_predivide_factor": 2}, "gradient_predivide_factor: 2: DeepSpeed divides no"),
        ({"comet": {"enabled": True}}, "comet.enabled: the library comet_ml is not installed"),
        ({"vocabulary_size": 2**63}, "vocabulary_size: 9223372036854775808: expected a value such"),
    ],
)
def test_what_deepspeed_refuses_with_its_engine_is_said_before(
    values: dict[str, Any], line: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | values))
    with pytest.raises(UserError, match=line):
        read_deepspeed_config(str(path))


@pytest.mark.parametrize(
    ("key", "breaks", "works", "need"),
    [
        ("zero_optimization.elastic_checkpoint", True, False, "its checkpoints lack what a run"),
        ("zero_optimization.zenflow", {}, None, "the optimiser is torch's AdamW"),
        ("checkpoint.load_universal", True, False, "from DeepSpeed's plain checkpoints"),
        ("checkpoint.writer", {"type": "FAST"}, None, "DeepSpeed's plain writer"),
        ("datastates_ckpt", None, False, "DeepSpeed's plain writer"),
        ("datastates_ckpt", {}, False, "DeepSpeed's plain writer"),
        ("managed_gradient_accumulation", False, True, "which micro-batch is a step's last"),
        ("hybrid_engine.enabled", True, False, "DeepSpeed's plain engine"),
        ("expert_parallel.enabled", True, False, "every rank takes a share"),
        ("gradient_allreduce_op", "sum", "mean", "for the mean over ranks"),
        ("sequence_parallel_size", 2, 1, "every rank takes a share"),
        ("tensor_parallel.autotp_size", 2, 1, "every rank takes a share"),
        ("torch_autocast.enabled", True, False, r"bf16\.enabled makes these bf16"),
        ("data_efficiency.enabled", True, False, "chosen by the run's config"),
        ("flops_profiler.enabled", True, False, r"training\.profile says"),
    ],
)
def test_what_the_trainer_cannot_go_on_with_is_refused(
    key: str, breaks: Any, works: Any, need: str, tmp_path: Path
) -> None:
    """DeepSpeed takes each of these; the values that work may stand."""
    path = tmp_path / "own.json"
    *sections, name = key.split(".")
    for value in (breaks, works):
        values: dict[str, Any] = {"zero_optimization": {"stage": 2}}
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
        path.write_text(json.dumps(values))
        if value is breaks:
            with pytest.raises(UserError, match=rf"json: {key}: .*{need}.*: take it out$"):
                read_deepspeed_config(str(path))
        else:
            assert read_deepspeed_config(str(path)) == values


def test_stage_1_scatters_no_gradients_and_may_scale_them_first(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization": {"stage": 1}, "prescale_gradients": true}')
    assert read_deepspeed_config(str(path))["prescale_gradients"]


@pytest.mark.slow
def test_a_file_that_deepspeed_alone_refuses_leaves_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ship_ds import train

    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "comms_logger": {"enbled": true}}')
    run = tmp_path / "run"
    overrides = [f"training.deepspeed={path}", f"run.folder={run}"]
    assert train.main(["--config", "quickstart-smoke", *overrides]) == 2
    assert "DeepSpeed refuses it" in capsys.readouterr().err and not run.exists()
