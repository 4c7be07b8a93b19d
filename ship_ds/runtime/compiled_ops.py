"""DeepSpeed compiles a C++ op at the first start that asks for it; this makes that safe against
being killed in the middle. A run on CPUs asks for none, unless it offloads to NVMe.

PyTorch guards such a build with a file called `lock`, which a killed process leaves behind, and
every later start then waits for it without a word. Here each process builds under an advisory lock
of the kernel's, which dies with its holder: who holds it knows that a `lock` file found in the op's
folder is nobody's. And each uses the `ninja` of the Python package: two versions, as with and
without an activated environment, reject each other's log and compile everything again at every
change.
"""

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ninja
import torch

from ship_ds.console import Log
from ship_ds.errors import UserError, first_line
from ship_ds.runtime.deepspeed_config import offloads_optimiser, offloads_to_nvme
from ship_ds.runtime.op_cache import compiled_cache, op_cache

_INFERENCE_ONLY = "deepspeed_shm_comm"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What a disk answers that cannot lock."""


def needed(deepspeed: Mapping[str, Any]) -> list[str]:
    """The builders that a run with this config will ask for; the optimiser is torch's own unless a
    GPU offloads it."""
    adam = offloads_optimiser(deepspeed) and torch.cuda.is_available()
    nvme = offloads_to_nvme(deepspeed)
    return [*(["CPUAdamBuilder"] if adam else []), *(["AsyncIOBuilder"] if nvme else [])]


def skip_inference_op() -> None:
    """Before `deepspeed.init_distributed`, which on CPUs compiles and loads an all-reduce through
    shared memory (a minute on two cores, and a C++ compiler) that tensor parallel inference alone
    calls.

    It asks this table first. One process has one such table, which DeepSpeed makes once and keeps.
    On GPUs it asks for no such op, and to make the table would start compilers.
    """
    if torch.cuda.is_available():
        return
    import deepspeed

    deepspeed.ops.__compatible_ops__[_INFERENCE_ONLY] = False


def build(names: Sequence[str], log: Log) -> None:
    """Compile and load the ops, one process at a time; the later ones find them done. Raises
    UserError for an op that a run cannot do without and that cannot be built here, and for a folder
    on a disk without locks."""
    from deepspeed.accelerator import get_accelerator

    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    root = op_cache(os.environ)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(root)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled_cache(os.environ))
    # A disk without locks is good enough for a run that compiles nothing.
    if not names and not any(root.glob("*/lock")):
        return
    with _one_process_at_a_time(root / "ship_ds.lock"):
        for stale in root.glob("*/lock"):
            log(f"{stale}: left behind by a process that was killed while it compiled; removed")
            stale.unlink()
        for name in names:
            builder = get_accelerator().create_op_builder(name)
            if builder is not None and builder.is_compatible():
                _load(builder)
            elif name == "AsyncIOBuilder":
                raise UserError(
                    "training.deepspeed: offload to NVMe needs libaio with its "
                    "headers: install libaio-dev"
                )


def _load(builder: Any) -> None:
    """Compile it where it is not yet. Raises UserError where that fails."""
    try:
        builder.load(verbose=False)
    except RuntimeError as error:  # torch's, with all that ninja and the compiler said
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        messages = [line for line in lines if "not found" in line or "error:" in line]
        reason = messages[0] if messages else first_line(error)
        raise UserError(
            f"DeepSpeed's {builder.name}: cannot be compiled: {reason}: install a C++ compiler "
            "such as g++, or set CXX to one"
        ) from None


@contextmanager
def _one_process_at_a_time(path: Path) -> Iterator[None]:
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise UserError(
                f"TORCH_EXTENSIONS_DIR: {path.parent}: its disk has no locks ({error.strerror}): "
                "set it to a folder on a disk that has them"
            ) from None
        yield
