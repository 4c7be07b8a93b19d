"""tools/score_tuning.py over a run's unseen tasks, and what it says of two curves."""

import json
from pathlib import Path

import pytest

from ship_ds.evaluation.tuning import Curve
from tests.conftest import start_warm
from tools.score_tuning import compared, main


def test_steps_are_those_before_the_fresh_ones_last_loss() -> None:
    """Of three tasks one begins there, one comes there after two of four steps, one never does."""
    fresh = Curve("fresh", (3.0, 2.0, 1.5, 1.0), {0: 4.0, 2: 2.0, 4: 1.0})
    generated = [
        Curve("generated", (0.5,) * 4, {0: 0.5, 2: 0.5, 4: 0.5}),
        Curve("generated", (1.0,) * 4, {0: 2.0, 2: 1.0, 4: 0.5}),
        Curve("generated", (1.5,) * 4, {0: 2.0, 2: 1.5, 4: 1.2}),
    ]
    found = compared(generated, [fresh] * 3, 4)
    assert found["share_that_reaches_it"] == 2 / 3 and found["steps_to_it"] == 2
    assert found["steps_saved"]["value"] == 2.0  # four, two and none
    assert found["last_minus_fresh"]["value"] == round((-0.5 - 0.5 + 0.2) / 3, 4)


def test_each_start_has_its_own_rate(one_rank_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuning.json"
    command = ["tools/score_tuning.py", "--run", str(one_rank_run), "--num-tasks", "2"]
    command += ["--steps", "3", "--lr", "1e-3", "1e-2", "--out", str(out)]
    done = start_warm(command)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert list(found["by_lr"]) == ["0.001", "0.01"] and found["at_best_lr"]["n_tasks"] == 2
    for name, rate in found["best_lr"].items():
        lasts = {r: starts[name]["last"]["value"] for r, starts in found["by_lr"].items()}
        assert lasts[f"{rate:g}"] == min(lasts.values())
    # `peft`'s start is the base at any rate.
    firsts = {starts["fresh"]["first"]["value"] for starts in found["by_lr"].values()}
    assert len(firsts) == 1
    assert "tasks reach the fresh one's last loss" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--steps", "0"], "--steps: 0: expected a number above zero"),
        (["--lr", "1e-3", "nan"], "--lr: nan: expected a number above zero"),
    ],
)
def test_bad_numbers_are_one_line_before_a_run_is_opened(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", "nowhere", *arguments]) == 2
    assert capsys.readouterr().err == f"score_tuning: {line}\n"
