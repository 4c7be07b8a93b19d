"""A task source from outside the package (tests/toys/source.py) checks and plans, and nothing
inside knows of it. It trains and resumes with the toys of the other ports: tests/test_ports.py."""

import importlib
from pathlib import Path

import pytest

from ship_ds.config import load_config
from ship_ds.data.rules import RulesConfig, RulesSource
from ship_ds.data.source import source_of
from ship_ds.data.task_files import FilesConfig, FilesSource
from tests.conftest import start
from tests.test_ports import DATA, TASKS


@pytest.fixture(autouse=True)
def with_the_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIP_DS_PLUGINS", "tests.toys.source")


def ship_ds(*arguments: str) -> tuple[int, str, str]:
    """A command's exit code, standard output and standard error."""
    done = start(["-m", "ship_ds.cli", *arguments])
    return done.returncode, done.stdout, done.stderr


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


@pytest.mark.slow
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
