"""Padding, sums and compression on disk, against dense matrices."""

import json
from pathlib import Path

import pytest
import torch
from peft import load_peft_weights
from safetensors.torch import load_file

from ship_ds.errors import UserError
from ship_ds.lora_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Lora,
    add,
    compressed,
    read_lora,
    write_lora,
)
from tests.conftest import REPOSITORY


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
        {"r": None},
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


def test_two_folders_of_the_same_modules_have_the_same_settings(tmp_path: Path) -> None:
    """The proof of many adapters puts the second one into the modules of the first."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_lora(tmp_path / name, random_lora(0), "base")
    assert (tmp_path / "a" / ADAPTER_CONFIG).read_text() == (
        tmp_path / "b" / ADAPTER_CONFIG
    ).read_text()


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    write_lora(tmp_path, random_lora(0), "base")
    with (tmp_path / ADAPTER_WEIGHTS).open("r+b") as file:
        file.truncate(900)
    with pytest.raises(UserError, match="save the adapter again"):
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
