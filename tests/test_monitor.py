"""What is written of steps and evaluations."""

import json
import math
from pathlib import Path

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
