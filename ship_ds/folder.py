"""Folders that are there whole or not at all: written as NAME.part, synced, renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ship_ds.errors import UserError


def part_of(folder: Path) -> Path:
    """Where a folder is while it is incomplete."""
    return folder.with_name(folder.name + ".part")


def publish(part: Path, folder: Path) -> None:
    """Sync every file of `part` and put it in `folder`'s place; a reader never sees half of
    either."""
    for path in part.rglob("*"):
        if path.is_file():
            sync(path)
    sync(part)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """A file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder}: already there; name a new folder or remove it")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives the folder to write to; what was in `folder` is replaced. Raises UserError when the
    disk is full. When the block fails nothing is left of it, and `folder` is as it was."""
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
    """The same; raises UserError when `folder` is there."""
    refuse_existing(folder)
    return whole_folder(folder)


def disk_error(folder: Path, error: OSError, advice: str) -> UserError:
    return UserError(f"{error.filename or folder}: {error.strerror or error}: {advice}")
