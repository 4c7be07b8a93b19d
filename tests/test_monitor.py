"""What is written of steps and evaluations."""

import json
import math
from pathlib import Path

import pytest

from ship_ds.monitor.writer import Monitor

STEP = {"speed/tokens_per_second": 9.0, "loss/total": 1.0}


def _rows(path: Path) -> list[dict[str, float | None]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{path}: {name} is no JSON")

    lines = path.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, 1, 0)
    monitor.step(0, STEP | {"loss/kl": math.inf})
    scores = {"deduction/dev": 0.5, "deduction_answer_loss/dev": math.nan}
    monitor.evaluation(1, scores)
    monitor.close()
    written = {"deduction/dev": 0.5, "deduction_answer_loss/dev": None}
    assert _rows(tmp_path / "evaluations.jsonl") == [{"step": 1, **written}]
    assert _rows(tmp_path / "metrics.jsonl") == [{"step": 0, **STEP, "loss/kl": None, **written}]


def test_rows_of_steps_that_come_again_are_dropped_and_so_are_damaged_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A power cut leaves blocks of zeros, or of what else was on the disk."""
    damaged = [b"\0" * 9 + b'{"step": 1}', b"\xff\n\x85", b"[1]", b'{"step": null}', b""]
    row = b'{"step": %d, "loss/total": 1}'
    rows = [row % 0, *damaged, row % 1, row % 2, row % 3, b'{"st']
    for name in ("metrics", "evaluations", "bad_steps"):
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(rows))
    Monitor(tmp_path, 4, 2).close()
    left = {"metrics": [0, 1], "evaluations": [0, 1, 2], "bad_steps": [0, 1]}
    for name, steps in left.items():
        assert [one["step"] for one in _rows(tmp_path / f"{name}.jsonl")] == steps
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "damaged" in line] == [
        f"ship-ds: {tmp_path / name}.jsonl: 6 damaged rows, as after a power cut: left out"
        for name in ("metrics", "bad_steps", "evaluations")
    ]
