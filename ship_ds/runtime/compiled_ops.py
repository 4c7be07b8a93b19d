"""DeepSpeed compiles its C++ ops at the first start; this makes that safe against being killed in
the middle.

PyTorch guards such a build with a file called `lock`, which a killed process leaves behind, and
every later start then waits for it without a word. Here each process builds under an advisory lock
of the kernel's, which dies with its holder: who holds it knows that nobody else builds, and that a
`lock` file which stays in the op's folder is nobody's. One that goes away belongs to a process that
loads a built op, as DeepSpeed does once more when ranks connect.

And each uses the `ninja` of the Python package: two versions, as with and without an activated
environment, reject each other's log and compile everything again at every change.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ninja
import torch

from ship_ds.console import Log
from ship_ds.errors import UserError
from ship_ds.runtime.deepspeed_config import offloads_optimiser, offloads_to_nvme
from ship_ds.runtime.op_cache import compiled_cache, op_cache


def needed(deepspeed: Mapping[str, Any]) -> list[str]:
    """The builders that a run with this config will ask for; the optimiser is torch's own unless a
    GPU offloads it."""
    on_gpu = ["CPUAdamBuilder"] if offloads_optimiser(deepspeed) else []
    own = on_gpu if torch.cuda.is_available() else ["ShareMemCommBuilder"]
    return [*own, *(["AsyncIOBuilder"] if offloads_to_nvme(deepspeed) else [])]


def build(names: Sequence[str], log: Log) -> None:
    """Compile and load the ops, one process at a time; the later ones find them done. Raises
    UserError for an op that a run cannot do without and that cannot be built here."""
    from deepspeed.accelerator import get_accelerator

    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    root = op_cache(os.environ)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(root)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled_cache(os.environ))
    with _one_process_at_a_time(root / "ship_ds.lock"):
        for lock in root.glob("*/lock"):
            if _stays(lock):
                log(f"{lock}: left behind by a process that was killed while it compiled; removed")
                lock.unlink(missing_ok=True)
        for name in names:
            builder = get_accelerator().create_op_builder(name)
            if builder is not None and builder.is_compatible():
                builder.load(verbose=False)
            elif name == "AsyncIOBuilder":
                raise UserError(
                    "training.deepspeed: offload to NVMe needs libaio with its "
                    "headers: install libaio-dev"
                )


_SECONDS_TO_LOAD = 3.0
"""How long the file of a process that loads a built op is there at most: milliseconds are usual."""


def _stays(lock: Path) -> bool:
    """Whether it is the same file for as long as that."""
    deadline, before = time.monotonic() + _SECONDS_TO_LOAD, _identity(lock)
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if _identity(lock) != before:
            return False
    return before is not None


def _identity(path: Path) -> tuple[int, int] | None:
    """None where it is gone."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return None
    return about.st_ino, about.st_mtime_ns


@contextmanager
def _one_process_at_a_time(path: Path) -> Iterator[None]:
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
