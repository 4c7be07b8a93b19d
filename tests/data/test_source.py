"""A task source from outside the package (tests/toys/source.py) checks, trains, resumes and plans,
and nothing inside the package knows of it."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ship_ds.config import load_config
from ship_ds.data.rules import RulesConfig, RulesSource
from ship_ds.data.source import source_of
from ship_ds.data.task_files import FilesConfig, FilesSource
from tests.conftest import start

TASKS = "tests/fixtures/v0_1/tasks.jsonl"
DATA = (
    "data={kind: toy_joined, parts: [{kind: rules, num_seen: 12, train_examples: 12, "
    f"test_examples: 3}}, {{kind: files, path: {TASKS}, filters: {{min_examples_per_task: 2}}}}]}}"
)


@pytest.fixture(autouse=True)
def with_the_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIP_DS_PLUGINS", "tests.toys.source")


def ship_ds(*arguments: str) -> tuple[int, str, str]:
    """A command's exit code, standard output and standard error."""
    done = start(["-m", "ship_ds.cli", *arguments])
    return done.returncode, done.stdout, done.stderr


@pytest.mark.soak
def test_a_mixture_trains_and_repeats_its_last_step_after_a_resume(
    tmp_path: Path, rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    run = tmp_path / "run"
    command = ["train", "--config", "quickstart-smoke", f"run.folder={run}", DATA]
    command += ["training.steps=3", "checkpoint.every_steps=2", "evaluation.every_steps=0"]
    command += ["evaluation.ends_with_report=false"]
    code, _, errors = ship_ds(*command)
    assert code == 0, errors[-3000:]
    seen = json.loads((run / "splits.json").read_text())["seen"]
    assert {name.split("/")[0] for name in seen} == {"0", "1"} and len(seen) == 12 + 8
    assert list((run / "tokens").iterdir()), "the files of one part are tokenised once for all"
    whole = rows(run)
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    code, _, errors = ship_ds(*command)
    assert code == 0 and "after step 2" in errors
    assert [row["loss/total"] for row in rows(run)] == [row["loss/total"] for row in whole]


@pytest.mark.slow
def test_a_mixture_is_planned_with_its_longest_texts() -> None:
    importlib.import_module("tests.toys.source")
    lengths = source_of(load_config("quickstart-smoke", [DATA]).data).lengths()
    assert (
        lengths
        == FilesSource(FilesConfig(path=TASKS)).lengths()
        != RulesSource(RulesConfig()).lengths()
    )
    code, plan, errors = ship_ds("plan", "--config", "quickstart-smoke", DATA)
    assert code == 0 and "GB" in plan, errors


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("kind: files, path: /nowhere", "data.path: /nowhere: No such file or directory"),
        ("kind: files, path: x, paht: y", "data.parts.0.paht: unknown key"),
        ("kind: rules, seed: 1", "data.seed=1: the embedded model learnt the seen rules of seed 0"),
    ],
)
def test_what_is_wrong_in_a_part_is_one_line_at_once(part: str, line: str, tmp_path: Path) -> None:
    code, output, errors = ship_ds(
        "train",
        "--config",
        "quickstart-smoke",
        f"run.folder={tmp_path / 'run'}",
        f"data={{kind: toy_joined, parts: [{{{part}}}]}}",
    )
    assert (code, output) == (2, "") and errors.count("\n") == 1 and line in errors


def test_without_the_plugin_the_kind_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHIP_DS_PLUGINS")
    code, _, errors = ship_ds("train", "--config", "quickstart-smoke", DATA)
    assert code == 2 and "there is no 'toy_joined'; there are rules, files, mixture" in errors
