"""Files and folders that are there whole or not at all, and the manifests that prove it.

A file is written beside its place as NAME.part, synced and renamed:

    write_json(run / "report.json", report)

A folder likewise, as FOLDER.part; an old one gives way only once the new one is complete:

    with whole_folder(run / "bundle") as part:
        (part / "config.json").write_text(...)

POSIX cannot put one folder in place of another in a single step, so the old one is first moved to
FOLDER.replaced. A process killed between the two renames leaves that name alone, and `recover`,
which every reader and the next writer call first, gives it its own name back.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ship_ds.errors import UserError
from ship_ds.parsing import decode, parse_json

MANIFEST = "manifest.json"
_PART, _REPLACED = ".part", ".replaced"


def refuse_other_writers() -> None:
    """What this process makes from here on, nobody but its user and group can write, whatever the
    umask says: a bundle or a cache that others can write is code and weights of theirs."""
    os.umask(os.umask(0o077) | 0o002)


def part_of(path: Path) -> Path:
    """Where a file or folder is while it is incomplete: "runs/a/bundle" -> "runs/a/bundle.part"."""
    return path.with_name(path.name + _PART)


def sync(path: Path) -> None:
    """Force a file's bytes, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; read in pieces, so its size does not matter."""
    with path.open("rb") as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            # The system names a file that cannot be opened, and none that cannot be read.
            error.filename = error.filename or str(path)
            raise


@contextmanager
def whole_file(path: Path, *, shared: bool = False, durable: bool = True) -> Iterator[Path]:
    """Give the path to write to; when the block ends it replaces `path`, in one step.

    When the block fails nothing is left of it, and `path` is as it was.

    Args:
        path: The file; its folder is made when it is missing.
        shared: Other processes may write the same file at this moment, so the incomplete one is
            named after this process.
        durable: Wait until it is on the disk. A file that is written every few seconds, and that
            nobody needs after a power cut, does without.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}{_PART}") if shared else part_of(path)
    try:
        yield part
        if durable:
            sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, shared: bool = False, durable: bool = True) -> None:
    """Replace a text file in one step.

    Args:
        path: The file; its folder is made when it is missing.
        text: What it holds then, in UTF-8.
        shared: Other processes may write the same file at this moment, so the incomplete one is
            named after this process.
        durable: Wait until it is on the disk; see `whole_file`.
    """
    with whole_file(path, shared=shared, durable=durable) as part:
        part.write_text(text, encoding="utf-8")


def write_json(
    path: Path, value: Any, *, indent: int | None = 1, shared: bool = False, durable: bool = True
) -> None:
    """Replace a JSON file in one step.

    Args:
        path: The file; its folder is made when it is missing.
        value: What it holds then.
        indent: Spaces of a level; None: all in one line.
        shared: Other processes may write the same file at this moment, so the incomplete one is
            named after this process.
        durable: Wait until it is on the disk; see `whole_file`.
    """
    write_text(path, json.dumps(value, indent=indent) + "\n", shared=shared, durable=durable)


def recover(folder: Path) -> None:
    """Put back the folder that a process killed within `replace_folder` had set aside.

    Raises:
        UserError: It may not be renamed here, as on a disk that is mounted read-only.
    """
    # "." and "/" have no name, and are there.
    if folder.exists():
        return
    replaced = folder.with_name(folder.name + _REPLACED)
    if not replaced.exists():
        return
    try:
        replaced.rename(folder)
    except OSError as error:
        # Another process that read or wrote it at the same moment was first.
        if not folder.exists():
            raise UserError(
                f"{replaced}: set aside by a write that was killed, and it cannot be renamed to "
                f"{folder.name}: {error.strerror}: rename it where it may be written"
            ) from None


def replace_folder(part: Path, folder: Path) -> None:
    """Rename `part` to `folder`; a folder of that name is set aside first and removed last."""
    replaced = folder.with_name(folder.name + _REPLACED)
    while True:
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        try:
            part.rename(folder)
            break
        except OSError:
            # A reader that came between the two renames has put the old one back: try once more.
            if not folder.exists():
                recover(folder)
                raise
    # Before the old one goes, the new one's name has to be on the disk.
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def publish(part: Path, folder: Path) -> None:
    """Sync everything in `part` and put it in the place of `folder`: after a kill at any moment
    the old one or the new one is there, whole."""
    # A rename may reach the disk before the bytes do, and after a power cut names would be empty.
    for path in part.rglob("*"):
        sync(path)
    sync(part)
    replace_folder(part, folder)


def refuse_existing(folder: Path) -> None:
    """End the program where the folder is there already.

    Raises:
        UserError: It is.
    """
    recover(folder)
    if folder.exists():
        raise UserError(f"{folder}: already there; name a new folder or remove it")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give the folder to write to; when the block ends it replaces `folder`.

    When the block fails nothing is left of it, and `folder` is as it was.

    Raises:
        UserError: The disk is full, or a file cannot be written.
    """
    recover(folder)
    part = part_of(folder)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        publish(part, folder)
    except OSError as error:
        raise disk_error(
            folder, error, "nothing was written; make room and run the same command again"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def new_folder(folder: Path) -> AbstractContextManager[Path]:
    """As `whole_folder`, for a folder that must not be there yet.

    Raises:
        UserError: It is there already, or the disk is full.
    """
    refuse_existing(folder)
    return whole_folder(folder)


def disk_error(folder: Path, error: OSError, advice: str) -> UserError:
    """One line: the file, the system's reason, and what to do about it.

    Args:
        folder: Stands for the file where the system names none.
        error: The system's.
        advice: What is left there, and what to do.

    Returns:
        The error, which the caller raises.
    """
    path = str(error.filename or folder)
    shown = path if len(path) <= _LONGEST_SHOWN else f"{path[:_LONGEST_SHOWN]}..."
    return UserError(f"{shown}: {error.strerror or error}: {advice}")


_LONGEST_SHOWN = 200
"""Letters of a path, which may be too long for the system."""


_REFUSED = (
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)
"""Why a system refuses a path that a user gave."""


@contextmanager
def refused_paths() -> Iterator[None]:
    """Whoever gave a path that the system refuses, wherever it is used in here, is told so.

    Raises:
        UserError: In place of an OSError that names such a path, or one on a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno not in (*_REFUSED, *_FULL):
            raise
        advice = (
            "make room, and run the same command again"
            if error.errno in _FULL
            else "name another file or folder, or one that can be read and written"
        )
        raise disk_error(Path(), error, advice) from None


_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a full disk, and of a quota that is used up."""


def disk_full_error(error: BaseException | None) -> BaseException | None:
    """The exception, or the one that it was raised in the place of, which says that a disk or a
    quota is full: as the system does, or in the words of a compiler or of a library that gives no
    number; None: none does."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in _FULL
        if full or any(os.strerror(number) in str(error) for number in _FULL):
            return error
        error = error.__cause__ or error.__context__
    return None


def is_inside(name: str) -> bool:
    """Whether a path that a file names stays below the folder it is joined to."""
    return "\0" not in name and not os.path.isabs(name) and ".." not in Path(name).parts


@dataclass(frozen=True)
class Listed:
    """What a manifest says about one file."""

    bytes: int
    sha256: str


def _is_listed(row: object) -> bool:
    """Whether a manifest's row has a size and a hash, and nothing else."""
    return (
        isinstance(row, dict)
        and row.keys() == {"bytes", "sha256"}
        and isinstance(row["bytes"], int)
        and isinstance(row["sha256"], str)
    )


_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""What a system says of a path at which there is no file."""


def _size(path: Path) -> int | None:
    """Bytes of a file; None: there is none. Raises OSError where the disk does not answer, which
    `Path.is_file` of later versions of Python takes for none."""
    try:
        about = path.stat()
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    except ValueError:  # of a name that no system can have
        return None
    return about.st_size if stat.S_ISREG(about.st_mode) else None


@dataclass(frozen=True)
class Manifest:
    """Size and SHA-256 of the files of a folder, by their path in it; kept there as manifest.json:

    {"config.json": {"bytes": 2113, "sha256": "5a0c..."}}
    """

    files: Mapping[str, Listed]

    @classmethod
    def of(cls, folder: Path, names: Iterable[str] | None = None) -> "Manifest":
        """Read the named files, or all but an old manifest, and list them."""
        paths = (path for path in folder.rglob("*") if path.is_file())
        chosen = sorted(str(path.relative_to(folder)) for path in paths) if names is None else names
        return cls(
            {
                name: Listed((folder / name).stat().st_size, sha256(folder / name))
                for name in chosen
                if name != MANIFEST
            }
        )

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder.

        Raises:
            ValueError: It is missing or is no manifest; the message says which.
            OSError: It cannot be read here and now, which says nothing about what it is.
        """
        if _size(folder / MANIFEST) is None:
            raise ValueError(f"{MANIFEST} is missing")
        content = (folder / MANIFEST).read_bytes()
        rows = parse_json(decode(content, MANIFEST), MANIFEST)
        if not isinstance(rows, dict):
            raise ValueError(f"{MANIFEST}: expected an object of files")
        listed = {}
        for name, row in rows.items():
            if not _is_listed(row):
                raise ValueError(f"{MANIFEST}: {name}: expected a size and a hash")
            if not is_inside(name):
                raise ValueError(f"{MANIFEST}: {name}: leads out of the folder")
            listed[name] = Listed(**row)
        return cls(listed)

    def write(self, folder: Path) -> None:
        """Put it into the folder; last of all, since what it lists has to be there."""
        write_json(
            folder / MANIFEST, {name: asdict(row) for name, row in self.files.items()}, indent=2
        )

    def problem(
        self, folder: Path, names: Iterable[str] | None = None, *, hashes: bool = True
    ) -> str | None:
        """Why the folder is not what was written, or None.

        Args:
            folder: The folder.
            names: The files to check, all of which are listed; None for every one.
            hashes: Read the files; without, sizes alone are compared, which takes no time.

        Returns:
            For example "state/a.pt is missing", of the first file that is not as listed.

        Raises:
            OSError: A file cannot be read here and now, which says nothing about what it is.
        """
        for name in self.files if names is None else names:
            path, listed = folder / name, self.files[name]
            if (size := _size(path)) is None:
                return f"{name} is missing"
            if size != listed.bytes:
                return f"{name} has {size} bytes instead of {listed.bytes}"
            if hashes and sha256(path) != listed.sha256:
                return f"{name} is not the file that was written"
        return None
