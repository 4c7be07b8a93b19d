"""The plan against measured memory, in the cases that `make test` leaves out."""

from pathlib import Path

import pytest

from tests.planner.test_measured import CASES, check
from tools import bench_memory

OTHERS = [
    (case, stage)
    for case in bench_memory.CASES
    for stage in bench_memory.stages_of(case)
    if (case, stage) not in CASES
]


@pytest.mark.soak
@pytest.mark.parametrize(("case", "stage"), OTHERS)
def test_a_plan_is_what_is_held(case: str, stage: str, tmp_path: Path) -> None:
    check(case, stage, tmp_path)
