"""The line with which a rank ends with BAD_INPUT, for its log and for whoever started the ranks.

Where one of several ranks ends so, the launcher kills the others and has their code in place of
its. `slurm/train.sh` therefore names a file, whose presence says that another try would end the
same. Imports no torch.
"""

import contextlib
import os
import platform
from pathlib import Path

from ship_ds.console import current_rank, log_from_any_rank, one_line

VARIABLE = "SHIP_DS_BAD_INPUT"


def say_bad_input(text: str) -> None:
    """Write "ship-ds: TEXT" on standard error, and with the rank and its node in the file that
    SHIP_DS_BAD_INPUT names, unless another rank has. A full disk does not keep this process from
    its end.

    Args:
        text: what is wrong, and what to do.
    """
    with contextlib.suppress(OSError):
        log_from_any_rank(text)
    if name := os.environ.get(VARIABLE):
        line = f"ship-ds: rank {current_rank(os.environ)} on {platform.node()}: {one_line(text)}\n"
        # Also FileExistsError. Names of files may hold bytes that are no text.
        with (
            contextlib.suppress(OSError),
            Path(name).open("x", encoding="utf-8", errors="backslashreplace") as file,
        ):
            file.write(line)
