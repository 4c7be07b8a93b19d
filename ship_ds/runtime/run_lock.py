"""One run a folder, which it makes, and takes away again where it writes nothing there. Two that
write the same checkpoints and bundle would leave a mixture.
"""

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import IO

from ship_ds.console import current_rank, log
from ship_ds.errors import UserError

_NAME = ".lock"
RANKS_FOLDER = "ranks"
"""In which the ranks of a run say where they are (watchdog.py)."""
_HELD: dict[Path, IO[str]] = {}
"""By folder, what this process has locked: a POSIX lock goes as soon as any descriptor of its file
is closed, so there is one for all."""
_MADE: set[Path] = set()
"""Folders that this process has made, and may take away: a user's own may have rights and stripes
that nobody can make again."""


def make_run_folder(folder: Path) -> None:
    """Make the folder, and those above it that are not there.

    Args:
        folder: of a run.
    """
    folder = folder.absolute()
    # Of two ranks that come at once each has made them.
    _MADE.update(one for one in (folder, *folder.parents) if not one.exists())
    folder.mkdir(parents=True, exist_ok=True)


class RunLock:
    """Held from `take` until the process ends, however it ends; rank 0 alone takes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self) -> None:
        """Take the run's folder.

        Raises:
            UserError: another process has it.
        """
        make_run_folder(self.folder)
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
        """Where nothing of a run was written, and no other process has the folder, take away what
        this start has put there: each rank its own, and the first, or the last to leave, the rest.
        """
        folder, lock, rank = self.folder.absolute(), self.folder / _NAME, current_rank(os.environ)
        with contextlib.suppress(OSError):
            names = {path.name for path in folder.iterdir()}
            if not names <= {_NAME, RANKS_FOLDER} or (lock.exists() and not self._is_held()):
                return
            for path in (folder / RANKS_FOLDER).glob(f"rank-{rank or '*'}.json"):
                path.unlink(missing_ok=True)
            if RANKS_FOLDER in names:
                (folder / RANKS_FOLDER).rmdir()
            lock.unlink(missing_ok=True)
            for one in (folder, *folder.parents):
                if one in _MADE:
                    one.rmdir()

    def _is_held(self) -> bool:
        """Whether this process has it; a folder that was removed meanwhile is another one."""
        path, file = self.folder / _NAME, _HELD.get(self.folder.resolve())
        return (
            file is not None
            and path.exists()
            and os.path.samestat(os.fstat(file.fileno()), path.stat())
        )
