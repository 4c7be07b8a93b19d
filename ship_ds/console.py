"""What a program tells its user beside its results: one line at a time, on standard error.

    ship-ds: resumed from runs/a/checkpoints/step-00000400, after step 400

Of several ranks only the first one speaks, but for what one rank alone can tell. Imports no torch.
"""

import logging
import os
import re
import sys
from collections.abc import Callable, Mapping

_LINE_ENDS = re.compile(r"[\r\n]+")
Log = Callable[[str], None]
"""What a function that takes long is given to tell of its progress: `log`, `no_log`, or another."""


def log(text: str) -> None:
    """Write "ship-ds: TEXT" on standard error, from rank 0 alone.

    Args:
        text: one line, without its end.
    """
    if current_rank(os.environ) == 0:
        log_from_any_rank(text)


def log_from_any_rank(text: str) -> None:
    """As `log`, from whichever rank calls it: where what one rank saw is seen by no other."""
    print(f"ship-ds: {one_line(text)}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """The text without ends of lines, which a path or a name that others gave may have in it."""
    return _LINE_ENDS.sub(" ", text)


def no_log(text: str) -> None:
    """Do nothing: for callers who want no progress."""


def current_rank(environment: Mapping[str, str]) -> int:
    """The rank of this process, 0 when it is alone.

    torch knows it once the process group is there. Before that, and in programs that never import
    torch, the launcher's variable does: RANK of torchrun and deepspeed, SLURM_PROCID of srun.
    """
    # Looked up, not imported: importing torch takes seconds, and a line about a mistyped config
    # has to come at once.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return int(environment.get("RANK") or environment.get("SLURM_PROCID") or 0)


def quiet_bitsandbytes() -> None:
    """Drop what bitsandbytes prints as it is imported; call it before anything imports that.

    On a CPU with AVX-512 BF16 it warns that a kernel could not be fetched from the hub, and then
    computes the same by its own code: nothing for a user to act on, and it stood before every
    one-line error.
    """
    # On the logger of the very module that warns (bitsandbytes 0.50): filters of a logger above
    # do not see what comes from below.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
