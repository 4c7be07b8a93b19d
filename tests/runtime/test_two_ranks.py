"""What two real gloo ranks under DeepSpeed do; one pair of processes measures it all (worker.py)."""

import json
from typing import Any

import pytest

from tests.conftest import start


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    done = start(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.runtime.worker", str(folder)],
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "stderr").write_text(done.stderr)
    return {**json.loads((folder / "found.json").read_text()), "folder": folder}


@pytest.mark.parametrize("what", ["trainable", "optimiser", "nf4"])
def test_each_rank_holds_half(found: dict[str, Any], what: str) -> None:
    """Parameters, their optimiser state and the packed 4-bit weights; `quant_state` (absmax, code book) is not sharded."""
    for rank in found["each_rank_holds_half"]:
        held, everything = rank[what]
        assert held == pytest.approx(everything / 2, rel=0.1)
        assert rank["num_nf4"] == 28 and not rank["still whole"]


def test_ten_steps_and_an_evaluation_leave_the_base_as_it_was(found: dict[str, Any]) -> None:
    for rank in found["base_is_untouched"]:
        assert rank["steps"] == 10 and rank["before"] == rank["after"]


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3", "zero3_bf16"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(found: dict[str, Any], stage: str) -> None:
    for rank in found[f"bad_step_{stage}"]:
        assert rank["moved"] == [True, True, False, True]
        assert rank["bad"] == [0, 0, 1, 0] and rank["finite"]
    rows = [json.loads(line) for line in (found["folder"] / f"bad_step_{stage}" / "bad_steps.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and {row["step"] for row in rows} == {2}
    assert all(row["wording"] and row["answered"] for row in rows)
