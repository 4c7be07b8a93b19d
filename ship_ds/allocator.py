"""An allocator under which a long training on a CPU keeps its speed.

A step's tensors are as long as its texts, so that no two steps ask for the same sizes. glibc's
malloc keeps free blocks of many sizes in one sorted list and walks along it at each allocation;
after some tens of steps of a model of a hundred million parameters that walk is half of the step,
and free blocks between tensors hold a third more memory. jemalloc and tcmalloc keep free blocks by
classes of sizes. An allocator has to be there before the first allocation: the program starts
itself again with it. Imports no torch.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

LIBRARIES = ("libjemalloc.so.2", "libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
"""By the names that Linux distributions give them, the better one for our sizes first."""
_PRELOAD, _OFF = "LD_PRELOAD", "SHIP_DS_MALLOC"
_GPU = Path("/dev/nvidiactl")
_MAPS = Path("/proc/self/maps")


def use_scalable_malloc(
    environment: MutableMapping[str, str] = os.environ,
    start_again: Callable[[str, list[str], Mapping[str, str]], object] = os.execve,
) -> None:
    """Start this program again under jemalloc or tcmalloc where the machine has one and no GPU.

    Call it before torch is imported, from a program that is its process's own. It returns where
    nothing is to be done: a GPU computes, no such library is installed, or the user has chosen, by
    LD_PRELOAD or SHIP_DS_MALLOC=system.

    Args:
        environment: of the process.
        start_again: takes program, arguments and environment and does not return.
    """
    if _OFF in environment or "malloc" in environment.get(_PRELOAD, "") or _GPU.exists():
        return
    library = installed_allocator()
    if library is None:
        return
    preloads = f"{library} {environment.get(_PRELOAD, '')}".strip()
    # Marked, so that a library that the loader then leaves out is not tried again without end.
    chosen = {**environment, _PRELOAD: preloads, _OFF: library}
    start_again(sys.executable, [sys.executable, *sys.orig_argv[1:]], chosen)


def installed_allocator() -> str | None:
    """The first of `LIBRARIES` that the loader finds on this machine; None: it finds none."""
    return next(filter(_loads, LIBRARIES), None)


def _loads(library: str) -> bool:
    """Asked of the loader itself, which complains of what it cannot preload and goes on. Opening
    the library here would tell nothing: jemalloc refuses to be opened once a program runs."""
    if sys.platform != "linux":
        return False
    asked = {**os.environ, _PRELOAD: library}
    try:
        done = subprocess.run(["true"], env=asked, stderr=subprocess.PIPE, check=False)
    except OSError:
        return False
    return not done.stderr


def allocator_in_use() -> str:
    """jemalloc, tcmalloc or system: whose malloc this process has."""
    try:
        mapped = _MAPS.read_text()
    except OSError:
        return "system"
    return next((name for name in ("jemalloc", "tcmalloc") if f"lib{name}" in mapped), "system")
