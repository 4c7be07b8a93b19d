"""The files of ds_configs/: ZeRO and precision alone. Imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ship_ds.errors import UserError

# In a checkout a link to the folder at the top; in an installed package the files themselves.
FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"
_OWNED_BY_RUN = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "scheduler",
    "optimizer",
}


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """A file of ds_configs/ by name, or any path. Raises UserError when it is neither, or holds
    fp16 or the run's keys."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.json")))
        raise UserError(f"training.deepspeed: {name}: no such file; ds_configs/ has {known}")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    for key in sorted(_OWNED_BY_RUN & config.keys()):
        raise UserError(
            f"{path}: {key}: comes from the run's config (training and optimiser); remove it here"
        )
    if (config.get("fp16") or {}).get("enabled"):
        raise UserError(
            f"{path}: fp16: not supported, since its loss scale is in no checkpoint of "
            "ZeRO-3; use bf16, or neither"
        )
    return config


def is_bf16(config: Mapping[str, Any]) -> bool:
    """Whether the engine makes every floating-point parameter bf16; else they are fp32."""
    return bool((config.get("bf16") or {}).get("enabled"))


def offloads(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the file says of `offload_param` and `offload_optimizer`; {} where it says nothing or
    null."""
    zero = config.get("zero_optimization") or {}
    return {part: zero.get(part) or {} for part in ("offload_param", "offload_optimizer")}


def offloads_optimiser(config: Mapping[str, Any]) -> bool:
    """Whether the optimiser state is kept off the GPU."""
    return bool(offloads(config)["offload_optimizer"].get("device", "none") != "none")


def offloads_to_nvme(config: Mapping[str, Any]) -> bool:
    """Whether anything is kept on NVMe disks."""
    return any(offload.get("device") == "nvme" for offload in offloads(config).values())
