"""Where the models of a run compute, and in which numbers: what `--device` and `--dtype` mean.

    choose_device("auto")                 # the GPU, where torch sees one, else the CPU
    choose_dtype(None, device)            # bfloat16 on a GPU that computes in it, else float32

The module imports torch where a function needs it, so that a command line may check its words
first.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ship_ds.console import log
from ship_ds.errors import UserError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
DTYPE_CHOICES = ("bfloat16", "float32")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_PROCESSOR = Path("/proc/cpuinfo")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Of a processor with arithmetic of bf16: two of x86, one of ARM."""


def check_words(device: str, dtype: str) -> None:
    """Compare the names with those that there are, without torch.

    Raises:
        UserError: One is another.
    """
    if not _DEVICE.fullmatch(device):
        raise UserError(f"device {device}: expected auto, cpu, cuda or cuda:N")
    if dtype not in (AUTO, *DTYPE_CHOICES):
        raise UserError(f"dtype {dtype}: expected {AUTO}, {' or '.join(DTYPE_CHOICES)}")


def multiplies_in_bf16(device: "torch.device") -> bool:
    """Whether the current GPU, or else the processor, has instructions for it.

    Without them torch imitates bf16: 250 and 420 times slower than fp32, measured twice with square
    matrices of 2,048 a side on two cores of an EPYC with AVX2 (2026-11-28, torch 2.13).

    Args:
        device: "cuda" or "cpu"; of several GPUs the current one is asked.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return processor_multiplies_in_bf16()


def processor() -> list[str]:
    """What Linux says of the cores, line by line; elsewhere none."""
    try:
        return _PROCESSOR.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def processor_multiplies_in_bf16() -> bool:
    """By the flags that Linux gives the first core, without torch; elsewhere nothing is known, and
    the answer is no."""
    flags = next((row for row in processor() if row.startswith(("flags", "Features"))), "")
    return not _BF16_FLAGS.isdisjoint(flags.split())


def choose_device(device: "torch.device | str") -> "torch.device":
    """The device of that name.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1", or torch's own.

    Raises:
        UserError: It is not here.
    """
    import torch

    name = str(device)
    check_words(name, AUTO)
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"device {name}: torch {torch.__version__} sees no GPU here: choose cpu, or look at "
            "`ship-ds doctor`"
        )
    chosen = torch.device(name)
    if (chosen.index or 0) >= 1 and chosen.index >= (count := torch.cuda.device_count()):
        raise UserError(f"device {name}: there are {count} GPU(s) here, counted from cuda:0")
    return chosen


def choose_dtype(dtype: "torch.dtype | str | None", device: "torch.device") -> "torch.dtype":
    """The number type of that name.

    Args:
        dtype: "bfloat16", "float32" or torch's own; None or "auto": bfloat16 on a GPU that
            computes in it, else float32.
        device: Where the models will be.

    Raises:
        UserError: It is another type, or this GPU only imitates it.
    """
    import torch

    name = AUTO if dtype is None else str(dtype).removeprefix("torch.")
    check_words(AUTO, name)
    has_bf16 = multiplies_in_bf16(device)
    if device.type != "cuda":
        if name == "bfloat16" and not has_bf16:
            log("dtype bfloat16: this processor only imitates it: float32 is many times faster")
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if name == "bfloat16" and not has_bf16:
        raise UserError(
            f"dtype bfloat16: {torch.cuda.get_device_name(device)} does not compute in it; choose "
            "float32"
        )
    return torch.bfloat16 if has_bf16 and name != "float32" else torch.float32
