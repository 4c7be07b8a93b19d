"""A T5 as Task LLM from end to end, as a user runs it: train, go on after a crash, answer, export,
merge. An mT5, which comes in by a plugin, likewise."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM

from ship_ds import cli
from ship_ds.api import Ship
from ship_ds.config import load_config
from ship_ds.model import nf4
from ship_ds.model.encoder_decoder import EncoderDecoder
from ship_ds.model.nf4_linear import use_nf4_linears
from ship_ds.planner.plan import Machines, make_plan
from tests.conftest import start, train_and_go_on
from tests.export.models import make_t5_base
from tests.starts import FIRST

SETTINGS = [
    *(f"model.{role}.base=embedded" for role in ("encoder", "decoder")),
    "model.task_llm.instruction=hard",
    "model.hypernetwork={kind: lora, rank: 2, targets: all-linear}",
    "evaluation.every_steps=4",
    "evaluation.ends_with_report=false",
]
TEXT, INPUT = "reverse the list", "3 9 5"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps; then, as after a crash, the last two again from the checkpoint before them."""
    root = tmp_path_factory.mktemp("two_stacks")
    folder, base = root / "run", make_t5_base(root / "base")
    train_and_go_on(folder, [f"model.task_llm.base={base}", *SETTINGS])
    return folder


@pytest.mark.slow
def test_it_trains_and_resumes_to_the_bit(
    run: Path, rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    resumes_to_the_bit(run, rows)


def resumes_to_the_bit(run: Path, rows: Callable[[Path], list[dict[str, Any]]]) -> None:
    first = [json.loads(line) for line in (run / FIRST).read_text().splitlines()]
    again = rows(run)
    names = [name for name in again[0] if name.startswith(("loss/", "optimiser/gradient"))]
    assert [row["step"] for row in again] == [0, 1, 2, 3] and "loss/task" in names
    for before, after in zip(first, again, strict=True):
        assert {name: before[name] for name in names} == {name: after[name] for name in names}
    assert len({row["loss/task"] for row in again}) == 4
    assert all(row["optimiser/gradient_norm"] > 0 for row in again)


@pytest.mark.slow
def test_its_adapters_answer_leave_and_merge(run: Path, tmp_path: Path) -> None:
    """By the verbs; then transformers and peft alone, peft on the base as training saw it."""
    ship = Ship.from_run(run)
    assert len(ship.answer(TEXT, [INPUT, "1 2"])) == 2
    made = ["deduce", TEXT, "--run", str(run), "--out", str(tmp_path / "adapter")]
    assert cli.main(made) == 0
    assert cli.main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    ids = torch.tensor([ship.model.question(INPUT, TEXT)])
    labels = torch.tensor([ship.model.prompts.target("5 9 3")])
    batch = ship.model.task_batch([INPUT], ["5 9 3"], [TEXT])
    with torch.no_grad():
        live = ship.model.task_llm.score(ship.deduce(TEXT).adapter, batch, 1)[0]
        bare = ship.model.task_llm.score(None, batch, 1)[0]
        merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
        stock = AutoModelForSeq2SeqLM.from_pretrained(
            ship.config.model.task_llm.base, quantization_config=nf4.config(torch.float32)
        )
        # bitsandbytes' own kernels for a few rows round to bf16 on such CPUs.
        use_nf4_linears(stock, torch.device("cpu"), "stock")
        loaded = PeftModel.from_pretrained(stock, str(tmp_path / "adapter"))
        for model in (merged, loaded):
            found = model.eval()(input_ids=ids, labels=labels).logits[0]
            # Unscaled attention over random weights makes much of a rounding.
            torch.testing.assert_close(found, live, rtol=0, atol=2e-2)
    assert float((live - bare).abs().max()) > 1


@pytest.mark.slow
def test_a_language_model_of_somebody_elses_trains_resumes_and_is_planned(
    tmp_path: Path, rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """Without its plugin the base is refused."""
    base = make_t5_base(tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    settings |= {"model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"]}
    (base / "config.json").write_text(json.dumps(settings))
    arguments = [f"model.task_llm.base={base}", *SETTINGS, "evaluation.every_steps=0"]
    train_and_go_on(tmp_path / "run", arguments, SHIP_DS_PLUGINS="tests.toys.encoder_decoder")
    resumes_to_the_bit(tmp_path / "run", rows)
    importlib.import_module("tests.toys.encoder_decoder")
    ship = Ship.from_run(tmp_path / "run")
    assert isinstance(ship.model.task_llm.language_model, EncoderDecoder)
    assert len(ship.answer(TEXT, [INPUT])) == 1
    config = load_config("quickstart-smoke", arguments)
    plan = make_plan(config, Machines(1, 1, 10**12))
    trained = ship.model.hypernetwork.parameters()
    assert plan.parameters["hypernetwork"] == sum(one.numel() for one in trained)
    command = ["-m", "ship_ds.train", "--config", "quickstart-smoke", *arguments]
    done = start([*command, f"run.folder={tmp_path / 'other'}"])
    assert done.returncode == 2 and "mt5" in done.stderr
