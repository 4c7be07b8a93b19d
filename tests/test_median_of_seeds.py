"""tools/median_of_seeds.py over two written-down runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import start, start_warm

pytestmark = pytest.mark.slow


def write_run(folder: Path, seed: int, value: float, lr: float = 1.0) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"run": {"seed": seed, "folder": str(folder)}, "optimiser": {"lr": lr}})
    )
    cell = {"exact_match": {"value": value, "ci95": [0, 1]}, "n_tasks": 3}
    (folder / "report.json").write_text(
        json.dumps({"deduction": {"seen": cell}, "train_seconds": 10 * seed, "seed": seed})
    )
    return str(folder)


def test_medians_stand_beside_every_runs_value(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / str(seed), seed, value)
        for seed, value in ((0, 0.25), (1, 0.75), (2, 0.5))
    ]
    done = start(["tools/median_of_seeds.py", *runs, "--out", str(tmp_path / "out.json")])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["seeds"] == [0, 1, 2]
    assert found["rows"] == {
        "deduction.seen.exact_match": {"median": 0.5, "values": [0.25, 0.75, 0.5]},
        "train_seconds": {"median": 10, "values": [0, 10, 20]},
    }


def evaluated(folder: Path, seed: int, value: float) -> str:
    run = write_run(folder, seed, value)
    (folder / "report.json").unlink()
    (folder / "evaluation").mkdir()
    cell = {
        "rouge_l": {"value": value, "ci95": [0.1, 0.9]},
        "n_tasks": 3,
        "commonest_text": {"text": "add 5", "n_tasks": 2},
    }
    report = {
        "methods": {"ship": {"about": "SHIP", "deduction": {"unseen": cell}}},
        "paired": {"tagi": {"deduction": {"unseen": cell}}},
        "setting": {"num_tasks": 3},
        "command": "ship-ds evaluate",
    }
    (folder / "evaluation" / "report.json").write_text(json.dumps(report))
    return run


def test_evaluations_keep_their_layout(tmp_path: Path) -> None:
    """One run with its intervals, several with median and range; a run that ended without a report
    will do."""
    one, two = evaluated(tmp_path / "a", 0, 0.25), evaluated(tmp_path / "b", 1, 0.75)
    out = tmp_path / "out.json"
    for runs, wanted in (
        ([one], {"value": 0.25, "ci95": [0.1, 0.9]}),
        ([one, two], {"value": 0.5, "values": [0.25, 0.75], "range": [0.25, 0.75]}),
    ):
        done = start_warm(["tools/median_of_seeds.py", *runs, "--out", str(out)])
        assert done.returncode == 0, done.stderr
        found = json.loads(out.read_text())
        cell: dict[str, Any] = {"rouge_l": wanted, "n_tasks": 3}
        if len(runs) == 1:
            cell["commonest_text"] = {"text": "add 5", "n_tasks": 2}
        assert found["methods"] == {"ship": {"about": "SHIP", "deduction": {"unseen": cell}}}
        assert found["paired"]["tagi"]["deduction"]["unseen"] == cell
        assert found["rows"]["evaluation.methods.ship.deduction.unseen.rouge_l"]["values"]


@pytest.mark.parametrize(
    ("lr", "ended", "line"),
    [(2.0, True, "by more than `run`"), (1.0, False, "report.json: missing")],
)
def test_runs_that_cannot_be_compared_are_one_line(
    lr: float, ended: bool, line: str, tmp_path: Path
) -> None:
    runs = [write_run(tmp_path / "a", 0, 0.5), write_run(tmp_path / "b", 1, 0.5, lr)]
    if not ended:
        (tmp_path / "b" / "report.json").unlink()
    done = start_warm(["tools/median_of_seeds.py", *runs, "--out", str(tmp_path / "out.json")])
    assert done.returncode == 2 and line in done.stderr and not (tmp_path / "out.json").exists()
