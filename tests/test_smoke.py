"""The quickstart's whole path in small: two real ranks under ZeRO-3, bundle, report, adapter."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ship_ds import cli, train
from ship_ds.api import Ship
from ship_ds.errors import UserError
from ship_ds.export.deduce import export_one
from ship_ds.export.requests import Request
from ship_ds.model.adapters.lora import LoraAdapter
from tests.conftest import REPOSITORY

CELLS = [
    *(f"deduction.{part}" for part in ("seen", "unseen", "unseen_paraphrase")),
    *(
        f"controls.{name}.{part}"
        for name in (
            "bare_base",
            "shuffled_instruction",
            "nearest_seen_rule",
            "instruction_in_prompt",
        )
        for part in ("seen", "unseen")
    ),
    "reconstruction.seen",
    "reconstruction.unseen",
]


def test_report_has_every_cell(two_rank_run: Path) -> None:
    report = json.loads((two_rank_run / "report.json").read_text())
    for name in CELLS:
        cell = report
        for key in name.split("."):
            cell = cell[key]
        low, high = cell["exact_match"]["ci95"]
        assert low <= cell["exact_match"]["value"] <= high, name
        assert cell["n_tasks"] > 0 and cell["n_examples"] >= cell["n_tasks"], name
    assert report["world_size"] == 2 and report["seed"] == 0 and report["train_seconds"] > 0


def test_report_counts_every_unseen_task_once_over_the_ranks(
    two_rank_run: Path, one_rank_run: Path
) -> None:
    one, two = (
        json.loads((run / "report.json").read_text()) for run in (one_rank_run, two_rank_run)
    )
    assert one["deduction"]["unseen"]["n_tasks"] == two["deduction"]["unseen"]["n_tasks"] == 6


def test_one_rank_and_two_take_the_same_losses(
    two_rank_run: Path, one_rank_run: Path, rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """Both in fp32; the tolerance is bf16's rounding, far above what another order of summation
    does."""
    one, two = rows(one_rank_run), rows(two_rank_run)
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(12))
    for left, right in zip(one, two, strict=True):
        for name in ("loss/total", "loss/task", "loss/reconstruction", "loss/kl"):
            assert left[name] == pytest.approx(right[name], rel=4e-3), (left["step"], name)


def test_every_scalar_of_a_log_is_on_its_page(
    two_rank_run: Path, rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    page = (REPOSITORY / "docs" / "logs.md").read_text()
    names = re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE)))
    known = [re.sub("[A-Z]+", r"\\w+", re.escape(name)) for name in names]
    logged = {name for row in rows(two_rank_run) for name in row}
    assert len(logged) > 15
    assert not [name for name in logged if not any(re.fullmatch(one, name) for one in known)]


def test_the_log_counts_the_useful_operations_of_all_ranks(
    two_rank_run: Path, one_rank_run: Path, rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    for run, num_ranks in ((one_rank_run, 1), (two_rank_run, 2)):
        for row in rows(run):
            parts = [value for name, value in row.items() if name.startswith("teraflops/")]
            assert len(parts) == 5 and min(parts) > 0
            rate = row["speed/teraflops_per_second"] * row["speed/step_seconds"]
            assert rate * num_ranks == pytest.approx(sum(parts))
            assert row["speed/tokens_per_second"] > 0 and row["memory/gigabytes"] > 0
            assert row["latent/active_units"] >= 0 and row["optimiser/gradient_norm"] > 0
    # The same step of the same run, on however many ranks.
    for one, two in zip(rows(one_rank_run), rows(two_rank_run), strict=True):
        for name in ("teraflops/encoder", "teraflops/task_llm", "teraflops/decoder"):
            assert one[name] == pytest.approx(two[name])


def test_an_evaluation_joins_the_row_of_the_step_before_it(
    two_rank_run: Path, rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    looked = [
        json.loads(line) for line in (two_rank_run / "evaluations.jsonl").read_text().splitlines()
    ]
    joined = {row["step"]: row for row in rows(two_rank_run) if "deduction/dev" in row}
    assert [row["step"] for row in looked] == [step + 1 for step in joined] == [4, 8, 12]
    assert all(joined[row["step"] - 1]["deduction/dev"] == row["deduction/dev"] for row in looked)
    assert all("loss/total" in row and "deduction/seen" in row for row in joined.values())


def test_tensorboard_has_the_scalars_of_every_step(two_rank_run: Path) -> None:
    board = EventAccumulator(str(two_rank_run / "tensorboard"))
    board.Reload()
    for name in (
        "loss/total",
        "loss/task",
        "loss/reconstruction",
        "loss/kl",
        "latent/active_units",
        "optimiser/lr",
    ):
        assert [event.step for event in board.Scalars(name)] == list(range(12))
    assert "deduction/dev" in board.Tags()["scalars"]
    assert (two_rank_run / "loss.png").stat().st_size > 1000


def _with_effect(ship: Ship) -> None:
    """Six steps leave B near zero; a random head gives the export something to prove."""
    torch.manual_seed(0)
    with torch.no_grad():
        for head in ship.model.hypernetwork.heads:
            head.to_b.weight.normal_(std=0.1)


def test_exported_adapter_is_loaded_by_peft_and_equals_the_live_one(
    two_rank_run: Path, tmp_path: Path
) -> None:
    ship = Ship.from_run(two_rank_run)
    _with_effect(ship)
    proof = export_one(
        ship, Request("adapter", "put 7 at the front"), tmp_path / "adapter", ["3 4 9"]
    )
    assert proof.from_live <= 1e-4 < 1e-2 < proof.from_base
    live = ship.model.adapt(ship.model.encode(["put 7 at the front"]))
    assert isinstance(live, LoraAdapter)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    path = "model.layers.3.mlp.down_proj"
    torch.testing.assert_close(
        saved[f"base_model.model.{path}.lora_B.weight"], live.factors[path][1][0]
    )


def test_adapter_that_does_nothing_is_refused_and_leaves_nothing(
    two_rank_run: Path, tmp_path: Path
) -> None:
    ship = Ship.from_run(two_rank_run)
    with torch.no_grad():
        for head in ship.model.hypernetwork.heads:
            head.to_b.weight.zero_()
            head.to_b.bias.zero_()
    with pytest.raises(UserError, match="nothing was written"):
        export_one(ship, Request("adapter", "put 7 at the front"), tmp_path / "adapter", ["3 4 9"])
    assert not list(tmp_path.iterdir())


def test_damaged_bundle_is_refused(two_rank_run: Path, tmp_path: Path) -> None:
    shutil.copytree(two_rank_run / "bundle", tmp_path / "bundle")
    with (tmp_path / "bundle" / "ship.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(UserError, match=r"ship\.safetensors is not the file"):
        Ship.from_run(tmp_path)


def test_missing_run_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert (
        cli.main(["deduce", "x", "--run", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
        == 2
    )
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["training.stepz=3"],
            "ship-ds: quickstart-smoke: training.stepz: unknown key; did you mean steps?",
        ),
        (
            ["training.tasks_per_step=6", "training.accumulation=4"],
            "ship-ds: quickstart-smoke: training.accumulation (4) must divide "
            "training.tasks_per_step "
            "(6): change one of them",
        ),
    ],
)
def test_bad_config_is_one_line_and_exit_code_2(
    overrides: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert (
        train.main(["--config", "quickstart-smoke", f"run.folder={tmp_path / 'run'}", *overrides])
        == 2
    )
    assert capsys.readouterr().err == line + "\n" and not list(tmp_path.iterdir())
