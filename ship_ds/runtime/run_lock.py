"""One run a folder: two that write the same checkpoints and bundle would leave a mixture."""

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

from ship_ds.console import log
from ship_ds.errors import UserError

_NAME = ".lock"


class RunLock:
    """Held from `take` until the process ends, however it ends; rank 0 alone takes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Take the run's folder.

        Raises:
            UserError: another process has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # Open for as long as the process lives: the lock goes with it.
        self._file = (self.folder / _NAME).open("a", encoding="utf-8")
        try:
            # Of the process, not of the open file: a program may open its run again.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                log(
                    f"{self.folder}: its disk has no locks ({os.strerror(error.errno or 0)}): see "
                    "to it that no second run writes there"
                )
                return
            raise UserError(
                f"run.folder: {self.folder}: another run is writing there; wait for its end, or "
                "choose another folder"
            ) from None
