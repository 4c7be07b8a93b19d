"""One run a folder, which it makes, and takes away again where it writes nothing there. Two that
write the same checkpoints and bundle would leave a mixture.

The lock's file says who has it: {"host": "node1", "pid": 4711, "job": "77", "restarts": 0}. NFS 3
keeps the lock of a node that was lost, and the same job, requeued elsewhere, would wait for ever.
"""

import contextlib
import errno
import fcntl
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from ship_ds.console import current_rank, log
from ship_ds.errors import UserError
from ship_ds.files import part_of

_NAME = ".lock"
RANKS_FOLDER = "ranks"
"""In which the ranks of a run say where they are (watchdog.py)."""
_WAIT_SECONDS, _PAUSE_SECONDS = 120.0, 2.0
"""For the lock of an earlier start of the same job, which may be about to end."""
_HELD: dict[Path, IO[bytes]] = {}
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


@dataclass(frozen=True)
class _Holder:
    """Who has a run folder. job and restarts are Slurm's: null and 0 elsewhere."""

    host: str
    pid: int
    job: str | None
    restarts: int

    @classmethod
    def of_this_process(cls, environment: Mapping[str, str]) -> "_Holder":
        return cls(
            platform.node(),
            os.getpid(),
            environment.get("SLURM_JOB_ID"),
            int(environment.get("SLURM_RESTART_COUNT", "0")),
        )

    def is_before(self, other: "_Holder") -> bool:
        """Whether Slurm has ended it, and started the other in its place."""
        return self.job is not None and self.job == other.job and self.restarts < other.restarts

    def __str__(self) -> str:
        job = "" if self.job is None else f", job {self.job}"
        return f"process {self.pid} on {self.host}{job}"


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
        here = _Holder.of_this_process(os.environ)
        file: IO[bytes] = (self.folder / _NAME).open("a+b")
        try:
            is_taken = _try_lock(file)
        except OSError as error:
            log(
                f"{self.folder}: its disk has no locks ({os.strerror(error.errno or 0)}): see "
                "to it that no second run writes there"
            )
            return
        if not is_taken:
            file = self._take_after(file, here)
        file.truncate(0)
        file.write(to_json(here))
        file.flush()
        # NFS would send it when the file is closed, which is at the end of this process.
        os.fsync(file.fileno())
        # Open for as long as the process lives: the lock goes with it.
        _HELD[self.folder.resolve()] = file

    def _take_after(self, file: IO[bytes], here: _Holder) -> IO[bytes]:
        """Wait for the end of an earlier start of this job; the lock of one that does not end is
        left to it, and a new file taken. Raises UserError where any other process has the lock."""
        give_up = None
        while True:
            holder = _holder_of(file)
            # Asked each time: another run may have come between.
            if holder is None or not holder.is_before(here):
                raise UserError(
                    f"run.folder: {self.folder}: another run is writing there"
                    f"{'' if holder is None else f' ({holder})'}; wait for its end, or choose "
                    "another folder"
                )
            place = f"{self.folder}: locked by an earlier start of this job ({holder})"
            if give_up is None:
                log(f"{place}: waiting for its end, up to {_WAIT_SECONDS:.0f} s")
                give_up = time.monotonic() + _WAIT_SECONDS
            if time.monotonic() >= give_up:
                log(f"{place}, which Slurm has ended: going on without its lock")
                return self._new_file()
            time.sleep(_PAUSE_SECONDS)
            # Opened anew, or NFS would show what it read before.
            file.close()
            file = (self.folder / _NAME).open("a+b")
            if _try_lock(file):
                return file

    def _new_file(self) -> IO[bytes]:
        """In the old one's place, and locked: a lock is of a file, whatever its name is."""
        part = part_of(self.folder / _NAME)
        # Of a start that was lost in these lines; its lock would be there still.
        part.unlink(missing_ok=True)
        file = part.open("a+b")
        _try_lock(file)
        part.replace(self.folder / _NAME)
        return file

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


def _try_lock(file: IO[bytes]) -> bool:
    """Whether this process has its lock now; False: another one has it. Raises OSError where the
    disk has no locks."""
    try:
        # Of the process, not of the open file: a program may open its run again.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _holder_of(file: IO[bytes]) -> _Holder | None:
    """None where an earlier version has the lock, which left the file empty."""
    file.seek(0)
    try:
        return TypeAdapter(_Holder).validate_json(file.read())
    except ValidationError:
        return None
