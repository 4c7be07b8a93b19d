"""A LoRA as it lies on disk in `peft`'s layout, and what can be done to it there: pad, add,
compress.

Letters: T tasks, R rank, I in, O out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ship_ds.errors import UserError
from ship_ds.model.adapters import LoraAdapter
from ship_ds.tensor_file import TensorFile

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_WITHOUT = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
)
"""Settings of `peft` that change the function and that no adapter of ours has."""


@dataclass(frozen=True)
class Lora:
    """factors: module path -> (a_RI, b_OR); the update of that module's weight is scaling * B A."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    scaling: float

    @property
    def rank(self) -> int:
        return next(iter(self.factors.values()))[0].shape[0]

    @classmethod
    def of(cls, adapter: LoraAdapter, task: int) -> "Lora":
        return cls(
            {path: (a_TRI[task], b_TOR[task]) for path, (a_TRI, b_TOR) in adapter.factors.items()},
            adapter.scaling,
        )

    def live(self) -> LoraAdapter:
        """The same as the Task LLM applies it, for one task."""
        return LoraAdapter(
            {path: (a_RI[None], b_OR[None]) for path, (a_RI, b_OR) in self.factors.items()},
            self.scaling,
        )

    def padded(self, rank: int) -> "Lora":
        """Zero rows up to `rank`. The scaling, alpha / R, stays, so alpha grows with the rank; else
        the function would change."""
        missing = rank - self.rank
        if missing < 0:
            raise UserError(
                f"--pad-to {rank}: the adapter's rank is {self.rank} already; give that or more"
            )
        pad = torch.nn.functional.pad
        factors = {
            path: (pad(a, (0, 0, 0, missing)), pad(b, (0, missing)))
            for path, (a, b) in self.factors.items()
        }
        return Lora(factors, self.scaling)

    def delta(self, path: str) -> Tensor:
        """(alpha / R) * (B A) in fp32, (O, I)."""
        a_RI, b_OR = self.factors[path]
        return (b_OR.float() @ a_RI.float()).mul_(self.scaling)


def add(parts: Sequence[tuple[float, Lora]]) -> Lora:
    """The weighted sum, exact: ranks side by side, each part's weight and scaling in its B."""
    first = parts[0][1]
    factors = {}
    for path in first.factors:
        a_RI = torch.cat([lora.factors[path][0] for _, lora in parts])
        b_OR = torch.cat(
            [
                lora.factors[path][1] * (weight * lora.scaling / first.scaling)
                for weight, lora in parts
            ],
            1,
        )
        factors[path] = (a_RI, b_OR)
    return Lora(factors, first.scaling)


def compressed(lora: Lora, rank: int) -> tuple[Lora, float]:
    """The best LoRA of that rank for each module (truncated SVD, without ever forming B A), and the
    error that is left: the Frobenius norm of the difference over that of the whole update."""
    if rank > lora.rank:
        raise UserError(
            f"--rank {rank}: the exact sum's rank is {lora.rank}; leave --rank out, or give less"
        )
    factors, lost, whole = {}, 0.0, 0.0
    for path, (a_RI, b_OR) in lora.factors.items():
        left_OR, b_RR = torch.linalg.qr(b_OR.double())
        right_IR, a_RR = torch.linalg.qr(a_RI.double().T)
        u_RR, s_R, v_RR = torch.linalg.svd(b_RR @ a_RR.T)
        root = s_R[:rank].sqrt()
        factors[path] = (
            ((right_IR @ v_RR[:rank].T) * root).T.contiguous().to(a_RI.dtype),
            ((left_OR @ u_RR[:, :rank]) * root).to(b_OR.dtype),
        )
        lost, whole = lost + float(s_R[rank:].square().sum()), whole + float(s_R.square().sum())
    return Lora(factors, lora.scaling), math.sqrt(lost / whole) if whole else 0.0


def write_lora(part: Path, lora: Lora, base: str) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    tensors = {}
    for path, (a_RI, b_OR) in lora.factors.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"], tensors[f"{_PREFIX}{path}.lora_B.weight"] = (
            a_RI,
            b_OR,
        )
    with TensorFile(part / WEIGHTS, tensors) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor.cpu())
    alpha = lora.scaling * lora.rank
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({path.rpartition(".")[2] for path in lora.factors}),
        "fan_in_fan_out": False,
    }
    (part / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def read_lora(folder: Path) -> Lora:
    """Tensors are views of the file. Raises UserError naming the file and what is wrong with it."""
    settings = read_settings(folder)
    unknown = [key for key in _WITHOUT if settings.get(key)]
    if settings.get("peft_type") != "LORA" or unknown or settings.get("bias", "none") != "none":
        what = (
            unknown[0]
            if unknown
            else f"peft_type {settings.get('peft_type')}, bias {settings.get('bias')}"
        )
        raise UserError(
            f"{folder / CONFIG}: {what}: expected a plain LoRA, as `ship-ds deduce` writes it"
        )
    halves: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            for name in file.keys():
                path, half = name.removeprefix(_PREFIX).removesuffix(".weight").rsplit(".", 1)
                halves.setdefault(path, {})[half] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: {error}: export the adapter again") from None
    factors = {path: _pair(folder, path, pair, settings["r"]) for path, pair in halves.items()}
    if not factors:
        raise UserError(f"{folder / WEIGHTS}: has no tensors; export the adapter again")
    return Lora(factors, settings["lora_alpha"] / settings["r"])


def read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(
            f"{folder}: no adapter here (no {CONFIG}); expected a folder that `ship-ds "
            "deduce` wrote"
        )
    settings: dict[str, Any] = json.loads(path.read_text())
    return settings


def _pair(folder: Path, path: str, pair: Mapping[str, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    if pair.keys() != {"lora_A", "lora_B"}:
        raise UserError(
            f"{folder / WEIGHTS}: {path}: has {', '.join(sorted(pair))}; expected lora_A and lora_B"
        )
    a_RI, b_OR = pair["lora_A"], pair["lora_B"]
    if a_RI.shape[0] != rank or b_OR.shape[1] != rank:
        raise UserError(
            f"{folder / WEIGHTS}: {path}: A has rank {a_RI.shape[0]} and B {b_OR.shape[1]}, and "
            f"{CONFIG} says r={rank}; "
            "the two files do not belong together"
        )
    return a_RI, b_OR
