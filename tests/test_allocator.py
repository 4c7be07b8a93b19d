"""The program starts itself again under a scalable malloc, once, and only where that serves."""

import subprocess
import sys
from collections.abc import Mapping
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import pytest

from ship_ds import allocator
from tests.conftest import REPOSITORY, environment


def restarts(
    monkeypatch: pytest.MonkeyPatch,
    chosen: Mapping[str, str],
    libraries: tuple[str, ...] = ("libnowhere.so.2", "libc.so.6"),
    gpu: str = "/nowhere",
) -> list[Any]:
    """What would be executed, with the C library standing for an allocator."""
    started: list[Any] = []
    monkeypatch.setattr(allocator, "LIBRARIES", libraries)
    monkeypatch.setattr(allocator, "_GPU", Path(gpu))
    allocator.use_scalable_malloc(dict(chosen), lambda *arguments: started.append(arguments))
    return started


def test_the_same_command_runs_again_with_the_library_before_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [(program, arguments, surroundings)] = restarts(monkeypatch, {"A": "b", "LD_PRELOAD": "x.so"})
    assert [program, *sys.orig_argv[1:]] == arguments and program == sys.executable
    assert surroundings == {"A": "b", "LD_PRELOAD": "libc.so.6 x.so"}


@pytest.mark.parametrize(
    ("chosen", "told"),
    [({}, {"oversize_threshold:0", "muzzy_decay_ms:-1"}), ({"MALLOC_CONF": "a:1"}, {"a:1"})],
)
def test_jemalloc_keeps_the_pages_of_a_step(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str], told: set[str]
) -> None:
    monkeypatch.setattr(allocator, "_loads", lambda library: True)
    [(_, _, surroundings)] = restarts(monkeypatch, chosen, allocator.LIBRARIES)
    assert set(surroundings["MALLOC_CONF"].split(",")) == told
    assert "MALLOC_CONF" not in restarts(monkeypatch, {}, ("libtcmalloc.so.4",))[0][2]


_PAGES = """
import resource, sys
from ship_ds import allocator
allocator._GPU = allocator.Path('/nowhere')
allocator.use_scalable_malloc()
size = 50 << 20
bytearray(size)  # given back at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(size)
fresh = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(fresh * resource.getpagesize() / size)
"""


def test_a_real_jemalloc_hands_out_the_same_pages_again() -> None:
    # Asked of the system and not of allocator.py, which may be what is wrong.
    if find_library("jemalloc") is None:
        pytest.skip("jemalloc is not installed")
    surroundings = environment() | {"PYTHONPATH": str(REPOSITORY)}
    for name in ("LD_PRELOAD", "MALLOC_CONF", allocator.KEEP):
        surroundings.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", _PAGES], env=surroundings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1


@pytest.mark.parametrize("library", allocator.LIBRARIES)
def test_it_starts_again_once(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """Whether or not the loader took the library."""
    assert restarts(monkeypatch, {"LD_PRELOAD": f"{library} x.so"}) == []


@pytest.mark.parametrize(
    "chosen", [{"LD_PRELOAD": "/opt/libmimalloc.so"}, {"SHIP_DS_SYSTEM_MALLOC": "1"}]
)
def test_a_users_choice_stays(monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str]) -> None:
    assert restarts(monkeypatch, {}) and restarts(monkeypatch, chosen) == []


def test_without_a_library_or_beside_a_gpu_nothing_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert restarts(monkeypatch, {}, libraries=("libnowhere.so.2",)) == []
    assert restarts(monkeypatch, {}, gpu="/") == []


_CUSTOM = """
import os
from pathlib import Path

def started(program, arguments, surroundings):
    print(arguments[1:], surroundings["LD_PRELOAD"], flush=True)
    os._exit(0)

os.execve = started
from ship_ds import allocator
allocator.LIBRARIES, allocator._GPU = ("libc.so.6",), Path("/nowhere")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "starts_again"),
    [
        (["-m", "ship_ds.train", "--config", "no_recipe"], True),
        (["ship_ds/train.py", "--config", "no_recipe"], True),
        (["-m", "ship_ds.cli", "train", "--config", "no_recipe"], True),
        (["-m", "ship_ds.cli", "config", "no_section"], False),
    ],
)
def test_training_does_so_however_it_is_started(
    command: list[str], starts_again: bool, tmp_path: Path
) -> None:
    """Python runs a `sitecustomize` before the program; this one prints what would be executed."""
    (tmp_path / "sitecustomize.py").write_text(_CUSTOM)
    surroundings = environment() | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    for name in ("LD_PRELOAD", allocator.KEEP):
        surroundings.pop(name, None)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=surroundings,
        capture_output=True,
        text=True,
    )
    if starts_again:
        assert done.stdout == f"{command} libc.so.6\n", done.stderr[-2000:]
    else:
        assert done.returncode == 2 and "libc.so.6" not in done.stdout


def test_a_real_process_goes_on_under_it() -> None:
    """Whichever is installed here; without one, the same process goes on."""
    surroundings = environment() | {"PYTHONPATH": str(REPOSITORY)}
    for name in ("LD_PRELOAD", allocator.KEEP):
        surroundings.pop(name, None)
    program = (
        "import sys; from ship_ds import allocator; allocator._GPU = allocator.Path('/nowhere'); "
        "allocator.use_scalable_malloc(); print(allocator.allocator_in_use(), sys.argv[1:])"
    )
    installed = allocator.installed_allocator()
    done = subprocess.run(
        [sys.executable, "-c", program, "a b"], env=surroundings, capture_output=True, text=True
    )
    name = installed.removeprefix("lib").split(".")[0].split("_")[0] if installed else "system"
    assert done.stdout == f"{name} ['a b']\n" and done.stderr == ""


def test_the_word_for_it_goes_by_what_is_mapped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    maps = tmp_path / "maps"
    monkeypatch.setattr(allocator, "_MAPS", maps)
    assert allocator.allocator_in_use() == "system"
    maps.write_text("7f00-7f01 r-xp 0 fe:00 1 /usr/lib/libtcmalloc_minimal.so.4.5\n")
    assert allocator.allocator_in_use() == "tcmalloc"
