"""Merged model folders: bit for bit what the definition says, loaded by transformers, whole or not
there at all."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ship_ds import cli
from ship_ds.api import Ship
from ship_ds.config import base_folder
from ship_ds.errors import UserError
from ship_ds.export.convert import describe, merge_into
from ship_ds.export.deduce import export_one
from ship_ds.export.drift import drift
from ship_ds.export.merge import Merge
from ship_ds.export.peft_adapter import live_logits
from ship_ds.export.requests import Request
from ship_ds.export.targets import default_target, quantised_names
from ship_ds.lora_folder import read_lora
from ship_ds.model.loading import load_lm
from ship_ds.model.nf4 import Nf4, pieces_of
from tests.conftest import REPOSITORY, start_warm
from tests.export.models import FAMILIES, PROBES, make_base, make_ship

pytestmark = pytest.mark.slow

TEXT = "put 7 at the front"


def made(
    folder: Path, family: str = "llama", tied: bool = False, shard_size: str = "5GB"
) -> tuple[Path, Path, Ship]:
    """Base, adapter and the live model."""
    ship = make_ship(make_base(folder / "base", family, tied, shard_size))
    export_one(ship, Request("a", TEXT), folder / "adapter", PROBES)
    return folder / "base", folder / "adapter", ship


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_original_is_the_definition_bit_for_bit(family: str, tied: bool, tmp_path: Path) -> None:
    base, adapter, _ = made(tmp_path, family, tied, shard_size="60KB")
    Merge(adapter, "original", shard_gigabytes=5e-5).run(tmp_path / "out")
    lora, before, after = read_lora(adapter), tensors(base), tensors(tmp_path / "out")
    assert before.keys() == after.keys() and len(lora.factors) == 14
    for name, weight in before.items():
        path = name.removesuffix(".weight")
        wanted = weight
        if path in lora.factors:
            a_RI, b_OR = lora.factors[path]
            wanted = (weight.float() + 6 / 4 * (b_OR @ a_RI)).to(torch.bfloat16)
            assert not wanted.equal(weight)
        assert after[name].dtype == torch.bfloat16 and after[name].equal(wanted), name
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(before) and len(set(index["weight_map"].values())) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and loaded.config.tie_word_embeddings is tied
    for name in (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "out" / "plan.json").exists() and not (tmp_path / "out.part").exists()


def test_peft_merges_the_same_unless_it_merges_safely(tmp_path: Path) -> None:
    """Its default adds an fp32 update to the 16-bit weight in place, which rounds once, as we do.
    `safe_merge=True` rounds the update to 16 bits first and the sum again, so that it is off by a
    unit in the last place here and there."""
    base, adapter, _ = made(tmp_path)
    Merge(adapter, "original").run(tmp_path / "out")
    ours = tensors(tmp_path / "out")
    differing = {}
    for safely in (False, True):
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), str(adapter)
        )
        theirs = model.merge_and_unload(safe_merge=safely).state_dict()
        differing[safely] = sum(
            int((theirs[name] != tensor).sum()) for name, tensor in ours.items()
        )
        for name, tensor in ours.items():
            gap = (theirs[name].float() - tensor.float()).abs()
            assert bool((gap <= tensor.float().abs() * 2**-7 + 2**-9).all()), name
    assert differing[False] == 0 < differing[True]


def test_dequantised_is_what_training_saw_plus_the_adapter(tmp_path: Path) -> None:
    base, adapter, ship = made(tmp_path)
    report = Merge(adapter, "dequantised", dtype="float32").run(
        tmp_path / "out", lambda part: drift(part, adapter, base)
    )
    assert (
        report["logit_drift"] < 1e-3 < 0.1 < report["adapter_effect"]
        and report["same_next_token"] == 1
    )
    ids = ship.model.question(PROBES[0])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        live = live_logits(ship, ship.model.adapt(ship.model.encode([TEXT])), ids)
        torch.testing.assert_close(loaded(torch.tensor([ids])).logits[0], live, atol=1e-3, rtol=0)


def test_without_a_target_the_adapter_is_added_to_what_training_saw(tmp_path: Path) -> None:
    _, adapter, _ = made(tmp_path)
    merge = Merge(adapter)
    assert merge.plan.target == "dequantised" and not merge.differs_from_training
    assert default_target("none") == "original"
    assert "warning" not in describe(
        tmp_path / "out", merge, merge_into(tmp_path / "out", merge, True)
    )


def test_merging_into_weights_that_training_did_not_see_warns_and_says_how_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter, _ = made(tmp_path)
    assert (
        cli.main(["merge", str(adapter), "--out", str(tmp_path / "out"), "--target", "original"])
        == 0
    )
    warning = capsys.readouterr().out.splitlines()[-1].strip()
    share = json.loads((tmp_path / "out" / "merge.json").read_text())["drift_of_effect"]
    assert share > 0.005 and f"as much as {100 * share:.0f} % of what the adapter does" in warning
    assert warning.startswith("warning: ") and warning.endswith(
        "--target dequantised keeps what was learnt"
    )


def test_nf4_again_is_bitsandbytes_own_and_counts_what_rounding_lost(tmp_path: Path) -> None:
    base, adapter, _ = made(tmp_path, shard_size="60KB")
    report = Merge(adapter, "nf4", shard_gigabytes=3e-5).run(
        tmp_path / "out", lambda part: drift(part, adapter, base)
    )
    lora, before, loaded = (
        read_lora(adapter),
        tensors(base),
        load_lm(str(tmp_path / "out"), "none", torch.bfloat16),
    )
    quantised, lost, update = 0, 0.0, 0.0
    for path, module in loaded.named_modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        weight, quantised = before[f"{path}.weight"], quantised + 1
        seen = (
            Nf4.of(weight.shape, torch.bfloat16, pieces_of(weight, torch.float32))
            .pieces()(0, weight.numel())
            .view_as(weight)
        )
        merged = seen + lora.delta(path)
        wanted = Nf4.of(weight.shape, torch.bfloat16, pieces_of(merged, torch.float32))
        assert module.weight.data.equal(wanted.packed) and module.weight.quant_state.absmax.equal(
            wanted.state.absmax
        )
        lost += float(
            (wanted.pieces()(0, weight.numel()) - merged.flatten()).double().square().sum()
        )
        update += float(lora.delta(path).double().square().sum())
    assert quantised == 14 and report["num_shards"] > 2
    assert report["rounding_error_of_update"] == pytest.approx((lost / update) ** 0.5, rel=1e-6)
    assert 0 < report["logit_drift"] < report["adapter_effect"]
    stored = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert stored == report


def test_what_nf4_holds_is_asked_of_transformers() -> None:
    lm = load_lm("embedded", "nf4", torch.float32)
    quantised = {
        f"{path}.weight"
        for path, module in lm.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
    assert (
        quantised_names(base_folder("embedded")) == quantised and "lm_head.weight" not in quantised
    )


def test_untouched_weights_keep_their_codes(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    export_one(
        make_ship(base, targets=["q_proj"]), Request("a", TEXT), tmp_path / "adapter", PROBES
    )
    Merge(tmp_path / "adapter", "nf4").run(tmp_path / "out")
    trained_on, merged = (
        load_lm(str(base), "nf4", torch.float32),
        load_lm(str(tmp_path / "out"), "none", torch.float32),
    )
    for path in ("self_attn.k_proj", "mlp.down_proj"):
        left, right = (
            model.get_submodule(f"model.layers.1.{path}").weight.data
            for model in (trained_on, merged)
        )
        assert left.equal(right)


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_nothing_or_what_says_it_is_incomplete(tmp_path: Path) -> None:
    """Before and after writes, renames and the publishing; then the same command finishes it, with
    the same bytes."""
    _, adapter, _ = made(tmp_path, shard_size="60KB")
    done = start_warm(["-m", "tests.export.killed_merge", str(adapter), str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) > 12 and all(row["same"] and not row["both"] for row in rows), rows
    assert {row["left"] for row in rows} == {"nothing", "part", "whole"}
    assert max(row["kept"] for row in rows) > 2


def test_another_merge_does_not_go_on_in_the_same_place(tmp_path: Path) -> None:
    _, adapter, _ = made(tmp_path)
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="is left from another merge"):
        Merge(adapter, "original").run(tmp_path / "out")
    assert (tmp_path / "out.part" / "plan.json").read_text() == "{}"


def test_wrong_bases_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, _ = made(tmp_path, shard_size="60KB")
    other = make_base(tmp_path / "other", seed=1)
    capsys.readouterr()

    def said(base: Path) -> str:
        assert (
            cli.main(["merge", str(adapter), "--base", str(base), "--out", str(tmp_path / "out")])
            == 2
        )
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1 and not shown.out and not list(tmp_path.glob("out*"))
        return shown.err

    assert "same shapes, other weights than the base" in said(other)
    assert "and the base has one of (128, 384): wrong base" in said(
        REPOSITORY / "ship_ds" / "assets" / "tiny_lm"
    )
    assert "expected a model folder" in said(tmp_path / "none")
    shards = sorted(base.glob("*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-5])
    assert f"{shards[1]}: cut short: has {len(content) - 5} bytes of {len(content)}" in said(base)
    shards[1].unlink()
    assert f"{shards[1]}: this file is missing" in said(base)


def test_an_adapter_whose_weights_were_exchanged_is_refused(tmp_path: Path) -> None:
    _, adapter, ship = made(tmp_path)
    export_one(ship, Request("b", "reverse the list"), tmp_path / "b", PROBES)
    shutil.copyfile(
        tmp_path / "b" / "adapter_model.safetensors", adapter / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match="not the file that its ship.json lists"):
        Merge(adapter, "original")


def test_a_base_that_was_not_quantised_has_no_dequantised_form(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    export_one(make_ship(base, quantisation="none"), Request("a", TEXT), tmp_path / "a", PROBES)
    with pytest.raises(UserError, match="use original"):
        Merge(tmp_path / "a", "dequantised")
    merge = Merge(tmp_path / "a", "original", dtype="float32")
    report = merge.run(tmp_path / "out", lambda part: drift(part, tmp_path / "a", base))
    assert report["logit_drift"] < 1e-3


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own needs root")
def test_a_full_disk_is_one_line_and_the_finished_shards_stay(tmp_path: Path) -> None:
    _, adapter, _ = made(tmp_path, shard_size="60KB")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)], check=False
    ).returncode:
        pytest.skip("no mount in this container")
    try:
        with pytest.raises(
            UserError, match=r"No space left on device: .*out\.part keeps the finished shards"
        ) as full:
            Merge(adapter, "original", shard_gigabytes=5e-5).run(small / "out")
        assert "\n" not in str(full.value)
        left = sorted(path.name for path in (small / "out.part").glob("model*"))
        assert (
            left
            and not any(name.endswith(".part") for name in left)
            and not (small / "out").exists()
        )
        with pytest.raises(UserError, match="No space left on device: nothing was written"):
            export_one(make_ship("embedded"), Request("a", TEXT), small / "adapter", PROBES)
        assert not list(small.glob("adapter*"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
        report = Merge(adapter, "original", shard_gigabytes=5e-5).run(small / "out")
        assert report["num_shards_kept"] == len(left)
    finally:
        subprocess.run(["umount", str(small)], check=True)
