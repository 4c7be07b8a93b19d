"""The planner's arithmetic: counts against the real model and published sizes, the verdict, the
command."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import DeepseekV3Config

from ship_ds import cli
from ship_ds.config import Config, base_folder, load_config
from ship_ds.errors import UserError
from ship_ds.model import nf4
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.loading import read_settings
from ship_ds.planner.activations import Workload, count_activations
from ship_ds.planner.evaluation import PlannedPass
from ship_ds.planner.plan import RESERVED, Machines, advise, make_plan
from ship_ds.planner.shapes import Shapes, Weight, build_shapes, meta_lm, pattern, public_shapes
from ship_ds.planner.show import verdict, warnings_of
from ship_ds.planner.zero import Zero, held_by_a_rank, traffic
from ship_ds.runtime.deepspeed_config import complete
from tests.export.models import make_t5_base

pytestmark = pytest.mark.slow

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
}

LORA_ROLES = [
    f"model.{role}={{quantisation: nf4, tuning: {{kind: lora, rank: 2}}}}"
    for role in ("encoder", "decoder")
]


def test_public_shapes_have_their_published_number_of_parameters() -> None:
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in meta_lm(name, torch.bfloat16).parameters())
            for name in public_shapes()
        }
    assert counts == PUBLISHED


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.hypernetwork.heads=per_layer"],
        ["model.hypernetwork={kind: soft_prompt}"],
        [
            "model.encoder={quantisation: nf4, tuning: {kind: lora, rank: 4}}",
            "model.decoder.tuning={kind: lora, rank: 2}",
        ],
        ["model.backbone=shared", *LORA_ROLES],
        ["model.encoder.pooling=attention"],
        ["model.hypernetwork={kind: sparse}"],
    ],
    ids=["full", "per_layer", "soft_prompt", "lora", "shared", "pooling", "sparse"],
)
def test_the_shapes_are_those_of_the_real_model(overrides: list[str]) -> None:
    config = load_config("quickstart-smoke", overrides).model
    shapes, model = build_shapes(config, torch.float32), build_ship(config, LoadedWeights())
    real = {
        "encoder": model.encoder,
        "hypernetwork": model.hypernetwork,
        "decoder": model.decoder,
        "task LLM": model.task_llm,
    }
    for part, module in real.items():
        expected = {
            name: (getattr(p, "quant_state", None) is not None, p.requires_grad)
            for name, p in module.named_parameters()
        }
        assert {
            weight.path: (weight.is_nf4, weight.is_trained) for weight in shapes.weights(part)
        } == expected
    counts = model.parameter_counts()
    for part in ("encoder", "decoder", "task LLM"):
        assert sum(weight.numel for weight in shapes.weights(part)) == counts[part]
    scales = [weight.quant_state_bytes for weight in shapes.weights("task LLM")]
    states = [
        p.quant_state
        for p in model.task_llm.parameters()
        if getattr(p, "quant_state", None) is not None
    ]
    tensors = [[s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code] for s in states]
    assert sum(scales) == pytest.approx(sum(t.nbytes for ts in tensors for t in ts), rel=0.01)


def test_defaults_are_deepspeeds() -> None:
    names = {
        field.alias or name: field.default
        for name, field in DeepSpeedZeroConfig.model_fields.items()
    }
    filled_in = complete({})["zero_optimization"]
    planned = (
        "reduce_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_max_reuse_distance",
        "zero_hpz_partition_size",
    )
    assert {key: names[key] for key in planned} == {key: filled_in[key] for key in planned}


def _small(*overrides: str) -> Config:
    """The embedded model in bf16 with buckets that do not dwarf it."""
    return load_config(
        "quickstart", ["training.deepspeed=zero3_bf16", "training.tasks_per_step=64", *overrides]
    )


@pytest.mark.slow
def test_a_shared_base_is_planned_once() -> None:
    """On two ranks that shard every weight of the engine: the Task LLM's copy is whole beside it,
    those of encoder and decoder are shared out and gathered."""
    sharding = "training.deepspeed=zero3_shard_all"
    three, one = (
        make_plan(_small(*LORA_ROLES, sharding, f"model.backbone={kind}"), Machines(1, 2, 10**12))
        for kind in ("separate", "shared")
    )
    assert three.parameters["trained"] == one.parameters["trained"]
    assert 2.7 < three.parameters["frozen"] / one.parameters["frozen"] <= 3
    assert three.memory["quantisation scales"] == 3 * one.memory["quantisation scales"]
    assert three.memory["4-bit weights"] == 2 * one.memory["4-bit weights"]
    assert one.traffic.total < three.traffic.total


def test_sharding_divides_what_it_says() -> None:
    one, eight = (make_plan(_small(), Machines(1, gpus, 10**12)) for gpus in (1, 8))
    assert one.memory["optimiser state"] == 12 * one.parameters["trained"]
    assert eight.memory["optimiser state"] == pytest.approx(one.memory["optimiser state"] / 8)
    assert one.traffic.total == 0 and eight.traffic.total > 0
    assert eight.memory["activations, decoder"] == pytest.approx(
        one.memory["activations, decoder"] / 8, rel=0.01
    )


def test_gradients_of_one_bucket_come_when_the_activations_are_gone() -> None:
    """ZeRO-2 makes room for them at the first bucket that is full; a second micro-batch meets those
    of the first."""
    one, two = (
        make_plan(
            _small("training.deepspeed=zero2_bf16", f"training.accumulation={number}"),
            Machines(1, 2, 10**12),
        )
        for number in (1, 2)
    )
    trained = one.parameters["trained"]
    assert (one.memory["gradients"], two.memory["gradients"]) == (0, trained)


def test_a_replicated_base_costs_memory_and_saves_traffic() -> None:
    settings = ["training.deepspeed=zero3_shard_all", "training.tasks_per_step=64"]
    replicated, sharded = (
        make_plan(
            load_config("quickstart", [*settings, f"model.task_llm.shard={shard}"]),
            Machines(1, 8, 10**12),
        )
        for shard in ("never", "always")
    )
    packed = replicated.memory["4-bit weights"]
    assert sharded.memory["4-bit weights"] == pytest.approx(packed / 8)
    more = sharded.traffic.wire["weights, gathered"] - replicated.traffic.wire["weights, gathered"]
    frozen = sharded.parameters["task LLM"] - 2 * packed  # embeddings, output layer and norms, fp32
    assert more == pytest.approx((packed + 4 * frozen) * 7 / 8, rel=0.001)


def test_a_base_that_three_roles_read_is_gathered_for_each() -> None:
    """Unless what is gathered once stays until its next use, a whole base later."""
    base, trained = Weight("b", 10**9, False, False), Weight("t", 10**6, True, False)
    shared = replace(base, reads=(3, 3))

    def gathered(one: Weight, reuse: float, recomputed: Sequence[Weight] = ()) -> int:
        settings = {"stage": 3, "stage3_max_reuse_distance": int(reuse)}
        zero = Zero.read({"bf16": {"enabled": True}, "zero_optimization": settings}, 2)
        return traffic(zero, [one, trained], 1, recomputed).wire["weights, gathered"]

    whole = 2 * 10**9 // 2  # of the base in bf16, half of which a rank of two sends
    for reuse in (1e6, 0.9e9):
        more = gathered(shared, reuse) - gathered(base, reuse)
        assert more == pytest.approx(4 * whole, rel=1e-6)
    assert gathered(shared, 1.1e9) == gathered(base, 1.1e9)
    embedding = replace(base, reads=(3, 0))
    assert gathered(base, 1e6) - gathered(replace(base, reads=(1, 0)), 1e6) == pytest.approx(
        whole, rel=1e-3
    )
    assert gathered(embedding, 1e6) == pytest.approx(3 * whole, rel=1e-2)
    assert gathered(base, 0, [base, base]) - gathered(base, 0) == pytest.approx(2 * whole)
    assert gathered(base, 1e6, [base, base]) == gathered(base, 1e6)


def test_how_often_the_roles_read_a_weight() -> None:
    """The encoder gives states alone; before frozen embeddings nothing has a gradient."""

    def reads(*settings: str) -> tuple[tuple[int, int], ...]:
        """Of the Task LLM's embeddings, a linear in a block and the output layer."""
        config = _small(*LORA_ROLES, *settings)
        weights = build_shapes(config.model, torch.bfloat16, config.loss).weights("task LLM")
        found = {weight.path.removeprefix("lm."): weight.reads for weight in weights}
        linear = next(path for path in found if "q_proj" in path)
        return tuple(found[one] for one in ("model.embed_tokens.weight", linear, "lm_head.weight"))

    assert reads("model.backbone=shared") == ((3, 0), (3, 3), (2, 2))
    assert reads("model.backbone=shared", "loss.reconstruction=0") == ((2, 0), (2, 2), (1, 1))
    assert reads("model.backbone=separate") == ((1, 0), (1, 1), (1, 1))
    whole = _small("model.encoder.tuning={kind: full}")
    encoder = build_shapes(whole.model, torch.bfloat16, whole.loss).weights("encoder")
    assert {weight.reads for weight in encoder} == {(1, 1)}, "its embeddings are trained"


def test_what_stays_for_the_next_role_is_there_whole() -> None:
    base = Weight("b", 10**9, False, False)
    layers = [Weight(f"b{i}", 10**8, False, False) for i in range(10)]

    def held(weights: Sequence[Weight], reuse: float) -> int:
        zero = {"stage": 3, "stage3_max_reuse_distance": int(reuse)}
        zero |= {"stage3_prefetch_bucket_size": 0}
        settings = Zero.read({"bf16": {"enabled": True}, "zero_optimization": zero}, 2)
        return held_by_a_rank(settings, weights, []).gpu["gathered layers"]

    shared = [replace(one, reads=(3, 3)) for one in layers]
    assert held(shared, 1e9) == 2 * base.numel > held(layers, 1e9)
    assert held(shared, 0.9e9) == held(layers, 0.9e9) < 2 * base.numel


@pytest.mark.slow
def test_each_role_that_recomputes_gathers_once_more(tmp_path: Path) -> None:
    """A base that is shared as often as one of the role's own."""
    zero = {
        "stage": 3,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    file = f"training.deepspeed={tmp_path / 'zero.json'}"
    offload = [file, "model.task_llm.shard=always", *LORA_ROLES]

    def sent(backbone: str, *roles: str) -> int:
        settings = [f"model.{role}.checkpointing=true" for role in roles]
        config = _small(*offload, f"model.backbone={backbone}", *settings)
        return make_plan(config, Machines(1, 2, 10**12)).traffic.wire["weights, gathered"]

    for backbone in ("separate", "shared"):
        none, one, three = (
            sent(backbone, *roles)
            for roles in ((), ("encoder",), ("encoder", "decoder", "task_llm"))
        )
        assert three - none == pytest.approx(3 * (one - none), rel=1e-6) and one > none


@pytest.mark.slow
def test_advice_is_followed_until_it_fits() -> None:
    recomputed = [f"model.{role}.checkpointing=true" for role in ("task_llm", "decoder", "encoder")]
    machines = Machines(1, 8, 10**12)
    plan, checkpointed = (make_plan(_small(*settings), machines) for settings in ([], recomputed))
    assert checkpointed.needed < plan.needed
    tight = replace(plan, machines=Machines(1, 8, checkpointed.needed - 1))
    changes = advise(tight)
    assert [change.overrides[0] for change in changes[:3]] == recomputed
    assert not any(change.plan.fits for change in changes[:3])
    assert changes[-1].overrides[0].startswith("training.accumulation=") and changes[-1].plan.fits
    assert f"fits with {' '.join(recomputed)} training.accumulation=" in verdict(tight, changes)


def test_more_ranks_than_tasks_is_one_line() -> None:
    with pytest.raises(UserError, match=r"tasks_per_step \(8\) must be a multiple of ranks"):
        make_plan(load_config("quickstart-smoke"), Machines(2, 8, 80 * 10**9))


def test_offloaded_terms_are_the_hosts() -> None:
    settings: dict[str, Any] = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}
    }
    zero = Zero.read(settings, 4)
    assert (zero.optimiser_on, zero.parameters_on, zero.dtype_bytes) == ("nvme", "gpu", 4)
    plan = make_plan(
        _small("training.deepspeed=zero3_offload_cpu", "model.task_llm.shard=always"),
        Machines(1, 8, 80 * 10**9),
    )
    assert {
        "optimiser state",
        "gradients",
        "4-bit weights",
    } <= plan.host.keys() and "optimiser state" not in plan.memory


@pytest.mark.slow
def test_plan_as_a_user_types_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        "--config",
        "pretrain-7b",
        "--shapes",
        "llama-2-7b",
        "--gpus",
        "8",
        "--gpu-memory",
        "80",
    ]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["needed"] == sum(found["memory"].values()) + found["reserved"]
    assert cli.main(arguments) == 0
    assert "fits: " in capsys.readouterr().out.splitlines()[-1]
    assert cli.main([*arguments, "--gpu-memory", "4"]) == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("does not fit: ")


def test_missing_base_names_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--config", "pretrain-7b"]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "--shapes" in shown.err and not shown.out
    assert cli.main(["plan", "--config", "pretrain-7b", "--shapes", "gpt"]) == 2


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.hypernetwork={kind: soft_prompt}", "model.task_llm.instruction=hard"],
        ["model.encoder.pooling=attention"],
        ["model.hypernetwork={kind: bottleneck}", "model.encoder.max_examples=2"],
        ["model.hypernetwork={kind: bottleneck}", "loss.reconstruction=0"],
        ["model.hypernetwork={kind: sparse}"],
        ["model.hypernetwork={kind: scatter, num_blocks: 1}"],
    ],
    ids=["lora", "soft_prompt", "pooling", "bottleneck", "no_decoder", "sparse", "scatter"],
)
def test_what_is_kept_for_the_backward_pass_is_that_of_the_real_model(overrides: list[str]) -> None:
    """The same forward on the meta device and on real weights, to the byte; the peak, for which
    the two have other kernels, within a tenth.

    The buffer for dequantised weights, which is a CPU's alone, is alive but kept for nothing.
    """
    whole = load_config("quickstart-smoke", overrides)
    config, loss = whole.model, whole.loss
    model = build_ship(config, LoadedWeights(), loss).train()
    work = Workload(2, 3, 9, 14, 5, 2)
    planned = count_activations(build_shapes(config, torch.float32, loss), work)
    real = count_activations(Shapes(config, torch.float32, model, frozenset()), work)
    buffer = nf4._scratch.buffers.get(torch.float32)
    without_buffer = real.kept["task LLM"] - (0 if buffer is None else buffer.nbytes)
    assert (planned.kept, planned.adapters, planned.logits) == (
        real.kept | {"task LLM": without_buffer},
        real.adapters,
        real.logits,
    )
    assert planned.peak == pytest.approx(real.peak, rel=0.1)
    assert min(planned.kept["task LLM"], planned.logits) > 0


def test_an_instruction_that_fades_is_planned_in_every_prompt() -> None:
    """As it is in the first step; the run with `hard` keeps it."""
    fading, hard, none = (
        make_plan(_small(*more), Machines(1, 1, 10**12)).memory["activations, task LLM"]
        for more in (["model.task_llm.fading_steps=9"], ["model.task_llm.instruction=hard"], [])
    )
    assert fading == hard > none


def test_compiled_loops_keep_and_hold_less() -> None:
    """For the backward pass of SwiGLU gate and up alone, not what silu makes of gate. Two plans are
    compared: torch compiles nothing under what counts the bytes of a real model."""
    work = Workload(2, 3, 9, 14, 5, 2)
    eager, compiled = (
        count_activations(
            build_shapes(load_config("quickstart-smoke", more).model, torch.float32), work
        )
        for more in ([], ["model.elementwise=compiled"])
    )
    config = read_settings(base_folder("embedded"))
    of_a_token = 4 * config.intermediate_size * config.num_hidden_layers
    for part, num_tokens in {"encoder": 2 * 9, "task LLM": 2 * 3 * (14 + 5)}.items():
        assert eager.kept[part] - compiled.kept[part] == num_tokens * of_a_token
    assert compiled.peak < eager.peak


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_two_stacks_are_planned_as_they_compute(checkpointing: str, tmp_path: Path) -> None:
    """As above, around a T5: what each block's bias by distance becomes is kept, too."""
    overrides = [
        f"model.task_llm.base={make_t5_base(tmp_path)}",
        *(f"model.{role}.base=embedded" for role in ("encoder", "decoder")),
        "model.task_llm.quantisation=none",
        f"model.task_llm.checkpointing={checkpointing}",
        "model.hypernetwork={kind: lora, targets: all-linear}",
    ]
    config = load_config("quickstart-smoke", overrides).model
    model, work = build_ship(config, LoadedWeights()).train(), Workload(2, 3, 9, 14, 5, 2)
    shapes = build_shapes(config, torch.float32)
    planned = count_activations(shapes, work)
    real = count_activations(Shapes(config, torch.float32, model, frozenset()), work)
    assert planned.kept["task LLM"] == pytest.approx(real.kept["task LLM"], rel=0.02)
    assert (planned.adapters, planned.logits) == (real.adapters, real.logits)
    assert planned.peak == pytest.approx(real.peak, rel=0.1)
    assert sum(weight.numel for weight in shapes.weights("task LLM")) == sum(
        parameter.numel() for parameter in model.task_llm.parameters()
    )


def test_learned_queries_are_in_a_plans_counts() -> None:
    """Three queries of two heads over H = 128, and an MLP that reads all three."""
    settings = "model.encoder.pooling={kind: attention, num_queries: 3, num_heads: 2}"
    plain, pooled = (make_plan(_small(*more), Machines(1, 1, 10**12)) for more in ([], [settings]))
    more = 128 * 3 * 2 + (3 - 1) * 128 * 2 * 128
    for part in ("encoder", "trained"):
        assert pooled.parameters[part] - plain.parameters[part] == more, part
    kept = "activations, encoder"
    assert pooled.memory[kept] > plain.memory[kept]
    assert pooled.memory["optimiser state"] - plain.memory["optimiser state"] == 12 * more


def test_a_deep_model_is_counted_by_two_shallow_ones(tmp_path: Path) -> None:
    """What grows with the layers, of roles of different depths, to the byte; the peak about."""
    for name, layers in (("deep", 12), ("middling", 10)):
        settings = read_settings(base_folder("embedded"))
        settings.num_hidden_layers = layers
        settings.save_pretrained(tmp_path / name)
    bases = [
        f"model.{role}.base={tmp_path / name}"
        for role, name in (("task_llm", "deep"), ("encoder", "middling"))
    ]
    config = load_config("quickstart-smoke", bases).model
    shapes, work = build_shapes(config, torch.float32), Workload(2, 3, 9, 14, 5, 2)
    assert len(shapes.shallow) == 2
    extrapolated, whole = (
        count_activations(one, work) for one in (shapes, replace(shapes, shallow=()))
    )
    assert (extrapolated.kept, extrapolated.adapters, extrapolated.logits) == (
        whole.kept,
        whole.adapters,
        whole.logits,
    )
    assert extrapolated.peak == pytest.approx(whole.peak, rel=0.05)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("aaaaaa", (0, 1)),
        ("baaaaa", (1, 1)),
        ("aabaab", (0, 3)),
        ("cabababa", (1, 2)),
        ("", (0, 1)),
    ],
)
def test_the_pattern_in_which_blocks_go_on_is_found(blocks: str, expected: tuple[int, int]) -> None:
    assert pattern(blocks) == expected


def test_a_deep_model_whose_blocks_differ_is_counted_by_whole_turns(tmp_path: Path) -> None:
    """Three dense blocks before those with experts, which two and four layers have hardly any
    of."""
    settings = DeepseekV3Config(
        **{
            "vocab_size": 512,
            "hidden_size": 64,
            "num_hidden_layers": 14,
            "first_k_dense_replace": 3,
        },
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256},
        **{"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16},
        **{"v_head_dim": 16, "intermediate_size": 64, "moe_intermediate_size": 128},
        **{"n_group": 1, "topk_group": 1, "n_routed_experts": 8, "num_experts_per_tok": 4},
    )
    settings.save_pretrained(tmp_path)
    bases = [f"model.task_llm.base={tmp_path}", "model.hypernetwork={targets: [o_proj]}"]
    shapes = build_shapes(load_config("quickstart-smoke", bases).model, torch.bfloat16)
    assert [one.depths["task LLM"] for one in shapes.shallow] == [4, 6]
    work = Workload(2, 3, 9, 14, 5, 2)
    extrapolated, whole = (
        count_activations(one, work) for one in (shapes, replace(shapes, shallow=()))
    )
    assert extrapolated.kept == whole.kept
    assert extrapolated.peak == pytest.approx(whole.peak, rel=0.05)


def test_a_deep_model_by_layer_is_planned(tmp_path: Path) -> None:
    """Its z parts into ten shares, which two or four blocks have no equal parts of."""
    settings = read_settings(base_folder("embedded"))
    settings.num_hidden_layers = 10
    settings.save_pretrained(tmp_path / "deep")
    overrides = [
        "model.latent_size=50",
        "model.encoder.pooling={kind: attention, num_queries: 10, shares: true}",
        "model.hypernetwork={kind: combination, parts: [{latent: by_layer}, {kind: bottleneck}]}",
        f"model.task_llm.base={tmp_path / 'deep'}",
    ]
    shapes = build_shapes(load_config("quickstart-smoke", overrides).model, torch.float32)
    work = Workload(2, 3, 9, 14, 5, 2)
    extrapolated, whole = (
        count_activations(one, work) for one in (shapes, replace(shapes, shallow=()))
    )
    assert extrapolated.adapters == whole.adapters
    assert extrapolated.kept["task LLM"] == whole.kept["task LLM"]


@pytest.mark.parametrize("num_blocks", ["2", "3", "null"])
def test_a_deep_model_with_deltas_in_its_last_blocks_is_planned(
    num_blocks: str, tmp_path: Path
) -> None:
    """Blocks below them keep nothing for a backward pass that ends above."""
    settings = read_settings(base_folder("embedded"))
    settings.num_hidden_layers = 10
    settings.save_pretrained(tmp_path / "deep")
    overrides = [
        f"model.hypernetwork={{kind: sparse, num_blocks: {num_blocks}}}",
        f"model.task_llm.base={tmp_path / 'deep'}",
    ]
    shapes = build_shapes(load_config("quickstart-smoke", overrides).model, torch.float32)
    assert len(shapes.shallow) == 2
    work = Workload(2, 3, 9, 14, 5, 2)
    extrapolated, whole = (
        count_activations(one, work) for one in (shapes, replace(shapes, shallow=()))
    )
    assert extrapolated.adapters == whole.adapters
    assert extrapolated.kept == whole.kept
    assert extrapolated.peak == pytest.approx(whole.peak, rel=0.05)


def test_checkpointing_keeps_less_and_needs_less_at_the_peak() -> None:
    work = Workload(4, 4, 9, 40, 5, 2)
    whole, checkpointed = (
        count_activations(
            build_shapes(
                load_config("quickstart", [f"model.task_llm.checkpointing={value}"]).model,
                torch.float32,
            ),
            work,
        )
        for value in ("false", "true")
    )
    assert checkpointed.kept["task LLM"] < whole.kept["task LLM"] / 3
    assert checkpointed.peak < whole.peak


def test_one_rank_copies_offloaded_weights_to_its_gpu() -> None:
    offloaded = _small("training.deepspeed=zero3_offload_cpu", "model.task_llm.shard=always")
    alone, two = (make_plan(offloaded, Machines(1, gpus, 10**12)) for gpus in (1, 2))
    assert alone.memory["gathered layers"] == two.memory["gathered layers"] > 0
    assert make_plan(_small(), Machines(1, 1, 10**12)).memory["gathered layers"] == 0


def test_hpz_sends_frozen_weights_between_nodes_once_a_run() -> None:
    settings = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    plain = Zero.read(settings, 16)
    hpz = Zero.read(
        {**settings, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, 16
    )
    frozen, trained = Weight("f", 10**9, False, False), Weight("t", 10**8, True, False)
    before, after = (traffic(zero, [frozen, trained], 2) for zero in (plain, hpz))
    assert before.wire["weights, gathered"] > 2 * 2 * 10**9 * 15 / 16
    assert after.wire["weights, gathered"] == int(2 * 10**8 * 15 / 16)
    assert after.wire["gradients, reduced"] == before.wire["gradients, reduced"]
    inside = before.wire["weights, gathered"] * 16 / 15 - 2 * 10**8
    assert after.inside_node == pytest.approx(inside * 7 / 8, rel=1e-6)


def test_a_run_that_could_train_and_not_evaluate_does_not_fit() -> None:
    overrides = ["training.tasks_per_step=8", "evaluation.every_steps=100"]
    plan = make_plan(_small(*overrides, "evaluation.max_new_tokens=4000"), Machines(1, 8, 10**12))
    assert plan.evaluation_needs_most
    training, evaluating = (sum(terms.values()) for terms in (plan.memory, plan.evaluating))
    tight = replace(plan, machines=Machines(1, 8, RESERVED + (training + evaluating) // 2))
    assert not tight.fits
    assert verdict(tight, []).startswith("does not fit: 3.0 GB of 3.0 GB, while it evaluates; ")
    silent = make_plan(
        _small(*overrides, "evaluation.every_steps=0", "evaluation.ends_with_report=false"),
        Machines(1, 8, 10**12),
    )
    assert not silent.passes and not silent.evaluating


def test_an_answer_costs_its_keys_and_values() -> None:
    """Of a row: prompt and new tokens, 4 layers, 4 heads of 32, keys and values in bf16."""
    few, many = (
        {one.name: one for one in _passes(f"evaluation.max_new_tokens={number}")}
        for number in (1000, 2000)
    )
    name = "answers to prompts"
    assert many[name].num_bytes - few[name].num_bytes == 1000 * 2 * 4 * 4 * 32 * 2


def test_rows_are_answered_by_what_is_free() -> None:
    few, many = (make_plan(_small(), Machines(1, 8, size * 10**9)) for size in (4, 40))
    assert many.rows_at_once > 10 * few.rows_at_once > 10
    assert make_plan(_small(), Machines(1, 8, 10**6)).rows_at_once == 1


def _passes(*overrides: str) -> list[PlannedPass]:
    return make_plan(_small(*overrides), Machines(1, 8, 10**12)).passes


def test_a_hypernetwork_of_billions_is_pointed_out() -> None:
    plan = make_plan(_small("model.hypernetwork.heads=per_layer"), Machines(1, 8, 10**12))
    assert warnings_of(plan) == []
    huge = replace(plan, parameters={**plan.parameters, "hypernetwork": 2_600_000_000})
    (line,) = warnings_of(huge)
    assert "2.6 billion weights" in line and "31.2 GB" in line and "per_module" in line


def test_one_pass_of_two_roles_is_planned_where_it_is_one() -> None:
    """It launches half a role less, and its heaviest block holds the tokens of both."""
    role = "{quantisation: nf4, checkpointing: true, tuning: {kind: lora, rank: 4, dropout: %s}}"
    plans = {}
    for dropout in (0, 0.1):
        for stage in (2, 3):
            config = _small(
                "model.backbone=shared",
                f"model.encoder={role % dropout}",
                f"model.decoder={role % dropout}",
                "model.task_llm={quantisation: nf4, checkpointing: true, shard: never}",
                f"training.deepspeed=zero{stage}_bf16",
            )
            plans[dropout, stage] = make_plan(config, Machines(1, 2, 10**12))
    blocks = {key: plan.forecast.kernels / 230 for key, plan in plans.items()}
    assert blocks == {(0, 2): 2.5 * 4, (0, 3): 3 * 4, (0.1, 2): 3 * 4, (0.1, 3): 3 * 4}
    working = {key: plan.memory["working memory"] for key, plan in plans.items()}
    assert working[0, 2] > 1.1 * working[0, 3]
    read = {key: "activations, decoder" in plan.memory for key, plan in plans.items()}
    assert read == {(0, 2): False, (0, 3): True, (0.1, 2): True, (0.1, 3): True}


def test_the_forecast_is_the_longest_of_its_three_terms() -> None:
    short, long = (
        make_plan(_small(f"training.tasks_per_step={tasks}"), Machines(2, 8, 10**12)).forecast
        for tasks in (16, 16 * 64)
    )
    assert long.useful_flops == pytest.approx(64 * short.useful_flops, rel=1e-3)
    assert short.computing == pytest.approx(short.useful_flops / 217e12)
    assert short.launching == pytest.approx(short.kernels * 70e-6)
    assert short.kernels == 230 * 3 * 4  # three roles of four blocks
    traffic = make_plan(_small("training.tasks_per_step=16"), Machines(2, 8, 10**12)).traffic
    assert short.sending == pytest.approx(traffic.total / 50e9 + traffic.inside_node / 300e9)
    assert short.seconds == max(short.computing, short.sending, short.launching)
    assert long.launching == short.launching and long.sending == short.sending
    assert "not measured" in short.in_words() and "217 TFLOP/s" in short.in_words()
