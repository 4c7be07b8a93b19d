"""DeepSpeed's shards are pickles, which may name any code to run; here they may name what
DeepSpeed's own do, and no more."""

import pickle
from pathlib import Path
from typing import Any

import torch


def _trusted() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(enumeration: Any, name: str) -> ZeroStageEnum:
        if enumeration is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError(f"{name!r} of {enumeration!r} is no stage of ZeRO")
        return ZeroStageEnum[name]

    return [
        DynamicLossScaler,
        LossScaler,
        ZeroStageEnum,
        fragment_address,
        # By which Python 3.11.0 to 3.11.3 pickle the members of an enumeration; here of this one.
        (member, "builtins.getattr"),
    ]


def load_shard(path: Path) -> dict[str, Any]:
    """A shard's content, memory-mapped, on the CPU.

    Raises:
        pickle.UnpicklingError: it names a class that DeepSpeed's shards have no use for.
    """
    with torch.serialization.safe_globals(_trusted()):
        shard: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return shard


def shard_problem(path: Path) -> str | None:
    """Why `load_shard` would not open the file, or None; nothing is unpickled."""
    try:
        with torch.serialization.safe_globals(_trusted()):
            classes = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    # not a zip, a broken one, or one without a pickle
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError):
        return "is not a file that torch.save writes today"
    return f"names {classes[0]}, which no shard of DeepSpeed's does" if classes else None
