"""The pages build without a warning, every one in the navigation, and the picture is as drawn."""

import os
import subprocess
import sys
from pathlib import Path

from ship_ds import api
from tools import draw_architecture

REPOSITORY = Path(__file__).resolve().parents[1]


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
