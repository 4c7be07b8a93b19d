"""What a plan says, against the bytes that real steps and evaluations hold; the other cases of
tools/bench_memory.py are run by `make soak` (tests/soak/test_measured.py)."""

from pathlib import Path

import pytest

from tools import bench_memory

WITHIN = 10
"""Per cent of what is measured."""
CASES = [("embedded, recomputed", "zero2, 1 rank")]


def check(case: str, stage: str, folder: Path) -> None:
    if case.startswith("smollm2"):
        bench_memory.make_base(folder / "smollm2")
    rows = bench_memory.compare(case, stage, folder, repeats=1)
    assert "training, at most" in rows
    assert ("answers under adapters" in rows) == (bench_memory.STAGES[stage] == 1)
    off = {name: row for name, row in rows.items() if abs(row["error_percent"]) > WITHIN}
    assert not off


@pytest.mark.slow
@pytest.mark.parametrize(("case", "stage"), CASES)
def test_a_plan_is_what_is_held(case: str, stage: str, tmp_path: Path) -> None:
    check(case, stage, tmp_path)
