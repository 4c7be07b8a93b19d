"""Where DeepSpeed's compiled ops are kept. What lies there is loaded as code, so nobody else may be
able to write it. Imports no torch."""

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ship_ds.errors import UserError

_VARIABLE = "TORCH_EXTENSIONS_DIR"


def op_cache(environment: Mapping[str, str]) -> Path:
    """The folder, made where it is missing: TORCH_EXTENSIONS_DIR, or one of this project's own,
    since only its processes keep to the lock there.

    Raises:
        UserError: it cannot be written, or others can write it.
    """
    folder = Path(environment.get(_VARIABLE) or _default())
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError as error:
        raise UserError(
            f"{_VARIABLE}: {folder}: {error.strerror}: set it to a folder that can be written"
        ) from None
    if about.st_uid not in (os.getuid(), 0) or about.st_mode & stat.S_IWOTH:
        raise UserError(
            f"{_VARIABLE}: {folder}: others can write what would be run from there: chmod o-w it, "
            "or set the variable to a folder of your own"
        )
    return folder


def _default() -> Path:
    """Below the home; a process without one, as in some containers, has a folder of its user's
    among the temporary ones."""
    try:
        home = Path.home()
    except RuntimeError:
        home = Path("/nowhere")
    if os.access(home, os.W_OK):
        return home / ".cache" / "ship_ds" / "torch_extensions"
    return Path(tempfile.gettempdir()) / f"ship_ds-{os.getuid()}" / "torch_extensions"
