"""Padding, sums and compression on disk, against dense matrices."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    load_peft_weights,
)
from safetensors.torch import load_file, save_file

from ship_ds.errors import UserError
from ship_ds.lora_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Lora,
    add,
    compressed,
    factored,
    read_lora,
    read_prefix,
    read_soft_prompt,
    write_lora,
)
from tests.conftest import REPOSITORY
from tests.model.models import HIDDEN, tiny_lm


def random_lora(seed: int, rank: int = 3, scaling: float = 1.5) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    sites = {"model.layers.0.mlp.up_proj": (8, 12), "model.layers.1.mlp.down_proj": (12, 8)}
    return Lora(
        {
            path: (
                torch.randn(rank, num_in, generator=generator),
                torch.randn(num_out, rank, generator=generator),
            )
            for path, (num_in, num_out) in sites.items()
        },
        scaling,
    )


def dense(lora: Lora) -> dict[str, torch.Tensor]:
    return {path: lora.scaling * (b.double() @ a.double()) for path, (a, b) in lora.factors.items()}


def test_padding_keeps_the_function_and_scales_alpha(tmp_path: Path) -> None:
    lora = random_lora(0)
    write_lora(tmp_path, lora.padded(8), "base")
    settings = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert (settings["r"], settings["lora_alpha"]) == (8, 12)
    back = read_lora(tmp_path)
    assert back.rank == 8 and all(
        back.delta(path).equal(lora.padded(8).delta(path)) for path in lora.factors
    )
    for path, wanted in dense(lora).items():
        torch.testing.assert_close(dense(back)[path], wanted)


def test_padding_below_the_rank_is_refused() -> None:
    with pytest.raises(UserError, match="--pad-to 2: the adapter's rank is 3 already"):
        random_lora(0).padded(2)


def test_the_exact_sum_is_the_sum() -> None:
    one, two = random_lora(0), random_lora(1, rank=2, scaling=0.5)
    total = add([(0.25, one), (-2.0, two)])
    assert total.rank == 5
    for path, found in dense(total).items():
        torch.testing.assert_close(
            found, 0.25 * dense(one)[path] - 2.0 * dense(two)[path], atol=1e-5, rtol=1e-5
        )


def test_compression_to_more_than_a_weights_side_is_of_that_rank() -> None:
    """A server reads one rank from adapter_config.json, of weights of any size."""
    whole = add([(1.0, random_lora(0, 10)), (1.0, random_lora(1, 10))])
    for rank in (8, 11, 20):
        small, error = compressed(whole, rank)
        assert error == pytest.approx(0, abs=1e-9)
        for path, (a_RI, b_OR) in small.factors.items():
            assert len(a_RI) == b_OR.shape[1] == rank
            torch.testing.assert_close(small.delta(path), whole.delta(path), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_compression_is_the_best_of_its_rank_and_says_its_error(rank: int) -> None:
    whole = add([(1.0, random_lora(0)), (1.0, random_lora(1))])
    small, error = compressed(whole, rank)
    assert small.rank == rank
    lost = sum(
        float((dense(small)[path] - wanted).square().sum()) for path, wanted in dense(whole).items()
    )
    norm = sum(float(wanted.square().sum()) for wanted in dense(whole).values())
    best = sum(
        float(torch.linalg.svdvals(wanted)[rank:].square().sum())
        for wanted in dense(whole).values()
    )
    assert (
        error
        == pytest.approx((lost / norm) ** 0.5, rel=1e-5)
        == pytest.approx((best / norm) ** 0.5, rel=1e-5)
    )


def test_a_rank_that_the_config_does_not_say_is_one_line(tmp_path: Path) -> None:
    write_lora(tmp_path, random_lora(0), "base")
    settings = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(settings | {"r": 4}))
    with pytest.raises(UserError, match="A has rank 3 and B 3, and adapter_config.json says r=4"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"(a+)+b": 2}},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": "high"}},
        {"alpha_pattern": {"[": 2}},
        {"init_lora_weights": "pissa"},
        {"of_a_newer_peft": 2},
        {"bias": "all"},
        {"peft_type": "IA3"},
        {"peft_type": "NEWER"},
        {"rank_pattern": {f"q_proj{number}": 2 for number in range(513)}},
        {"r": None},
        {"r": 10**400},
        {"lora_alpha": 1e308},
        {"alpha_pattern": {"q_proj": -(10**400)}},
        {"lora_alpha": "high"},
    ],
)
def test_what_is_no_plain_lora_is_refused(setting: dict[str, object], tmp_path: Path) -> None:
    write_lora(tmp_path, random_lora(0), "base")
    settings = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(settings | setting))
    [key] = setting
    with pytest.raises(UserError, match=rf"adapter_config\.json: .*{key}.*") as raised:
        read_lora(tmp_path)
    assert "\n" not in str(raised.value)


def test_what_a_newer_peft_leaves_off_is_no_obstacle(tmp_path: Path) -> None:
    write_lora(tmp_path, random_lora(0), "base")
    settings = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(settings | {"of_a_newer_peft": None}))
    assert read_lora(tmp_path).rank == 3


def test_a_rank_stabilised_lora_is_read_with_its_own_scaling(tmp_path: Path) -> None:
    write_lora(tmp_path, random_lora(0, rank=4), "base")
    settings = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(settings | {"use_rslora": True}))
    assert read_lora(tmp_path).scaling == 6 / 2


def test_what_0_1_0_wrote_is_read_the_same(tmp_path: Path) -> None:
    """It wrote the ten settings that it knew, by hand."""
    lora = random_lora(0)
    write_lora(tmp_path, lora, "base")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": 3,
        "lora_alpha": 4.5,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": ["down_proj", "up_proj"],
        "fan_in_fan_out": False,
    }
    now = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert {key: now[key] for key in settings} == settings
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(settings))
    read = read_lora(tmp_path)
    assert read.scaling == 1.5 and read.factors.keys() == lora.factors.keys()
    for path, (a_RI, b_OR) in lora.factors.items():
        assert read.factors[path][0].equal(a_RI) and read.factors[path][1].equal(b_OR)
    # What peft writes of a base whose linears are Conv1D, as GPT-2's are: the same factors.
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(settings | {"fan_in_fan_out": True}))
    for path, (a_RI, b_OR) in read_lora(tmp_path).factors.items():
        assert read.factors[path][0].equal(a_RI) and read.factors[path][1].equal(b_OR)
    dora = settings | {"fan_in_fan_out": True, "use_dora": True}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(dora))
    with pytest.raises(UserError, match="fan_in_fan_out is True, and that cannot be read here"):
        read_lora(tmp_path, lambda path: torch.zeros(1))


def test_two_folders_of_the_same_modules_have_the_same_settings(tmp_path: Path) -> None:
    """The proof of many adapters puts the second one into the modules of the first."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_lora(tmp_path / name, random_lora(0), "base")
    assert (tmp_path / "a" / ADAPTER_CONFIG).read_text() == (
        tmp_path / "b" / ADAPTER_CONFIG
    ).read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(min(t)), "has lora_B; expected lora_A and lora_B"),
        (lambda t: t[min(t)].fill_(float("nan")), "has values that are no finite numbers"),
        (lambda t: t[max(t)].fill_(float("inf")), "has values that are no finite numbers"),
        (lambda t: t.update({min(t): t[min(t)][None]}), "expected the two matrices of a linear"),
        (
            lambda t: t.update({"base_model.model.embed.lora_embedding_A": torch.ones(3, 9)}),
            "embed: has lora_embedding_A; expected lora_A and lora_B",
        ),
    ],
    ids=["half a pair", "no number", "infinite", "three dimensions", "an embedding"],
)
def test_adapters_of_others_that_are_no_lora_of_linears_are_one_line(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    write_lora(tmp_path, random_lora(0), "base")
    tensors = {name: one.clone() for name, one in load_file(tmp_path / ADAPTER_WEIGHTS).items()}
    change(tensors)
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match=message) as raised:
        read_lora(tmp_path)
    assert "\n" not in str(raised.value)


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    write_lora(tmp_path, random_lora(0), "base")
    with (tmp_path / ADAPTER_WEIGHTS).open("r+b") as file:
        file.truncate(900)
    with pytest.raises(UserError, match="save the adapter again"):
        read_lora(tmp_path)


def test_weights_of_another_format_are_named(tmp_path: Path) -> None:
    write_lora(tmp_path, random_lora(0), "base")
    (tmp_path / ADAPTER_WEIGHTS).rename(tmp_path / "adapter_model.bin")
    missing = rf"{ADAPTER_WEIGHTS}: is missing; "
    with pytest.raises(UserError, match=rf"{missing}adapter_model\.bin is not read here: load"):
        read_lora(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=rf"{missing}save the adapter again"):
        read_lora(tmp_path)


@pytest.mark.parametrize("value", [1e30, 1e15])
def test_factors_whose_product_is_no_number_are_one_line(value: float, tmp_path: Path) -> None:
    """The norm of one, and the square of the other's, are beyond fp32."""
    lora = random_lora(0)
    factors = {
        path: tuple(torch.full_like(one, value) for one in two)
        for path, two in lora.factors.items()
    }
    write_lora(tmp_path, Lora(factors, 1.0), "base")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"mlp\.up_proj: its update has no finite norm"):
        read_lora(tmp_path)


def test_a_factor_beyond_fp32_of_a_product_that_is_not_is_read(
    tmp_path: Path,
) -> None:
    """The square of A's norm alone is infinite there."""
    lora = random_lora(0)
    factors = {
        path: (torch.full_like(a, 1e25), torch.full_like(b, 1e-25))
        for path, (a, b) in lora.factors.items()
    }
    write_lora(tmp_path, Lora(factors, 1.0), "base")
    assert read_lora(tmp_path).factors.keys() == lora.factors.keys()


def test_floats_of_8_bits_are_read(tmp_path: Path) -> None:
    write_lora(tmp_path, random_lora(0), "base")
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    small = {name: one.to(torch.float8_e4m3fn) for name, one in tensors.items()}
    save_file(small, tmp_path / ADAPTER_WEIGHTS)
    for path, (a_RI, _) in read_lora(tmp_path).factors.items():
        name = f"base_model.model.{path}.lora_A.weight"
        assert a_RI.float().equal(small[name].float())


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
def test_what_git_lfs_keeps_elsewhere_is_told_from_damage(name: str, tmp_path: Path) -> None:
    write_lora(tmp_path, random_lora(0), "base")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4976\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(UserError, match=f"{name}: a Git LFS pointer.*`git lfs pull`"):
        read_lora(tmp_path)


def test_an_adapter_of_0_1_0_written_again_is_the_same(tmp_path: Path) -> None:
    """Every tensor to the bit, and every setting that it had."""
    old = REPOSITORY / "tests" / "fixtures" / "v0_1" / "adapter"
    settings = json.loads((old / ADAPTER_CONFIG).read_text())
    write_lora(tmp_path, read_lora(old), settings["base_model_name_or_path"])
    now = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert {key: now[key] for key in settings} == settings
    before, after = (load_file(folder / ADAPTER_WEIGHTS) for folder in (old, tmp_path))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in after)
    loaded = load_peft_weights(str(tmp_path), device="cpu")
    assert all(loaded[name].equal(before[name]) for name in before)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "lora_alpha": 6},
        {"r": 3, "lora_alpha": 6, "use_rslora": True},
        {"r": 3, "lora_alpha": 6, "use_dora": True},
        {
            "r": 4,
            "lora_alpha": 6,
            # The first that matches counts; a name is no part of a longer one.
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 5, "proj": 7},
            "alpha_pattern": {r"^model.layers.1.self_attn.q_proj": 3, r"up_.*": 1},
        },
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2}, "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"up_proj": 2}, "use_dora": True},
        {"r": 2, "lora_alpha": 0, "alpha_pattern": {"q_proj": 3}},
    ],
)
def test_what_is_read_is_what_peft_adds_to_the_weights(
    settings: dict[str, object], tmp_path: Path
) -> None:
    base = tiny_lm("llama")
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, **settings)
    tuned = get_peft_model(base, config)
    for name, parameter in tuned.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.3 * torch.rand_like(parameter))
    tuned.save_pretrained(tmp_path)
    lora = read_lora(tmp_path, lambda path: before[f"{path}.weight"])
    after = tuned.merge_and_unload().state_dict()
    paths = {
        name.removesuffix(".weight") for name in before if "q_proj" in name or "up_proj" in name
    }
    assert lora.factors.keys() == paths and len(paths) == 4
    for path in paths:
        wanted = after[f"{path}.weight"] - before[f"{path}.weight"]
        assert settings["lora_alpha"] == 0 or wanted.norm() > 0.1
        torch.testing.assert_close(lora.delta(path), wanted, atol=2e-5, rtol=1e-3)


def test_a_dora_of_another_base_names_the_module(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], r=2, use_dora=True)
    get_peft_model(tiny_lm("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"layers\.0\.self_attn\.q_proj is 64 -> 64 .* another base"
    ):
        read_lora(tmp_path, lambda path: torch.zeros(64, 32))
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    name = next(name for name in tensors if "magnitude" in name)
    save_file(tensors | {name: torch.ones(3)}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match="3 magnitudes of 64 outputs"):
        read_lora(tmp_path, lambda path: torch.zeros(64, 64))


def test_a_dora_that_peft_has_no_numbers_for_names_the_module(tmp_path: Path) -> None:
    """Of an output whose weights are all zero, `peft` divides by their norm and merges NaN."""
    base = tiny_lm("llama")
    linear = base.get_submodule("model.layers.1.self_attn.q_proj")
    linear.weight.data[5] = 0
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    tuned = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2, use_dora=True))
    tuned.save_pretrained(tmp_path)
    merged = tuned.merge_and_unload().get_submodule("model.layers.1.self_attn.q_proj")
    assert merged.weight[5].isnan().all()
    place = rf"{ADAPTER_WEIGHTS}: model\.layers\.1\.self_attn\.q_proj"
    with pytest.raises(UserError, match=f"{place}: output 5 has no weight but zeros") as raised:
        read_lora(tmp_path, lambda path: weights[f"{path}.weight"])
    assert "\n" not in str(raised.value)
    weights["model.layers.1.self_attn.q_proj.weight"][5, 3] = 1e-30  # whose square is no float
    with pytest.raises(UserError, match=f"{place}: output 5 has no weight but zeros"):
        read_lora(tmp_path, lambda path: weights[f"{path}.weight"])
    weights["model.layers.1.self_attn.q_proj.weight"][5, 3] = 1
    assert read_lora(tmp_path, lambda path: weights[f"{path}.weight"]).factors


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"alpha_pattern": {"q_proj": 10**8}}])
def test_finite_numbers_that_make_an_update_of_none_are_one_line(
    settings: dict[str, object], tmp_path: Path
) -> None:
    base = tiny_lm("llama")
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    config = LoraConfig(
        target_modules=["q_proj", "up_proj"],
        r=2,
        lora_alpha=1,
        init_lora_weights=False,
        **settings,  # type: ignore[arg-type]
    )
    get_peft_model(base, config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    part = "magnitude" if "use_dora" in settings else "lora_B"
    for name in tensors:
        if part in name and "q_proj" in name:
            tensors[name].fill_(1e37)
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj: .* no finite norm"):
        read_lora(tmp_path, lambda path: weights[f"{path}.weight"])


@pytest.mark.parametrize(("rank", "kept"), [(3, 3), (64, 64), (100, 70)])
def test_an_update_is_factored_at_its_own_rank_or_whole(rank: int, kept: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, rank, generator=generator) for n in (90, 70))
    delta = left @ right.T
    for matrix in (delta, delta.T):
        a_RI, b_OR = factored(matrix)
        assert a_RI.shape == (kept, matrix.shape[1]) and b_OR.shape == (matrix.shape[0], kept)
        assert (matrix - b_OR @ a_RI).norm() <= 2e-4 * matrix.norm()
    assert factored(torch.zeros(5, 4))[1].abs().max() == 0


def test_prompts_and_prefixes_of_peft_are_read(tmp_path: Path) -> None:
    shared = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    prompt = get_peft_model(tiny_lm("llama"), PromptTuningConfig(**shared))
    prompt.save_pretrained(tmp_path / "prompt")
    read = read_soft_prompt(tmp_path / "prompt")
    assert read.shape == (3, HIDDEN)
    assert torch.equal(read, prompt.prompt_encoder["default"].embedding.weight)
    # Projected by an MLP while it was trained: what is saved is what comes out of it.
    projected = PrefixTuningConfig(**shared, prefix_projection=True, encoder_hidden_size=8)
    for number, config in enumerate((PrefixTuningConfig(**shared), projected)):
        prefix = get_peft_model(tiny_lm("llama"), config)
        folder = tmp_path / f"prefix{number}"
        prefix.save_pretrained(folder)
        blocks = read_prefix(folder, 2, (2, 16))
        with torch.no_grad():
            cache = prefix.get_prompt(batch_size=1)
        for states, layer in zip(blocks, cache.layers, strict=True):
            torch.testing.assert_close(states[0], layer.keys[0])
            torch.testing.assert_close(states[1], layer.values[0])
    with pytest.raises(UserError, match="192 numbers a position|128 numbers a position"):
        read_prefix(folder, 3, (2, 16))
    with pytest.raises(UserError, match="peft_type is PREFIX_TUNING; expected PROMPT_TUNING"):
        read_soft_prompt(folder)
    with pytest.raises(UserError, match="peft_type is PROMPT_TUNING; expected LORA"):
        read_lora(tmp_path / "prompt")
    save_file({"prompt": read}, tmp_path / "prompt" / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match="has prompt; expected prompt_embeddings"):
        read_soft_prompt(tmp_path / "prompt")
