"""The pages build without a warning, every one in the navigation; the picture is as drawn, the
floors are as described."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ship_ds import api
from tools import draw_architecture

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Strict: a page outside the navigation, a dead link or a dead anchor fails."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    build = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    assert (tmp_path / "index.html").exists()


def test_picture_is_what_the_script_draws() -> None:
    assert draw_architecture.PICTURE.read_text() == draw_architecture.draw()


def test_api_page_has_every_public_name() -> None:
    page = (REPOSITORY / "docs" / "api.md").read_text()
    assert {f"::: ship_ds.api.{name}" for name in api.__all__} == set(
        line for line in page.splitlines() if line.startswith(":::")
    )


def floors() -> dict[str, int]:
    """The floor of each room in docs/architecture.md: {"errors": 0, ..., "train": 8}."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", page, re.MULTILINE)
    return {
        room: int(floor)
        for floor, rooms in rows
        for room in re.findall(r"`(\w+)(?:/|\.py)`", rooms)
    }


def rooms_imported_at_once(path: Path) -> set[str]:
    """What a file of the package imports as it is imported itself, without late imports."""
    modules: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            modules += [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            modules += [name.name for name in node.names]
    return {module.split(".")[1] for module in modules if module.startswith("ship_ds.")}


def test_every_room_imports_lower_floors_alone() -> None:
    package = REPOSITORY / "ship_ds"
    rooms = {path.stem for path in package.glob("*.py") if path.stem != "__init__"} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    by_room = floors()
    assert by_room.keys() == rooms
    for room, floor in by_room.items():
        root = package / room
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [package / f"{room}.py"]:
            for other in rooms_imported_at_once(path) & rooms - {room}:
                assert by_room[other] < floor, (path, other)
