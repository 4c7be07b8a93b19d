"""Figures from a run's JSON: drawn, readable without colour, or a reason why not."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from ship_ds import cli
from ship_ds.config import load_config
from ship_ds.errors import UserError
from ship_ds.evaluation import figures


def cell(value: float) -> dict[str, Any]:
    interval = {"value": value, "ci95": [max(0.0, value - 0.1), min(1.0, value + 0.1)]}
    metrics = ("exact_match", "rouge_l", "execution_accuracy", "execution_accuracy_encoder")
    return {**{name: interval for name in metrics}, "n_tasks": 10, "n_examples": 100}


def write_run(folder: Path, num_seen: int, weight: float, value: float) -> Path:
    rng = random.Random(num_seen)
    (folder / "evaluation").mkdir(parents=True)
    rows = [
        {
            "step": s,
            "loss/task": 2 / (s + 1),
            "loss/reconstruction": 3 / (s + 1),
            "loss/kl": 0.1 * s,
        }
        for s in range(80)
    ]
    rows[3]["loss/task"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "data.num_seen": num_seen,
        "loss.reconstruction": weight,
        "run.folder": folder,
        "run.seed": num_seen,
    }
    config = load_config("quickstart-smoke", [f"{key}={value}" for key, value in changes.items()])
    (folder / "config.json").write_text(config.model_dump_json())
    (folder / "splits.json").write_text(
        json.dumps({"seen": [str(i) for i in range(num_seen)], "dev": [], "unseen": []})
    )
    induction = {
        part: {**cell(value), "by_num_shown": {str(n): cell(value * n / 5) for n in (1, 3, 5)}}
        for part in ("seen", "unseen")
    }
    both = {part: cell(value) for part in ("seen", "unseen")}
    methods = {
        "ship": {
            "instruction_in_query": False,
            "deduction": both,
            "induction": induction,
            "reasoning": both,
        },
        "prompting": {"instruction_in_query": True, "deduction": both},
    }
    (folder / "evaluation" / "report.json").write_text(json.dumps({"methods": methods}))
    (folder / "report.json").write_text(
        json.dumps({"reconstruction": {part: cell(1 - value) for part in ("seen", "unseen")}})
    )
    points = [
        {"instruction": f"task {t}", "kind": kind, "latent": [rng.gauss(t, 1) for _ in range(4)]}
        for t in range(3)
        for kind in ("encoded", "trained", "re-encoded")
        for _ in range(4)
    ]
    categories = ["Text to Code", "Misc.", *(f"category {n}" for n in range(8))]
    latents = [
        {"category": name, "part": part, "latent": [rng.gauss(n, 1) for _ in range(4)]}
        for n, name in enumerate(categories)
        for part in ("seen", "seen", "unseen")
    ]
    (folder / "evaluation" / "latents.json").write_text(
        json.dumps({"points": points, "tasks": latents})
    )
    tasks = [
        {
            "part": part,
            "agreement": [rng.random() for _ in range(5)],
            "exact_match": [0, 1, 1, 0, 1],
        }
        for part in ("seen", "unseen")
        for _ in range(6)
    ]
    (folder / "evaluation" / "tasks.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*tasks, {"part": "seen", "exact_match": [1]}])
    )
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "whole", 40, 1.0, 0.8),
        write_run(tmp_path / "half", 20, 1.0, 0.5),
        write_run(tmp_path / "light", 40, 0.1, 0.6),
    ]


@pytest.mark.slow
def test_every_figure_is_drawn_in_black_and_white(runs: list[Path], tmp_path: Path) -> None:
    said: list[str] = []
    paths = figures.plot(runs, tmp_path / "figures", said.append)
    assert [path.stem for path in paths] == list(figures.FIGURES) and said == []
    for path in paths:
        pixels = matplotlib.image.imread(path)[..., :3]
        assert 0.005 < float((pixels.min(-1) < 0.5).mean()) < 0.5, f"{path.name}: blank, or all ink"
        assert float((pixels.max(-1) - pixels.min(-1)).max()) < 0.02, (
            f"{path.name}: relies on colour"
        )
    assert not list((tmp_path / "figures").glob("*.part*"))


@pytest.mark.parametrize("draw", figures.FIGURES.values(), ids=list(figures.FIGURES))
def test_axes_say_what_they_show(draw: Callable[..., Any], runs: list[Path]) -> None:
    figure = draw(runs)
    assert any(axes.get_xlabel() for axes in figure.axes)
    assert any(axes.get_ylabel() or axes.get_title(loc="left") for axes in figure.axes)


def test_one_run_without_an_evaluation_gives_its_losses_and_reasons(
    runs: list[Path], tmp_path: Path
) -> None:
    (runs[0] / "evaluation" / "report.json").unlink()
    (runs[0] / "evaluation" / "latents.json").unlink()
    (runs[0] / "evaluation" / "tasks.jsonl").unlink()
    said: list[str] = []
    assert [path.stem for path in figures.plot(runs[:1], tmp_path / "figures", said.append)] == [
        "losses"
    ]
    assert len(said) == len(figures.FIGURES) - 1
    assert "run ship-ds evaluate --run" in next(
        line for line in said if line.startswith("comparison")
    )
    assert "give runs that differ in it by --runs" in next(
        line for line in said if line.startswith("training_rules")
    )


def test_a_report_of_reconstruction_alone_is_compared_in_no_figure(
    runs: list[Path], tmp_path: Path
) -> None:
    path = runs[0] / "evaluation" / "report.json"
    report = json.loads(path.read_text())
    for method in report["methods"].values():
        for direction in ("deduction", "induction", "reasoning"):
            method.pop(direction, None)
    path.write_text(json.dumps(report))
    said: list[str] = []
    figures.plot(runs[:1], tmp_path / "figures", said.append)
    line = next(line for line in said if line.startswith("comparison"))
    assert line.endswith("none of deduction, induction, reasoning was measured")


@pytest.mark.parametrize(
    ("draw", "xs", "ys"),
    [
        (figures.training_rules, [50, 100], [0.5, 0.8]),
        (figures.reconstruction_weight, [0.1, 1], [0.6, 0.8]),
    ],
)
def test_curve_goes_through_the_scores_of_runs_that_differ_in_that_alone(
    draw: Callable[..., Any], xs: list[float], ys: list[float], runs: list[Path]
) -> None:
    line = draw(runs).axes[0].get_lines()[0]
    np.testing.assert_allclose(line.get_xdata(), xs)
    np.testing.assert_allclose(line.get_ydata(), ys)


@pytest.mark.parametrize("key", ["family_alpha", "balances_labels", "examples_per_task"])
def test_a_run_that_drew_otherwise_is_no_point_of_the_curve(key: str, runs: list[Path]) -> None:
    config = json.loads((runs[2] / "config.json").read_text())
    config["training"][key] = {"family_alpha": 0.5, "balances_labels": True}.get(key, 9)
    (runs[2] / "config.json").write_text(json.dumps(config))
    with pytest.raises(figures.NotDrawn, match="no two weights of reconstruction"):
        figures.reconstruction_weight(runs)


def test_reconstruction_stands_beside_where_the_training_ended_with_a_report(
    runs: list[Path], tmp_path: Path
) -> None:
    """And a weight of 0 has a place on the axis of decades."""
    (runs[2] / "report.json").unlink()
    runs.append(write_run(tmp_path / "none", 40, 0.0, 0.7))
    axes = figures.reconstruction_weight(runs).axes[1]
    lines = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_allclose(lines["reconstruction"].get_xdata(), [0, 1])
    np.testing.assert_allclose(lines["reconstruction"].get_ydata(), [0.3, 0.2])
    np.testing.assert_allclose(lines["deduction"].get_xdata(), [0, 0.1, 1])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "0.1", "1"]
    left, middle, right = axes.transData.transform([(0, 0), (0.1, 0), (1, 0)])[:, 0]
    assert left < middle < right and (middle - left) > (right - middle) / 4


def test_missing_run_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["plot", "--run", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no such folder" in error


def test_losses_has_a_curve_of_every_objective_whatever_they_are(tmp_path: Path) -> None:
    rows = [{"step": s, "loss/total": 3.0, "loss/task": 2.0, "loss/distilled": 1.0} for s in (0, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = figures.losses([tmp_path]).axes[0].get_lines()
    curves = {line.get_label(): line.get_ydata() for line in lines if line.get_color() == "black"}
    assert list(curves) == ["task", "distilled"]
    np.testing.assert_allclose(curves["distilled"], [1, 1])


def test_a_line_that_is_being_written_is_left_out_and_a_damaged_one_named(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 0, "loss/task": 3}\n{"step": 1, "loss/task": 2}\n{"step": 2, "loss/')
    curves = figures.losses([tmp_path]).axes[0].get_lines()
    assert [list(np.asarray(line.get_xdata())) for line in curves] == [[0, 1], [0, 1]]
    log.write_text('{"step": 0, "loss/task": 3}\n{"step": 1, "loss\n{"step": 2, "loss/task": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not JSON"):
        figures.losses([tmp_path])


def test_answers_of_equal_agreement_are_kept_together() -> None:
    """Of four answers: the surest is right; of two equal ones one is; the last is wrong."""
    coverage, risk = figures._risks([(1.0, 1.0), (0.5, 1.0), (0.5, 0.0), (0.0, 0.0)])
    assert coverage == [25, 75, 100] and risk == [0, pytest.approx(100 / 3), 50]


def test_like_neighbours_are_counted_by_hand() -> None:
    """Two of five have one of their category next to them; of the 20 ordered pairs 4 are alike."""
    latents = np.array([[0.0], [1.0], [3.0], [3.5], [9.0]])
    alike, chance = figures._share_of_like_neighbours(latents, ["a", "a", "b", "c", "b"])
    assert alike == pytest.approx(2 / 5) and chance == pytest.approx(4 / 20)


def test_a_run_of_one_category_has_no_map_of_them(runs: list[Path]) -> None:
    path = runs[0] / "evaluation" / "latents.json"
    kept = json.loads(path.read_text())
    for task in kept["tasks"]:
        task["category"] = "one"
    path.write_text(json.dumps(kept))
    with pytest.raises(figures.NotDrawn, match="no two categories"):
        figures.categories(runs)
