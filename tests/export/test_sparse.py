"""Sparse deltas as SHiRA folders: what `peft` computes with them, sums, merges, and bad ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from ship_ds.api import Ship
from ship_ds.errors import UserError
from ship_ds.export.compose import compose
from ship_ds.export.deduce import export_many, export_one, generate
from ship_ds.export.merge import Merge
from ship_ds.export.peft_adapter import max_difference
from ship_ds.export.requests import Request
from ship_ds.lora_folder import read_sparse, read_update
from ship_ds.model.adapters.sparse import SparseExport, draw_columns
from tests.export.models import FAMILIES, PROBES, make_base, make_ship, make_t5_base

pytestmark = pytest.mark.slow

TEXTS = ("put 7 at the front", "reverse the list")
SPARSE: dict[str, Any] = {"kind": "sparse", "rank": 3, "width": 32, "num_blocks": 1}
SCATTER: dict[str, Any] = {"kind": "scatter"}


def updates(ship: Ship, texts: tuple[str, ...] = TEXTS) -> list[dict[str, torch.Tensor]]:
    """What each text's adapter does to the weights of every linear."""
    found = []
    for _, export in generate(ship, [Request("x", text) for text in texts]):
        assert isinstance(export, SparseExport)
        deltas = {}
        for path, values_X in export.values.items():
            columns_XO = draw_columns(path, export.sites[path], len(values_X))
            delta_OI = torch.zeros(export.sites[path][::-1])
            for number, value in enumerate(values_X.tolist()):
                row, layer = number % len(delta_OI), number // len(delta_OI)
                delta_OI[row, columns_XO[layer, row]] = value
            deltas[path] = delta_OI
        found.append(deltas)
    return found


@pytest.mark.parametrize("quantisation", ["nf4", "none"])
@pytest.mark.parametrize("kind", [SPARSE, SCATTER], ids=["sparse", "scatter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_equals_the_live_adapter(
    family: str, kind: dict[str, Any], quantisation: str, tmp_path: Path
) -> None:
    """Several in one go, whose modules `peft` puts in once."""
    ship = make_ship(make_base(tmp_path / "base", family), quantisation=quantisation, **kind)
    requests = [Request(f"r{number}", text) for number, text in enumerate(TEXTS)]
    batch = export_many(ship, requests, tmp_path / "many", PROBES)
    assert batch.worst.from_live <= 1e-4 < 0.1 < batch.worst.from_base
    settings = json.loads((tmp_path / "many" / "r0" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "SHIRA" and settings["r"] == (3 if kind == SPARSE else 1)
    assert len(settings["target_modules"]) == (7 if kind == SPARSE else 14)
    card = (tmp_path / "many" / "r1" / "README.md").read_text()
    assert f"sparse delta (SHiRA), {3072 if kind == SPARSE else 64} weights of" in card
    for number, wanted in enumerate(updates(ship)):
        shapes = {path: tuple(delta_OI.shape) for path, delta_OI in wanted.items()}
        read = read_sparse(tmp_path / "many" / f"r{number}", shapes.get)  # type: ignore[arg-type]
        assert read.shapes == shapes
        for path, delta_OI in wanted.items():
            torch.testing.assert_close(read.delta(path), delta_OI, atol=1e-6, rtol=1e-5)


def test_both_stacks_of_a_t5_leave_as_a_folder(tmp_path: Path) -> None:
    roles = {"base": "embedded"}
    ship = make_ship(
        make_t5_base(tmp_path / "base"),
        quantisation="none",
        encoder=roles,
        decoder=roles,
        targets=["all-linear"],
        **SPARSE,
    )
    proof = export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    assert proof.from_live <= max_difference(proof.from_base) < 0.01 < proof.from_base
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_2_SEQ_LM" and len(settings["target_modules"]) == 18


def test_a_sum_is_exact_and_has_no_rank(tmp_path: Path) -> None:
    ship = make_ship(make_base(tmp_path / "base"), **SPARSE)
    parts = [(0.5, TEXTS[0]), (-1.0, TEXTS[1])]
    made = compose(ship, parts, tmp_path / "sum", PROBES)
    assert (made.rank, made.error) == (3, 0.0) and made.proof.from_live <= 1e-4
    one, two = updates(ship)
    shapes = {path: tuple(delta_OI.shape) for path, delta_OI in one.items()}
    saved = read_sparse(tmp_path / "sum", shapes.get)  # type: ignore[arg-type]
    for path, delta_OI in one.items():
        torch.testing.assert_close(saved.delta(path), 0.5 * delta_OI - two[path])
    with pytest.raises(UserError, match=r"--rank 2: sparse delta.*nothing to compress"):
        compose(ship, parts, tmp_path / "small", PROBES, rank=2)
    with pytest.raises(UserError, match=r"--pad-to: sparse delta.*has no rank"):
        export_one(ship, Request("a", TEXTS[0]), tmp_path / "b", PROBES, pad_to=8)


@pytest.mark.parametrize("kind", [SPARSE, SCATTER], ids=["sparse", "scatter"])
def test_a_merged_model_is_the_base_plus_the_delta(kind: dict[str, Any], tmp_path: Path) -> None:
    ship = make_ship(make_base(tmp_path / "base"), quantisation="none", **kind)
    export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    Merge(tmp_path / "a", "original").run(tmp_path / "out")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "out"))
    [wanted] = updates(ship, TEXTS[:1])
    changed = 0
    for name, weight in before.items():
        delta_OI = wanted.get(name.removesuffix(".weight"), torch.zeros(()))
        assert after[name].equal((weight.float() + delta_OI).to(weight.dtype)), name
        changed += int((after[name] != weight).sum())
    assert changed > (2500 if kind == SPARSE else 50)


def test_another_base_or_other_places_are_one_line(tmp_path: Path) -> None:
    ship = make_ship(make_base(tmp_path / "base"), **SPARSE)
    export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    lm = ship.model.task_llm.lm
    site = "model.layers.1.mlp.up_proj"
    places = f"base_model.model.{site}.shira_indices"

    def refused(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, path)
        with pytest.raises(UserError) as caught:
            ship.model.hypernetwork.read(tmp_path / "a", lm)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    moved = tensors[places].clone()
    moved[1] = (moved[1] + 1) % 64
    assert f"{site}: changes weights that this run's adapters leave" in refused(
        tensors | {places: moved}
    )
    twice = tensors[places].clone()
    twice[:, 1] = twice[:, 0]
    assert f"{site}: places (2, 576) of 576 numbers" in refused(tensors | {places: twice})
    outside = tensors[places].clone()
    outside[0, 0] = 128
    assert "or damaged" in refused(tensors | {places: outside})
    assert "or damaged" in refused(tensors | {places: tensors[places][:, :-1].contiguous()})
    assert "shira_weight" in refused({k: v for k, v in tensors.items() if k != places})
    assert "no finite numbers" in refused(tensors | {places: tensors[places].float()})
    renamed = {name.replace("layers.1", "layers.0"): one for name, one in tensors.items()}
    assert "changes model.layers.0" in refused(renamed)
    assert "has no tensors" in refused({})
    save_file(tensors, path)
    # The same weights in another order are the same adapter.
    order = torch.randperm(576)
    values = places.replace("indices", "weight")
    other = {places: tensors[places][:, order], values: tensors[values][order]}
    read = ship.model.hypernetwork.read(tmp_path / "a", lm)
    save_file(tensors | other, path)
    again = ship.model.hypernetwork.read(tmp_path / "a", lm)
    assert torch.equal(read.tensors()[site], again.tensors()[site])
    with pytest.raises(UserError, match="none of the linears that can change here"):
        read_update(tmp_path / "a", {}.get)


def test_what_peft_cannot_hold_is_one_line(tmp_path: Path) -> None:
    """One r for all: a linear with few inputs or outputs may have fewer weights than that asks."""
    sites = {"a": (64, 64), "b": (64, 2)}
    values = {"a": torch.ones(512), "b": torch.ones(8)}
    columns = {path: draw_columns(path, sites[path], len(values[path])) for path in sites}
    export = SparseExport(values, columns, sites)
    lm = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 64), "b": torch.nn.Linear(64, 2)})
    with pytest.raises(UserError, match=r"one r for all, here 4, and b \(64 -> 2\) has not so"):
        export.write(tmp_path, "base", lm)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=5, n_positions=9))
    path = "transformer.h.0.mlp.c_proj"
    conv = SparseExport(
        {path: torch.ones(40)}, {path: draw_columns(path, (32, 8), 40)}, {path: (32, 8)}
    )
    with pytest.raises(UserError, match="peft's SHiRA takes no Conv1D, which GPT2LMHeadModel's"):
        conv.write(tmp_path, "base", gpt2)
    assert not list(tmp_path.iterdir())
