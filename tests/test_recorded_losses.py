"""The losses and gradient norms of the first of 40 steps: those of version 0.1.0 up to rounding,
and on the kind of processor that recorded this version's own, with the same libraries, these to the
bit.

Version 0.1.0 added up in another order: its linear layers met padding. Other orders that were
measured: the kernels of AVX-512, AVX2 and SSE (`ATEN_CPU_CAPABILITY`, `MKL_CBWR`,
`ONEDNN_MAX_CPU_ISA`) are at most 7e-5 of a loss and 8e-5 of a gradient norm apart after 40 steps,
one rank and two 1.2e-4 and 2.7e-4. The tolerances are four times the largest of these. What stands
in recorded_bits.json is off 0.1.0's by at most 1.2e-05 of a loss and 6.4e-05 of a norm.

All steps of all 27 cases are compared by `make soak` (tests/soak/test_recorded_losses.py).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, start, start_warm
from tests.recorded_run import NUM_FIRST_STEPS, NUM_STEPS

_FIXTURES = REPOSITORY / "tests" / "fixtures"
RECORDED = json.loads((_FIXTURES / "recorded_losses.json").read_text())
BITS = json.loads((_FIXTURES / "recorded_bits.json").read_text())
TOLERANCES = {"loss": 5e-4, "task": 5e-4, "reconstruction": 5e-4, "kl": 5e-4, "norm": 1e-3}
"""The largest relative difference that another kind of processor, or order of sums, may make."""
ONE_RANK = ["one/lora/none", "one/soft_prompt/hard", "one/reshape/soft"]
"""With `recorded_run.TWO_RANKS` each adapter and each place of the instruction once; `make soak`
trains all 27 cases."""

Losses = dict[str, list[float]]


@dataclass(frozen=True)
class Measured:
    """What this version and this computer make of recorded cases."""

    losses: dict[str, Losses]
    computer: dict[str, Any]

    @classmethod
    def train(
        cls, cases: list[str], num_ranks: int, num_steps: int, folder: Path, timeout: int
    ) -> "Measured":
        """In one start."""
        program = ["-m", "tests.recorded_run", str(folder), str(num_steps), *cases]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        done = (
            start([*launcher, *program], timeout) if num_ranks > 1 else start_warm(program, timeout)
        )
        assert done.returncode == 0, done.stderr[-4000:]
        losses, computer = (
            json.loads((folder / name).read_text()) for name in ("losses.json", "computer.json")
        )
        return cls(losses, computer)

    def check_within_rounding(self, case: str, num_steps: int) -> None:
        """Assert that no number of the case's first steps is further off than the tolerances."""
        recorded = first(RECORDED["losses"][case], num_steps)
        assert not difference(recorded, self.losses[case], TOLERANCES)

    def check_to_the_bit(self, case: str, num_steps: int) -> None:
        """Assert that each number of these is this version's recorded one; skip on another
        computer."""
        for key, value in BITS["computer"].items():
            if self.computer[key] != value:
                pytest.skip(f"recorded with {key} {value}, and here it is {self.computer[key]}")
        assert not difference(first(BITS["losses"][case], num_steps), self.losses[case])


def first(recorded: Losses, num_steps: int) -> Losses:
    """Of each series the first steps; all of them are there."""
    assert all(len(values) == NUM_STEPS for values in recorded.values())
    return {series: values[:num_steps] for series, values in recorded.items()}


def difference(
    recorded: Losses, measured: Losses, tolerances: dict[str, float] | None = None
) -> str:
    """The first number that differs, in one line; "" where none does.

    Args:
        recorded: by series ("loss", "norm", ...) a number for each step.
        measured: the same of another run.
        tolerances: the relative difference that is allowed, by series; None: none at all.
    """
    assert recorded.keys() == measured.keys()
    for series, values in recorded.items():
        allowed = tolerances[series] if tolerances else 0.0
        for step, (was, now) in enumerate(zip(values, measured[series], strict=True)):
            if not math.isclose(was, now, rel_tol=allowed, abs_tol=0):
                return f"{series} of step {step} was {was!r} and is {now!r}"
    return ""


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("one_rank")
    return Measured.train(ONE_RANK, 1, NUM_FIRST_STEPS, folder, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_RANK)
def test_one_rank_takes_the_steps_of_0_1_0(case: str, one_rank: Measured) -> None:
    one_rank.check_within_rounding(case, NUM_FIRST_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_RANK)
def test_one_rank_repeats_its_steps_to_the_bit(case: str, one_rank: Measured) -> None:
    one_rank.check_to_the_bit(case, NUM_FIRST_STEPS)


def test_one_wrong_bit_and_one_wrong_digit_are_seen() -> None:
    recorded: dict[str, Any] = RECORDED["losses"]["one/lora/none"]
    last_bit = recorded | {
        "norm": [*recorded["norm"][:-1], math.nextafter(recorded["norm"][-1], 9)]
    }
    assert difference(recorded, recorded) == "" == difference(recorded, last_bit, TOLERANCES)
    assert difference(recorded, last_bit).startswith("norm of step 39 was ")
    wrong = recorded | {"kl": [recorded["kl"][0] * 1.001, *recorded["kl"][1:]]}
    assert difference(recorded, wrong, TOLERANCES).startswith("kl of step 0 was ")
