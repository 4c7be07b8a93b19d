"""What of the stack is on this machine, and what each missing piece costs. Imports no torch."""

import importlib.util
import os
import shutil
import subprocess
from collections import Counter
from importlib.metadata import version

from ship_ds.allocator import installed_allocator
from ship_ds.placement import processor_multiplies_in_bf16


def _package(name: str, distribution: str) -> str | None:
    return version(distribution) if importlib.util.find_spec(name) else None


def _cuda() -> str | None:
    """The GPUs by name, asked of the driver: torch would take seconds to be imported."""
    if importlib.util.find_spec("torch") is None or (program := shutil.which("nvidia-smi")) is None:
        return None
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    names = Counter(answer.stdout.splitlines()) if answer.returncode == 0 else {}
    if names and _cpu_build(version("torch")):
        return None
    return ", ".join(f"{count} x {name}" for name, count in names.items()) or None


def _cpu_build(version: str) -> bool:
    """Whether this torch was built without CUDA, as in "2.13.0+cpu"."""
    return version.endswith("+cpu")


def _room() -> str | None:
    """What this process may use; None where the system does not say."""
    try:
        pages, page = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    return f"{len(os.sched_getaffinity(0))} cores, {pages * page / 1e9:.1f} GB unused"


def findings() -> list[tuple[str, str | None, str]]:
    """(what, its version or place or None, what its absence costs)."""
    return [
        ("torch", _package("torch", "torch"), "nothing runs without it: pip install torch"),
        (
            "transformers",
            _package("transformers", "transformers"),
            "nothing runs without it: pip install transformers",
        ),
        ("peft", _package("peft", "peft"), "no adapter is written or proved: pip install peft"),
        ("CUDA", _cuda(), "training runs on the CPU: fit for the embedded default and for tests"),
        (
            "C++ compiler",
            shutil.which("c++") or shutil.which("g++"),
            "no model.elementwise=compiled, and DeepSpeed offloads to no disk and, on a GPU, no "
            "optimiser: install g++",
        ),
        (
            "ninja",
            shutil.which("ninja") or _package("ninja", "ninja"),
            "DeepSpeed offloads to no disk and, on a GPU, no optimiser: pip install ninja",
        ),
        (
            "deepspeed",
            _package("deepspeed", "deepspeed"),
            "no training; opening a bundle still works",
        ),
        (
            "bitsandbytes",
            _package("bitsandbytes", "bitsandbytes"),
            "no NF4: set model.task_llm.quantisation=none",
        ),
        ("flash-attn", _package("flash_attn", "flash-attn"), "attention falls back to torch's own"),
        (
            "bf16 on the CPU",
            "the processor multiplies in it" if processor_multiplies_in_bf16() else None,
            "imitated, as far as can be told: train in fp32 there, as zero2_auto does",
        ),
        (
            "malloc",
            installed_allocator(),
            "glibc's: a long training of a real model on a CPU gets slower: install libjemalloc2",
        ),
        (
            "gguf",
            _package("gguf", "gguf"),
            "`ship-ds base` makes none of a GGUF file: pip install 'ship-ds[smollm2]'",
        ),
        (
            "fastapi",
            _package("fastapi", "fastapi"),
            "no `ship-ds serve`: pip install 'ship-ds[serve]'",
        ),
        ("cores, memory", _room(), "unknown here"),
        ("Slurm", shutil.which("sbatch"), "no `sbatch`; deepspeed and torchrun still start a run"),
    ]


def lines() -> list[str]:
    """The findings as lines for a terminal."""
    return [
        f"{'ok  ' if value else 'none'}  {what:<16} {value or cost}"
        for what, value, cost in findings()
    ]
