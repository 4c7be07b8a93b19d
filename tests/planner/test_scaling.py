"""docs/scaling.md says what the planner computes."""

from pathlib import Path

import pytest

from ship_ds.planner import scaling

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


@pytest.mark.slow
def test_the_page_shows_the_tables_as_they_are_now() -> None:
    assert scaling.scaling_tables() in PAGE.read_text()
