"""Whether the run folder is on one disk that all nodes share. Where each node has another one of
that path, every checkpoint is in pieces, and nobody would notice before the resume."""

import platform
import secrets
import time
from pathlib import Path

from ship_ds.errors import UserError
from ship_ds.files import write_text
from ship_ds.runtime import ranks

_NAME = ".same-disk"
_WAIT_SECONDS, _PAUSE_SECONDS = 70.0, 0.5
"""NFS may show a folder as it was for up to 60 s (acdirmax)."""


def check_is_shared(folder: Path) -> None:
    """Every rank reads what rank 0 writes there. Every rank calls it.

    Raises:
        UserError: a rank does not see it; on every rank, with the hosts.
    """
    if ranks.world_size() == 1:
        return
    path = folder / _NAME
    nonce = ranks.gather_results(lambda: _write_nonce(path) if ranks.rank() == 0 else None)[0]
    answers = ranks.gather_objects([platform.node(), _is_seen(path, nonce)])
    if ranks.rank() == 0:
        path.unlink(missing_ok=True)
    if hosts := sorted({host for host, is_seen in answers if not is_seen}):
        raise UserError(
            f"run.folder: {folder} is not the same disk on {', '.join(hosts)} as on "
            f"{answers[0][0]}; give a folder that all nodes share"
        )


def _write_nonce(path: Path) -> str:
    nonce = secrets.token_hex(16)
    # A new file by its name: a start that was killed may have left one, which NFS has cached.
    write_text(path, nonce, durable=False)
    return nonce


def _is_seen(path: Path, nonce: str) -> bool:
    """Whether this is what the file says here, within the time after which NFS shows it."""
    give_up = time.monotonic() + _WAIT_SECONDS
    while not (is_seen := _content(path) == nonce) and time.monotonic() < give_up:
        time.sleep(_PAUSE_SECONDS)
    return is_seen


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
