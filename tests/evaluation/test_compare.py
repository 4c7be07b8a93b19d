"""`ship-ds compare` around trainings: what is started, what a failure costs, and how it ends. Here
programs of one line stand for the trainings, but in the last test."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ship_ds import cli
from ship_ds.errors import UserError
from ship_ds.evaluation import compare, comparison
from ship_ds.evaluation.comparison import ComparedRun
from ship_ds.evaluation.config import HarnessConfig
from ship_ds.evaluation.variants import VariantRun, plan, read_variants
from ship_ds.files import Manifest, write_json
from tests.conftest import environment


@pytest.fixture
def trials(tmp_path: Path) -> list[VariantRun]:
    (tmp_path / "kinds.yaml").write_text("config: quickstart\nvariants: {a: , b: , c: }\n")
    return plan(read_variants([str(tmp_path / "kinds.yaml")]), [], tmp_path / "out", 1, None)


Replace = Callable[[str], None]


@pytest.fixture
def train_by(monkeypatch: pytest.MonkeyPatch) -> Replace:
    """train_by(program): Python that is run for a training, with its label as the argument."""

    def replace(program: str) -> None:
        monkeypatch.setattr(
            VariantRun,
            "train_command",
            lambda trial, num_ranks: [sys.executable, "-c", program, trial.label],
        )

    return replace


def test_a_variant_that_fails_is_named_and_the_others_are_trained(
    trials: list[VariantRun], train_by: Replace, tmp_path: Path
) -> None:
    train_by(
        "import pathlib, sys; print('training'); "
        f"pathlib.Path({str(tmp_path)!r}, sys.argv[1]).touch(); sys.exit(3 * (sys.argv[1] == 'b'))"
    )
    said: list[str] = []
    with compare._alone(tmp_path / "out") as lock:
        failures = compare.train_all(trials, 1, lock, said.append)
    assert list(failures) == ["b, seed 0"]
    assert failures["b, seed 0"].startswith("its training ended with code 3: ")
    assert all((tmp_path / label).exists() for label in "abc")
    assert said[0] == f"1 of 3: a, seed 0, in {tmp_path / 'out' / 'a' / 'seed-0'}"


def test_what_is_trained_is_not_trained_again(
    trials: list[VariantRun], train_by: Replace, tmp_path: Path
) -> None:
    bundle = trials[1].folder / "bundle"
    bundle.mkdir(parents=True)
    for name in ("ship.safetensors", "config.json", "prompt_format.json"):
        (bundle / name).write_text("{}")
    Manifest.of(bundle).write(bundle)
    train_by(f"import pathlib, sys; pathlib.Path({str(tmp_path)!r}, sys.argv[1]).touch()")
    said: list[str] = []
    with compare._alone(tmp_path / "out") as lock:
        assert compare.train_all(trials, 1, lock, said.append) == {}
        assert said[0] == "1 of 3 are trained already"
        assert [label for label in "abc" if (tmp_path / label).exists()] == ["a", "c"]
        (bundle / "ship.safetensors").write_text("{")
        with pytest.raises(UserError, match=r"ship\.safetensors has 1 bytes instead of 2"):
            compare.train_all(trials, 1, lock, said.append)


def test_term_reaches_the_training_and_no_other_is_started(
    trials: list[VariantRun], train_by: Replace, tmp_path: Path
) -> None:
    """The training saves and ends with 75, as ship_ds.train does."""
    train_by(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(75))\n"
        f"pathlib.Path({str(tmp_path)!r}, sys.argv[1]).touch()\n"
        "time.sleep(60)"
    )

    def end_when_started() -> None:
        while not (tmp_path / "a").exists():
            done.wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    done = threading.Event()
    threading.Thread(target=end_when_started, daemon=True).start()
    with compare._alone(tmp_path / "out") as lock, pytest.raises(compare.Stopped):
        compare.train_all(trials, 1, lock, lambda line: None)
    assert not (tmp_path / "b").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_training_that_outlives_its_comparison_keeps_the_next_one_out(
    trials: list[VariantRun], train_by: Replace, tmp_path: Path
) -> None:
    """By a descriptor that it has inherited."""
    train_by(
        "import os, sys; files = [os.path.realpath(f'/proc/self/fd/{n}') for n in "
        "os.listdir('/proc/self/fd')]; sys.exit(not any(f.endswith('/.lock') for f in files))"
    )
    with compare._alone(tmp_path / "out") as lock:
        assert compare.train_all(trials, 1, lock, lambda line: None) == {}
    with compare._alone(tmp_path) as lock:
        kept = os.dup(lock)
    with pytest.raises(UserError, match="still at work here"), compare._alone(tmp_path):
        pass
    os.close(kept)
    with compare._alone(tmp_path):
        pass


def test_the_table_is_of_those_that_were_trained_and_measured(
    trials: list[VariantRun],
    train_by: Replace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """b comes to no bundle, and c cannot be measured; what is left is a copy of a run of 0.1.0."""
    train_by(
        "import shutil, sys; sys.argv[1] == 'b' or shutil.copytree('tests/fixtures/v0_1/run', "
        f"{str(tmp_path / 'out')!r} + '/' + sys.argv[1] + '/seed-0')"
    )
    measure = comparison.measure_run

    def measured(label: str, *arguments: Any) -> ComparedRun:
        if label == "c":
            raise RuntimeError("out of luck")
        return measure(label, *arguments)

    monkeypatch.setattr(comparison, "measure_run", measured)
    settings = HarnessConfig(
        methods=("ship", "prompting"), parts=("seen",), directions=("deduction",), num_tasks=1
    )
    out = tmp_path / "out"
    said: list[str] = []
    assert compare.compare(trials, settings, out, 1, ["compare"], said.append, "cpu") == 1
    report = json.loads((out / "compare.json").read_text())
    assert [row["label"] for row in report["rows"]] == ["a", "instruction in the prompt"]
    assert list(report["failures"]) == ["b, seed 0", "c, seed 0"]
    assert "no bundle here" in said[-2] and "out of luck" in said[-1]
    assert "RuntimeError" in (out / "c" / "seed-0" / "measuring_failure.txt").read_text()
    assert str(out / "compare.md") in capsys.readouterr().out


@pytest.mark.soak
def test_two_variants_become_a_table_and_a_second_call_trains_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "kinds.yaml").write_text(
        "config: quickstart-smoke\n"
        "variants:\n"
        "  lora:\n"
        "  soft-prompt: {model.hypernetwork: {kind: soft_prompt, num_virtual_tokens: 2}}\n"
    )
    out = tmp_path / "out"
    command = ["compare", str(tmp_path / "kinds.yaml"), "--out", str(out), "--minutes", "5"]
    command += ["--num-tasks", "2", "--directions", "deduction", "--parts", "seen,unseen"]
    command += ["training.steps=2", "checkpoint.every_steps=0", "evaluation.every_steps=0"]
    assert cli.main(command) == 0
    printed = capfd.readouterr()
    assert "1 of 2: lora, seed 0" in printed.err and "soft-prompt" in printed.out
    report = json.loads((out / "compare.json").read_text())
    assert [row["label"] for row in report["rows"]] == [
        *("lora", "soft-prompt", "instruction in the prompt")
    ]
    assert [row.get("steps") for row in report["rows"]] == [2, 2, None]
    assert len(report["notes"]) == 2, "both were ended by their steps, long before their time"
    trained = [path.stat().st_mtime_ns for path in sorted(out.glob("*/*/bundle/ship.safetensors"))]
    assert len(trained) == 2
    assert cli.main(command) == 0
    again = capfd.readouterr()
    assert "2 of 2 are trained already" in again.err and " tasks, " not in again.err
    assert again.out == printed.out
    assert trained == [
        path.stat().st_mtime_ns for path in sorted(out.glob("*/*/bundle/ship.safetensors"))
    ]
    write_json(
        out / "lora" / "seed-0" / "config.json", {"run": {"folder": "x"}, "training": {"steps": 1}}
    )
    assert cli.main(command) == 2
    assert "set it back, or name another --out" in capfd.readouterr().err
