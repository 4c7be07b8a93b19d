"""One run a folder: two that write the same checkpoints and bundle would leave a mixture."""

import contextlib
import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

from ship_ds.console import log
from ship_ds.errors import UserError

_NAME, _RANKS = ".lock", "ranks"
_HELD: dict[Path, IO[str]] = {}
"""By folder, what this process has locked: a POSIX lock goes as soon as any descriptor of its file
is closed, so there is one for all."""


class RunLock:
    """Held from `take` until the process ends, however it ends; rank 0 alone takes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self) -> None:
        """Take the run's folder.

        Raises:
            UserError: another process has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._is_held():
            return
        file = (self.folder / _NAME).open("a", encoding="utf-8")
        try:
            # Of the process, not of the open file: a program may open its run again.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        # Open for as long as the process lives: the lock goes with it.
        _HELD[self.folder.resolve()] = file

    def leave_unused(self) -> None:
        """Remove the folder, if this process has it and nothing of a run was written there."""
        if not self._is_held():
            return
        watched = self.folder / _RANKS
        with contextlib.suppress(OSError):
            if {path.name for path in self.folder.iterdir()} <= {_NAME, _RANKS}:
                shutil.rmtree(watched, ignore_errors=True)
                (self.folder / _NAME).unlink()
                self.folder.rmdir()

    def _is_held(self) -> bool:
        """Whether this process has it; a folder that was removed meanwhile is another one."""
        path, file = self.folder / _NAME, _HELD.get(self.folder.resolve())
        return (
            file is not None
            and path.exists()
            and os.path.samestat(os.fstat(file.fileno()), path.stat())
        )
