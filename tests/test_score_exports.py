"""tools/score_exports.py over a run's unseen tasks."""

import json
from pathlib import Path

import pytest

from tests.conftest import start_warm
from tools.score_exports import main


def test_every_way_answers_and_two_answer_as_the_live_adapter(
    one_rank_run: Path, tmp_path: Path
) -> None:
    out, work = tmp_path / "exports.json", tmp_path / "work"
    command = ["tools/score_exports.py", "--run", str(one_rank_run), "--num-tasks", "2"]
    done = start_warm([*command, "--work", str(work), "--out", str(out)])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    ways = found["ways"]
    names = ["live", "peft", "merged, original", "merged, dequantised", "merged, nf4"]
    assert list(ways) == names == [line.split(": ")[0] for line in done.stdout.splitlines()]
    # What training saw, in other hands; the other two are other weights.
    assert all(ways[name]["as_live"] == 1 for name in ("live", "peft", "merged, dequantised"))
    assert all(way["n_tasks"] == 2 for way in ways.values())
    assert ways["peft"]["rouge_l"] == ways["live"]["rouge_l"]
    assert found["folders"] == [] and found["from_live"] <= 1e-4
    assert {path.name for path in work.iterdir()} == {"adapters"}


def test_a_part_without_tasks_is_one_line(
    one_rank_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--run", str(one_rank_run), "--num-tasks", "0", "--work", str(tmp_path / "work")]
    assert main(command) == 2 and not (tmp_path / "work").exists()
    assert capsys.readouterr().err.endswith("has no task there\n")
