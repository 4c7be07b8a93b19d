"""The rules of vLLM's LoRA loader, as its source (vllm/lora/lora_model.py, peft_helper.py, utils.py
and vllm/config/lora.py, read in November 2026) states them, put to folders that we write; the
loader itself where it is installed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ship_ds.export.deduce import export_one
from ship_ds.export.requests import Request
from tests.export.models import FAMILIES, PROBES, make_base, make_ship

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be; 16 by default."""
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""vLLM's qkv_proj and gate_up_proj unpacked by its packed_modules_mapping; what it expects of
Llama, Qwen and Mistral."""


def refusals(folder: Path, max_lora_rank: int) -> list[str]:
    """Why vLLM would refuse the folder."""
    settings: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    found = [
        f"{key} is missing" for key in ("r", "lora_alpha", "target_modules") if key not in settings
    ]
    assert max_lora_rank in RANKS
    if settings["r"] > max_lora_rank:
        found.append(f"LoRA rank {settings['r']} is greater than max_lora_rank {max_lora_rank}")
    found += [f"{key} is set" for key in ("modules_to_save", "use_dora") if settings.get(key)]
    if settings.get("bias", "none") != "none":
        found.append("bias")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():
            parts = name.split(".")
            if (
                not name.startswith("base_model.model.")
                or parts[-1] != "weight"
                or parts[-2] not in ("lora_A", "lora_B")
            ):
                found.append(f"{name} is unsupported LoRA weight")
            elif parts[-3] not in LINEARS:
                found.append(f"{name}: unexpected module")
            shape = file.get_slice(name).get_shape()
            if shape[0 if parts[-2] == "lora_A" else 1] != settings["r"]:
                found.append(f"{name}: shape {shape} at rank {settings['r']}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_takes_a_folder_as_it_leaves(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    ship = make_ship(base)
    export_one(ship, Request("a", "reverse the list"), tmp_path / "a", PROBES)
    export_one(ship, Request("a", "reverse the list"), tmp_path / "padded", PROBES, pad_to=32)
    assert not refusals(tmp_path / "a", 8) and not refusals(tmp_path / "padded", 32)
    assert refusals(tmp_path / "padded", 16) == ["LoRA rank 32 is greater than max_lora_rank 16"]
    # Every key names a module of the base: one that did not would be served as the bare base in
    # silence.
    own, theirs = (
        load_file(tmp_path / "a" / "adapter_model.safetensors"),
        load_file(base / "model.safetensors"),
    )
    modules = {name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in own}
    assert modules <= {name.removesuffix(".weight") for name in theirs}


def test_vllm_itself_loads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loader alone runs without a GPU: `pip install --no-deps --target DIR vllm` and what its
    imports then ask for."""
    lora_model = pytest.importorskip("vllm.lora.lora_model", reason="vLLM is not installed")
    monkeypatch.setattr(lora_model, "PIN_MEMORY", torch.cuda.is_available(), raising=False)
    export_one(make_ship("embedded"), Request("a", "reverse the list"), tmp_path / "a", PROBES)
    helper = pytest.importorskip("vllm.lora.peft_helper").PEFTHelper.from_local_dir(
        str(tmp_path / "a"), 128
    )
    loaded = lora_model.LoRAModel.from_local_checkpoint(
        str(tmp_path / "a"), LINEARS, helper, lora_model_id=1, device="cpu"
    )
    assert len(loaded.loras) == 28 and loaded.rank == 4
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for name, found in loaded.loras.items():
        assert found.lora_a.equal(saved[f"base_model.model.{name}.lora_A.weight"])
        assert found.lora_b.equal(saved[f"base_model.model.{name}.lora_B.weight"])
        assert found.scaling == helper.lora_alpha / helper.r
