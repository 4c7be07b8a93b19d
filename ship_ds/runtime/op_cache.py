"""Where DeepSpeed's compiled ops are kept, and what torch.compile makes. What lies there is loaded
as code, so nobody else may be able to write it. Imports no torch."""

import os
import re
import stat
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from ship_ds.errors import UserError
from ship_ds.placement import processor

_VARIABLE = "TORCH_EXTENSIONS_DIR"
_COMPILED = "TORCHINDUCTOR_CACHE_DIR"
_SAYS_KIND = re.compile(r"(?:model name|flags|Features|CPU part)\s*:")


def op_cache(environment: Mapping[str, str]) -> Path:
    """The folder, made where it is missing: TORCH_EXTENSIONS_DIR, or one of this project's own,
    since only its processes keep to the lock there.

    Raises:
        UserError: it cannot be written, or others can write it.
    """
    return _trusted_folder(Path(environment.get(_VARIABLE) or _default()), _VARIABLE)


def compiled_cache(environment: Mapping[str, str]) -> Path:
    """The folder of what torch.compile makes, made where it is missing: as the user says, or one
    below `op_cache` for machines with this one's processor.

    torch looks up what it made by the program alone, and finds a loop for the vectors of another
    processor where machines share the folder: of a SwiGLU that was made for AVX-512, nearly half
    was wrong under AVX2.

    Raises:
        UserError: see `op_cache`.
    """
    # torch's default is a folder in /tmp, whoever made it. Its modules put that into the
    # environment as they are imported, so that it says nothing of the user.
    default = Path(tempfile.gettempdir()) / "torchinductor_"
    chosen = environment.get(_COMPILED, str(default))
    if not chosen.startswith(str(default)):
        return _trusted_folder(Path(chosen), _COMPILED)
    return _trusted_folder(op_cache(environment) / "inductor" / _processor(), _VARIABLE)


def _processor() -> str:
    """A name for what this machine's compiler makes loops for."""
    kind = set(filter(_SAYS_KIND.match, processor()))
    # Of a system that does not say, each machine for itself.
    return sha256("\n".join(sorted(kind) or os.uname()).encode()).hexdigest()[:12]


def _trusted_folder(folder: Path, variable: str) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError as error:
        raise UserError(
            f"{variable}: {folder}: {error.strerror}: set it to a folder that can be written"
        ) from None
    if about.st_uid not in (os.getuid(), 0) or about.st_mode & stat.S_IWOTH:
        raise UserError(
            f"{variable}: {folder}: others can write what would be run from there: chmod o-w it, "
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
