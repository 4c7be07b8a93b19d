"""The program starts itself again under a scalable malloc, once, and only where that serves."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ship_ds import allocator
from tests.conftest import REPOSITORY, environment


def restarts(
    monkeypatch: pytest.MonkeyPatch, chosen: Mapping[str, str], installed: str = "libc.so.6"
) -> list[Any]:
    """What would be executed, with the C library standing for an allocator."""
    started: list[Any] = []
    monkeypatch.setattr(allocator, "LIBRARIES", ("libnowhere.so.2", installed))
    monkeypatch.setattr(allocator, "_GPU", Path("/nowhere"))
    allocator.use_scalable_malloc(dict(chosen), lambda *arguments: started.append(arguments))
    return started


def test_the_same_command_runs_again_with_the_library_before_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [(program, arguments, surroundings)] = restarts(monkeypatch, {"A": "b", "LD_PRELOAD": "x.so"})
    assert [program, *sys.orig_argv[1:]] == arguments and program == sys.executable
    assert surroundings["LD_PRELOAD"] == "libc.so.6 x.so" and surroundings["A"] == "b"
    assert restarts(monkeypatch, surroundings) == [], "once"


@pytest.mark.parametrize(
    "chosen", [{"LD_PRELOAD": "/opt/libmimalloc.so"}, {"SHIP_DS_MALLOC": "system"}]
)
def test_a_users_choice_stays(monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str]) -> None:
    assert restarts(monkeypatch, {}) and restarts(monkeypatch, chosen) == []


def test_without_a_library_or_beside_a_gpu_nothing_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert restarts(monkeypatch, {}, "libnowhere.so.4") == []
    started: list[Any] = []
    monkeypatch.setattr(allocator, "LIBRARIES", ("libc.so.6",))
    monkeypatch.setattr(allocator, "_GPU", Path("/"))
    allocator.use_scalable_malloc({}, lambda *arguments: started.append(arguments))
    assert started == []


def test_a_real_process_goes_on_under_it() -> None:
    """Whichever is installed here; without one, the same process goes on."""
    surroundings = environment() | {"PYTHONPATH": str(REPOSITORY)}
    surroundings.pop("SHIP_DS_MALLOC", None)
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
