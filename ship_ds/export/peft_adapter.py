"""A LoRA that the hypernetwork made, as a PEFT folder that has been proved before it is left behind.

An adapter whose keys match nothing is served as the bare base in silence. So each export is loaded back with `peft` on the
same NF4 base: its logits on probe prompts must equal the live hypernetwork's and differ from the base's.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ship_ds.bundle import Ship, publish
from ship_ds.config import LoraHypernetworkConfig
from ship_ds.errors import UserError
from ship_ds.model.adapters import LoraAdapter
from ship_ds.model.backbone import base_folder, load_lm

MAX_DIFFERENCE = 1e-4
"""Largest logit difference in fp32 between the exported adapter and the live hypernetwork."""


@dataclass(frozen=True)
class Proof:
    """Largest absolute logit differences over the probe prompts."""

    from_live: float
    from_base: float


def export_lora(ship: Ship, instruction: str, folder: Path, probes: Sequence[str]) -> Proof:
    """Write the PEFT folder for one instruction. Raises UserError, leaving nothing behind, when the proof fails."""
    config = ship.config.model.hypernetwork
    if not isinstance(config, LoraHypernetworkConfig):
        raise UserError(f"deduce: this run's hypernetwork makes {config.kind}, not lora; train with model.hypernetwork.kind=lora")
    if folder.exists():
        raise UserError(f"{folder}: already there; name a new folder or remove it")
    adapter = ship.model.adapt(ship.model.encode([instruction]))
    assert isinstance(adapter, LoraAdapter)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _write(part, ship, instruction, adapter, config)
        proof = prove(ship, adapter, part, probes)
        publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return proof


def _write(part: Path, ship: Ship, instruction: str, adapter: LoraAdapter, config: LoraHypernetworkConfig) -> None:
    tensors = {}
    for path, (a_TRI, b_TOR) in adapter.factors.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a_TRI[0].contiguous().clone()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b_TOR[0].contiguous().clone()
    save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
    base = ship.config.model.task_llm.base
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.rank,
        "lora_alpha": config.alpha, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "target_modules": sorted({path.rpartition(".")[2] for path in adapter.factors}), "fan_in_fan_out": False,
    }
    (part / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    card = (
        f"---\nlibrary_name: peft\n---\n# An adapter made from an instruction\n\n- instruction: {instruction}\n- base: {base}\n"
        f"- run: {ship.config.run.folder}, weights sha256 {ship.digest}\n"
        f"- rank {config.rank}, scaling {config.alpha / config.rank}\n"
        f"- prompt format: {json.dumps(ship.model.prompts.describe())}\n"
    )
    (part / "README.md").write_text(card)


@torch.no_grad()
def prove(ship: Ship, adapter: LoraAdapter, folder: Path, probes: Sequence[str]) -> Proof:
    """Compare the folder, loaded by `peft` on a fresh base, with the live hypernetwork and with the bare base."""
    from peft import PeftModel

    config = ship.config.model.task_llm
    prompts = [torch.tensor([ship.model.prompts.task_prompt(text)]) for text in probes]
    live = [_logits(ship.model.task_llm.lm, ids, ship_adapter=adapter) for ids in prompts]
    base = load_lm(config.base, config.quantisation, torch.float32).eval()
    bare = [_logits(base, ids) for ids in prompts]
    loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    exported = [_logits(loaded, ids) for ids in prompts]
    proof = Proof(_largest_difference(exported, live), _largest_difference(exported, bare))
    if proof.from_live > MAX_DIFFERENCE or proof.from_base <= MAX_DIFFERENCE:
        raise UserError(
            f"{base_folder(config.base)}: the exported adapter differs from the live one by {proof.from_live:.2e} (at most "
            f"{MAX_DIFFERENCE:.0e}) and from the bare base by {proof.from_base:.2e} (more than that); nothing was written"
        )
    return proof


def _logits(model: torch.nn.Module, ids: Tensor, **extra: object) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False, **extra).logits
    return logits


def _largest_difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))
