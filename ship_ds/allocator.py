"""An allocator under which a long training on a CPU keeps its speed.

A step's tensors are as long as its texts, so that no two steps ask for the same sizes. glibc's
malloc keeps large free blocks of many sizes in one sorted list and walks along it at each
allocation; the longer a run, the longer the list (tools/bench_malloc.py). jemalloc and tcmalloc
keep free blocks by classes of sizes. An allocator has to be there before the first allocation: the
program starts itself again with it. Imports no torch.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

LIBRARIES = ("libjemalloc.so.2", "libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
"""By the names that Linux distributions give them; the first one is what was measured."""
KEEP = "SHIP_DS_SYSTEM_MALLOC"
"""Set to anything in the environment, the system's malloc stays."""
_PRELOAD = "LD_PRELOAD"
_SETTINGS = {"jemalloc": ("MALLOC_CONF", "oversize_threshold:0,muzzy_decay_ms:-1")}
"""What an allocator is told, by which variable. jemalloc gives blocks of 8 MB and more back to the
system at once, and smaller ones after ten seconds; a step then gets its gigabytes page by page from
the kernel again, a sixth of its time. So large blocks have no threshold, and pages stay mapped
until the kernel wants them: it may take them at any moment, though they count as this process's
until then."""
_GPU = Path("/dev/nvidiactl")
_MAPS = Path("/proc/self/maps")


def use_scalable_malloc(
    environment: MutableMapping[str, str] = os.environ,
    start_again: Callable[[str, list[str], Mapping[str, str]], object] = os.execve,
) -> None:
    """Start this program again under jemalloc or tcmalloc where the machine has one and no GPU.

    Call it before torch is imported, from a program that is its process's own. It returns where
    nothing is to be done: a GPU computes, no such library is installed, or the user has chosen, by
    LD_PRELOAD or `KEEP`.

    Args:
        environment: of the process.
        start_again: takes program, arguments and environment and does not return.
    """
    # Under an allocator this variable names it, so the program starts again once at most.
    has_one = "malloc" in environment.get(_PRELOAD, "")
    if has_one or environment.get(KEEP) or _GPU.exists():
        return
    library = installed_allocator()
    if library is None:
        return
    preloads = f"{library} {environment.get(_PRELOAD, '')}".strip()
    settings = dict(setting for name, setting in _SETTINGS.items() if name in library)
    arguments = [sys.executable, *sys.orig_argv[1:]]
    # A user's own settings of the allocator replace ours whole.
    start_again(sys.executable, arguments, {**settings, **environment, _PRELOAD: preloads})


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
        mapped = _MAPS.read_text(encoding="utf-8")
    except OSError:
        return "system"
    return next((name for name in ("jemalloc", "tcmalloc") if f"lib{name}" in mapped), "system")
