"""Every recorded case of 0.1.0, under both stages of ZeRO too; tests/test_recorded_losses.py runs
some of them and says what is compared."""

from pathlib import Path

import pytest

from tests.recorded_run import NUM_STEPS
from tests.test_recorded_losses import BITS, RECORDED, Measured

CASES = list(RECORDED["losses"])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    """By case, what its number of ranks measured."""
    starts: dict[str, tuple[list[str], Path]] = {
        kind: (
            [case for case in CASES if case.startswith(kind)],
            tmp_path_factory.mktemp(kind),
        )
        for kind in ("one", "zero")
    }
    by_kind = {
        kind: Measured.train(cases, 1 if kind == "one" else 2, NUM_STEPS, folder, timeout=1800)
        for kind, (cases, folder) in starts.items()
    }
    return {case: by_kind[kind] for kind, (cases, _) in starts.items() for case in cases}


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES)
def test_steps_of_0_1_0(case: str, measured: dict[str, Measured]) -> None:
    measured[case].check_within_rounding(case, NUM_STEPS)


@pytest.mark.soak
@pytest.mark.parametrize("case", list(BITS["losses"]))
def test_steps_are_those_of_this_version_to_the_bit(
    case: str, measured: dict[str, Measured]
) -> None:
    measured[case].check_to_the_bit(case, NUM_STEPS)
