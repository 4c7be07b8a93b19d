"""tools/pair_runs.py over cells that are written down."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools.pair_runs import main

FINGERPRINT = {"data": "d", "dtype": "float32", "harness": 4, "seed": 0, "bundle": "b"}


def write_cell(
    run: Path,
    method: str,
    scores: dict[str, list[float]],
    labelled: tuple[str, ...] = (),
    **fingerprint: Any,
) -> None:
    """ROUGE-L of each task's answers; labelled: tasks that have a label accuracy, of 1."""
    cells = run / "evaluation" / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    cell = {
        "fingerprint": FINGERPRINT | fingerprint,
        "metrics": ["rouge_l", *(["label_accuracy"] if labelled else [])],
        "rows": [
            {"task": name, "rouge_l": values, "label_accuracy": [1.0] * (name in labelled)}
            for name, values in scores.items()
        ],
        "seconds": 1.0,
        "prepare_seconds": 0.0,
        "num_ranks": 1,
    }
    (cells / f"{method}.deduction.unseen.json").write_text(json.dumps(cell))


def test_scores_are_paired_by_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a task's mean, of the tasks that both have: (0.5 - 0.1 + 0.3 - 0.4) / 2."""
    write_cell(tmp_path / "a", "ship", {"one": [0.4, 0.6], "two": [0.3], "three": [1.0]})
    write_cell(tmp_path / "b", "sft", {"two": [0.4], "one": [0.1]}, bundle="another")
    out = tmp_path / "pairs.json"
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main([*runs, "--methods", "sft", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["sft"]["unseen"]
    assert found["difference"]["rouge_l"]["value"] == pytest.approx(0.15)
    assert found["difference"]["n_tasks"] == 2 and found["first"]["n_tasks"] == 3
    assert capsys.readouterr().out.startswith("ship - sft, unseen, rouge_l: +0.150 [")

    write_cell(tmp_path / "a", "ship_one_pass", {"one": [0.9], "two": [0.3]})
    assert main([*runs, "--of-first", "ship_one_pass", "--methods", "sft"]) == 0
    assert capsys.readouterr().out.startswith("ship_one_pass - sft, unseen, rouge_l: +0.350 [")


def test_tasks_with_labels_and_without_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a"
    for method, scores in {"ship": [0.4, 0.7], "sft": [0.1, 0.2]}.items():
        of_tasks = {name: [score] for name, score in zip(("one", "two"), scores, strict=True)}
        write_cell(run, method, of_tasks, labelled=("two",))
    out = tmp_path / "pairs.json"
    ask = [str(run), str(run), "--methods", "sft", "--out", str(out)]
    for kind, values in {"labels": ["+0.500", "+0.000"], "texts": ["+0.300"]}.items():
        assert main([*ask, "--tasks", kind]) == 0
        said = capsys.readouterr().out.splitlines()
        assert [line.split(": ")[1].split()[0] for line in said] == values
        found = json.loads(out.read_text())["sft"]["unseen"]
        assert [found[side]["n_tasks"] for side in ("first", "other", "difference")] == [1, 1, 1]
    write_cell(run, "ship", {"one": [0.4]})
    assert main([*ask, "--tasks", "labels"]) == 2
    said = capsys.readouterr().err
    assert "ship.deduction.unseen: has no task of --tasks labels; leave that out" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("tasks", "fingerprint", "method", "line"),
    [
        (["one"], {"data": "e"}, "sft", "were asked with another data (d and e): evaluate both"),
        (["two"], {}, "sft", "have no task in common"),
        (["one"], {}, "tagi", "b: tagi.deduction.unseen is not measured; `ship-ds evaluate --run"),
    ],
)
def test_what_cannot_be_paired_is_one_line(
    tasks: list[str],
    fingerprint: dict[str, Any],
    method: str,
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_cell(tmp_path / "a", "ship", {"one": [0.4]})
    write_cell(tmp_path / "b", "sft", {name: [0.1] for name in tasks}, **fingerprint)
    out = tmp_path / "pairs.json"
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main([*runs, "--methods", method, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert not out.exists()
