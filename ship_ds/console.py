"""What a program tells its user beside its results: one line at a time, on standard error.

    ship-ds: resumed from runs/a/checkpoints/step-00000400, after step 400

Of several ranks only the first one speaks. Imports no torch.
"""

import os
import sys
from collections.abc import Callable, Mapping

Log = Callable[[str], None]
"""What a function that takes long is given to tell of its progress: `log`, `no_log`, or another."""


def log(text: str) -> None:
    """Write "ship-ds: TEXT" on standard error, from rank 0 alone.

    Args:
        text: one line, without its end.
    """
    if current_rank(os.environ) == 0:
        print(f"ship-ds: {text}", file=sys.stderr, flush=True)


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
