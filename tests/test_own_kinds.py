"""The package's own priors and objectives in whole runs: sharded, resumed with their schedules,
planned, opened, and on two ranks."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ship_ds.api import Ship
from ship_ds.config import load_config
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.planner.plan import Machines, make_plan
from tests.conftest import start, start_warm

SHARED = [
    "training.steps=4",
    "training.deepspeed=zero3_shard_all",  # no parameter is too small to be sharded
    "evaluation.every_steps=0",
    "evaluation.ends_with_report=false",
    "checkpoint.every_steps=2",
]
RUNS = {
    "mixture": [
        "model.prior={kind: mixture, num_components: 3}",
        "loss.kl={weight: 0.01, free_bits: 0.02, warmup_steps: 3}",
        "loss.task={weight: 0.5, mean_over: answers}",
        "loss.distillation={weight: 0.5, temperature: 2.0}",
        "loss.cycle={weight: 0.1, latents: prior, num_tokens: 4}",
        "model.task_llm.fading_steps=4",
        "loss.oracles={weight: 0.5, bank: BANK}",
    ],
    "flow": [
        "model.prior={kind: flow, num_layers: 3, width: 8}",
        "loss.kl={weight: 0.01, capacity: 1.0, capacity_steps: 8}",
        "loss.contrastive=0.1",
    ],
}
SCHEDULES = {
    "mixture": {
        "schedule/kl_weight": [0.01 / 3, 0.02 / 3, 0.01, 0.01],
        "schedule/instruction_in_prompt": [1.0, 0.75, 0.5, 0.25],
    },
    "flow": {"schedule/kl_capacity": [0.125, 0.25, 0.375, 0.5]},
}


Begin = Callable[..., subprocess.CompletedProcess[str]]


def train(
    folder: Path, bank: Path, settings: list[str], *launcher: str, begin: Begin = start
) -> str:
    """settings: BANK in them is the bank's folder."""
    placed = [setting.replace("BANK", str(bank)) for setting in settings]
    command = ["-m", "ship_ds.train", "--config", "quickstart-smoke", *SHARED, *placed]
    done = begin([*launcher, *command, f"run.folder={folder}"], timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def series(rows: list[dict[str, Any]]) -> list[list[float]]:
    """What has to repeat."""
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    kept = ("loss/", "latent/", "schedule/", "optimiser/")
    names = sorted(name for name in rows[0] if name.startswith(kept))
    return [[row[name] for name in names] for row in rows]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of oracles that took two steps each."""
    out = tmp_path_factory.mktemp("oracles") / "bank"
    command = ["oracles", "--config", "quickstart-smoke", "--out", str(out), "--steps", "2"]
    done = start_warm(["-m", "ship_ds.cli", *command])
    assert done.returncode == 0, done.stderr[-4000:]
    return out


# One in `make test`; the others train as long each, and go into `make soak`.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.soak] if place else [])
        for place, name in enumerate(RUNS)
    ],
)
def run(request: Any, bank: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """On one rank."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    train(folder, bank, RUNS[request.param], begin=start_warm)
    return request.param, folder


Rows = Callable[[Path], list[dict[str, Any]]]


@pytest.mark.slow
def test_they_train_and_log_what_is_in_force(run: tuple[str, Path], rows: Rows) -> None:
    """The total is the sum by the weights of each step."""
    name, folder = run
    logged, loss = rows(folder), load_config("quickstart-smoke", RUNS[name]).loss
    for column, values in SCHEDULES[name].items():
        assert [row[column] for row in logged] == pytest.approx(values)
    for row in logged:
        weights = loss.weights_at(row["step"], 4)
        total = sum(weight * row[f"loss/{one}"] for one, weight in weights.items())
        assert row["loss/total"] == pytest.approx(total)
        for one in weights:
            # In step 0 all prompts state the instruction, as the teacher's do, and no adapter does
            # anything yet.
            nothing_to_learn = one == "distillation" and row["step"] == 0
            assert row[f"loss/{one}"] > 0 or (nothing_to_learn and row[f"loss/{one}"] > -1e-6)
            assert not nothing_to_learn or row[f"loss/{one}"] < 1e-6
    prior = {n: p for n, p in Ship.from_run(folder).model.named_parameters() if "prior." in n}
    fresh = dict(
        build_ship(
            load_config("quickstart-smoke", RUNS[name]).model, LoadedWeights()
        ).named_parameters()
    )
    assert prior and all(parameter.shape == fresh[n].shape for n, parameter in prior.items())


@pytest.mark.soak
def test_they_resume_bit_for_bit(
    run: tuple[str, Path], bank: Path, rows: Rows, tmp_path: Path
) -> None:
    """In the middle of the schedule, with a bank that lies elsewhere by then."""
    name, folder = run
    moved = tmp_path / "moved"
    shutil.copytree(bank, moved)
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "step-00000004")
    shutil.rmtree(again / "bundle")
    assert "after step 2" in train(again, moved, RUNS[name])
    assert series(rows(again)) == series(rows(folder))
    weights = [one / "bundle" / "ship.safetensors" for one in (folder, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_they_are_planned(name: str) -> None:
    """Their weights, and what they keep for the backward pass."""
    machines = Machines(1, 1, 10**12)
    plain = make_plan(load_config("quickstart-smoke"), machines)
    config = load_config("quickstart-smoke", RUNS[name])
    plan = make_plan(config, machines)
    real = build_ship(config.model, LoadedWeights())
    assert plan.parameters["prior"] == sum(p.numel() for p in real.prior.parameters()) > 0
    assert sum(plan.memory.values()) > sum(plain.memory.values())


@pytest.mark.soak
def test_two_ranks_take_the_steps_of_one(
    run: tuple[str, Path], bank: Path, rows: Rows, tmp_path: Path
) -> None:
    """All but the contrast, whose others are those of the rank."""
    name, folder = run
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    train(tmp_path / "run", bank, RUNS[name], *launcher)
    one, two = rows(folder), rows(tmp_path / "run")
    if name == "flow":
        assert [row["loss/kl"] for row in two[:1]] == pytest.approx([one[0]["loss/kl"]], rel=1e-3)
        assert all(row["loss/contrastive"] > 0 for row in two)
        return
    for first, second in zip(series(one), series(two), strict=True):
        assert second == pytest.approx(first, rel=1e-3)
