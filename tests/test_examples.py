"""The scripts of examples/ run as their first lines say."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ship_ds import api
from ship_ds.inference.explaining import HALF, Threshold
from ship_ds.inference.lora_reader import LoraReader
from tests.conftest import REPOSITORY, start

V0_1 = REPOSITORY / "tests" / "fixtures" / "v0_1"


@pytest.mark.slow
def test_an_instruction_becomes_an_answer() -> None:
    """By `peft` as the live model: the answers that are recorded for this run."""
    recorded = json.loads((V0_1 / "recorded.json").read_text())
    instruction, inputs = recorded["instructions"][1], recorded["inputs"]
    run = "tests/fixtures/v0_1/run"
    done = start(["examples/instruction_to_answer.py", run, instruction, *inputs])
    assert done.returncode == 0, done.stderr[-3000:]
    pairs = zip(inputs, recorded["bundle"]["answers"][1], strict=True)
    lines = done.stdout.splitlines()[-len(inputs) :]
    for line, (text, answer) in zip(lines, pairs, strict=True):
        # An answer that did not end in time is none for ship_ds; the script prints what there is.
        assert line.startswith(f"{text} -> ") and (
            answer is None
            or line == f"{text} -> {answer}".rstrip()
            or line == f"{text} -> {answer}"
        )


NOTEBOOK = REPOSITORY / "examples" / "ten_minutes.ipynb"


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
    return found


def test_the_notebook_keeps_no_outputs_and_links_to_what_is_there() -> None:
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    for cell in cells():
        for part in "".join(cell["source"]).split("](")[1:]:
            target = part.partition(")")[0].partition("#")[0]
            assert (NOTEBOOK.parent / target).exists(), target


@pytest.mark.slow
def test_the_notebook_runs(
    one_rank_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cell by cell in one namespace, as a kernel would, on a run of the smoke recipe. In place of
    what explaining trains and measures first: a reader that has learnt nothing, and one half."""

    def untrained(model: Any, *_: object) -> LoraReader:
        return LoraReader(model.task_llm.sites(), model.config.latent_size)

    monkeypatch.setattr(api, "train_reader", untrained)
    monkeypatch.setattr(api, "calibrate_explaining", lambda *_: Threshold(HALF, 0.0, 0.0, 0))
    # A copy: what is derived of a run is kept beside its bundle, and is the others' too.
    shutil.copytree(one_rank_run / "bundle", tmp_path / "run" / "bundle")
    sources = ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]
    assert sources[0] == 'RUN = "runs/quickstart"'
    space: dict[str, Any] = {"RUN": str(tmp_path / "run")}
    for number, source in enumerate(sources[1:], start=2):
        exec(compile(source, f"cell {number}", "exec"), space)
    assert space["proof"].from_live < 1e-3 < space["proof"].from_base
    for mine, theirs in zip(space["with_adapter"], space["by_peft"], strict=True):
        assert mine is None or mine == theirs  # one that did not end in time is none
    assert space["explanation"].candidates and space["induction"].candidates
    assert not space["folder"].exists()
