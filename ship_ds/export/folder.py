"""Folders that are there whole or not at all: written as NAME.part, synced, renamed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ship_ds.bundle import publish
from ship_ds.errors import UserError


def part_of(folder: Path) -> Path:
    """Where a folder is while it is incomplete."""
    return folder.with_name(folder.name + ".part")


def refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder}: already there; name a new folder or remove it")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives the folder to write to. Raises UserError, leaving nothing behind, when the disk is full or the block fails."""
    refuse_existing(folder)
    part = part_of(folder)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        publish(part, folder)
    except OSError as error:
        raise disk_error(folder, error, "nothing was written; make room and run the same command again") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def disk_error(folder: Path, error: OSError, advice: str) -> UserError:
    return UserError(f"{error.filename or folder}: {error.strerror or error}: {advice}")
