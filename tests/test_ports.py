"""A toy of each port from outside the package trains, resumes, plans and leaves as a folder.

One file each in tests/toys. The mistakes and the plan of the toy task source are in
tests/data/test_source.py, the toy language model is in tests/test_two_stacks.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ship_ds.api import Ship
from ship_ds.config import OraclesConfig, load_config, why_no_oracles
from ship_ds.errors import UserError
from ship_ds.evaluation.methods.untrained import makes_lora
from ship_ds.evaluation.tuning import Recipe, tune
from ship_ds.export.deduce import export_one
from ship_ds.export.requests import Request
from ship_ds.lora_folder import read_lora
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.oracles import OracleDistance
from ship_ds.model.step import Parts
from ship_ds.planner.plan import Machines, make_plan
from tests.conftest import train_and_go_on, train_each
from tests.starts import FIRST
from tests.toys import adapter, objective, prior, source

TOYS = [module.__name__ for module in (adapter, objective, prior, source)]
TASKS = "tests/fixtures/v0_1/tasks.jsonl"
DATA = (
    "data={kind: toy_joined, parts: [{kind: rules, num_seen: 12, train_examples: 12, "
    f"test_examples: 3}}, {{kind: files, path: {TASKS}, filters: {{min_examples_per_task: 2}}}}]}}"
)
SETTINGS = [
    "model.hypernetwork={kind: diagonal_core, rank: 3}",
    "model.prior={kind: toy_mixture, num_components: 2}",
    "loss.toy_distillation={weight: 0.5, temperature: 2.0}",
    "training.deepspeed=zero3_shard_all",  # no parameter is too small to be sharded
    "evaluation.every_steps=0",
    "evaluation.ends_with_report=false",
]
HINT = "{kind: combination, parts: [{kind: bottleneck}, {kind: prefix, latent: by_layer}]}"


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps; then, as after a crash, the last two again from the checkpoint before them."""
    folder = tmp_path_factory.mktemp("toys") / "run"
    train_and_go_on(folder, [*SETTINGS, DATA], SHIP_DS_PLUGINS=",".join(TOYS))
    return folder


@pytest.mark.slow
def test_toys_train_and_resume(run: Path) -> None:
    """The resumed run repeats the steps to the bit; each has a value of the objective's own."""
    rows = _rows(run)
    first = [json.loads(line) for line in (run / FIRST).read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    losses = [name for name in rows[0] if name.startswith(("loss/", "optimiser/gradient"))]
    assert [[row[name] for name in losses] for row in rows] == [
        [row[name] for name in losses] for row in first
    ]
    weights = load_config("quickstart-smoke", SETTINGS).loss.weights()
    for row in rows:
        total = sum(weight * row[f"loss/{name}"] for name, weight in weights.items())
        assert row["loss/total"] == pytest.approx(total)
    seen = json.loads((run / "splits.json").read_text())["seen"]
    assert {name.split("/")[0] for name in seen} == {"0", "1"} and len(seen) == 12 + 8
    assert list((run / "tokens").iterdir()), "the files of one part are tokenised once for all"
    # A teacher that reads the instruction says something else than a base that does not.
    assert min(row["loss/toy_distillation"] for row in rows) > 0.01


@pytest.mark.slow
def test_toys_leave_as_a_proved_folder(run: Path, tmp_path: Path) -> None:
    ship = Ship.from_run(run)
    trained = {name for name, p in ship.model.named_parameters() if p.requires_grad}
    assert {"hypernetwork.core.weight", "prior.table.weight"} <= trained
    request = Request("toy", "reverse the list")
    proof = export_one(ship, request, tmp_path / "adapter", ship.probes)
    assert proof.from_live <= 1e-4 < proof.from_base
    live = ship.model.adapt(ship.model.encode(["reverse the list"]))
    for path, (a_RI, b_OR) in read_lora(tmp_path / "adapter").factors.items():
        assert torch.equal(live.tensors()[f"{path}.A"][0], a_RI)
        assert torch.equal(live.tensors()[f"{path}.B"][0], b_OR)


@pytest.mark.slow
def test_a_lora_of_somebody_elses_is_tuned(run: Path) -> None:
    """From the generated one, as the plain LoRA that its section names."""
    ship = Ship.from_run(run)
    pairs = [(f"{i} {j}", f"{j} {i}") for i in range(3) for j in range(3)]
    recipe = Recipe(steps=2, lr=1e-3, held_out_share=0.2, seed=0)
    tuned = tune(ship, "reverse the list", pairs, recipe)
    generated = ship.model.adapt(ship.model.encode(["reverse the list"]))
    assert isinstance(tuned.adapter, LoraAdapter) and makes_lora(ship)
    for path, (a_TRI, b_TOR) in tuned.adapter.factors.items():
        assert a_TRI.shape == generated.tensors()[f"{path}.A"].shape
        assert 0 < (b_TOR - generated.tensors()[f"{path}.B"]).abs().max() <= 2.1e-3


def test_a_lora_of_somebody_elses_is_held_to_oracles() -> None:
    """By its sites and ranks; beside it a kind that is no LoRA."""
    parts = "{kind: combination, parts: [{kind: prefix}, {kind: diagonal_core, rank: 3}]}"
    for hypernetwork in ("{kind: diagonal_core, rank: 3}", parts):
        settings = [f"model.hypernetwork={hypernetwork}"]
        config = load_config("quickstart-smoke", settings).model
        assert why_no_oracles(config) is None
        model = build_ship(config, LoadedWeights())
        objective = OracleDistance(OraclesConfig(bank="unused"))
        objective.meet(
            Parts(model.encoder, model.prior, model.hypernetwork, model.task_llm, model.decoder)
        )
        names = {path.rpartition(".")[2] for path in objective.sites}
        assert names == {"q_proj", "v_proj"} and objective.layout.rank == 3
        shapes = {path: model.task_llm.sites()[path] for path in objective.sites}
        assert objective.sites == shapes


@pytest.mark.slow
def test_toys_are_planned() -> None:
    """Their weights and what they keep for the backward pass are counted as any other's."""
    machines = Machines(1, 1, 10**12)
    plain = make_plan(load_config("quickstart-smoke"), machines)
    plan = make_plan(load_config("quickstart-smoke", SETTINGS), machines)
    real = build_ship(load_config("quickstart-smoke", SETTINGS).model, LoadedWeights())
    parts = ("hypernetwork", "prior")
    assert sum(plan.parameters[part] for part in parts) == sum(
        p.numel() for part in parts for p in getattr(real, part).parameters()
    )
    assert plan.memory["logits at labels"] > plain.memory["logits at labels"]
    checkpointing = "model.task_llm.checkpointing=true"
    blocks = [
        make_plan(load_config("quickstart-smoke", [*settings, checkpointing]), machines).memory[
            "activations, task LLM"
        ]
        for settings in ([], SETTINGS[2:3])
    ]
    assert blocks[0] == blocks[1]  # the teacher's pass keeps nothing
    prefixed = make_plan(
        load_config(
            "quickstart-smoke", ["model.hypernetwork={kind: prefix, length: 3, width: 16}"]
        ),
        machines,
    )
    assert 0 < prefixed.memory["generated adapters"] < plain.memory["generated adapters"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "hypernetwork",
    [
        pytest.param("{kind: prefix, length: 3}", marks=pytest.mark.soak),
        pytest.param("{kind: layer_prompt, length: 3}", marks=pytest.mark.soak),
        HINT,
    ],
)
def test_kinds_that_are_no_lora_train(hypernetwork: str, tmp_path: Path) -> None:
    settings = [*SETTINGS, f"model.hypernetwork={hypernetwork}", "training.steps=3"]
    command = ["--config", "quickstart-smoke", f"run.folder={tmp_path / 'run'}", *settings]
    train_each(command, SHIP_DS_PLUGINS=",".join(TOYS))
    norms = [row["optimiser/gradient_norm"] for row in _rows(tmp_path / "run")]
    ship = Ship.from_run(tmp_path / "run")
    assert len(norms) == 3 and len(ship.answer("reverse the list", ["3 9 5"])) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hypernetwork={kind: diagonal_core, rnak: 3}", "model.hypernetwork.rnak: unknown"),
        ("loss.toy_distillation={temperature: 0}", "loss.toy_distillation.temperature: "),
        ("loss.distilation=1", "loss.distilation: unknown key; .*SHIP_DS_PLUGINS"),
        ("model.prior.kind=vamp", "model.prior.kind: there is no 'vamp'; .*SHIP_DS_PLUGINS"),
        ("model.prior.kind=[1]", r"model.prior.kind: there is no \[1\]; there are"),
        ("data.kind={}", "data.kind: there is no {}; there are"),
    ],
)
def test_a_mistake_in_a_toys_section_is_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config("quickstart-smoke", [override])
    assert "\n" not in str(error.value)


def test_what_a_kind_does_not_offer_is_one_line(tmp_path: Path) -> None:
    """A bottleneck has no file format and no distance, and a folder cannot become one."""
    config = load_config("quickstart-smoke", ["model.hypernetwork={kind: bottleneck}"])
    ship = build_ship(config.model, LoadedWeights())
    made = ship.adapt(torch.zeros(1, config.model.latent_size))
    for refused, message in (
        (lambda: ship.hypernetwork.exports(made), "deduce: .* no file format"),
        (lambda: ship.read_adapter(tmp_path), f"{tmp_path}: .* cannot be read back"),
        (lambda: made.distance(made), "explain: .* cannot be compared by their weights"),
    ):
        with pytest.raises(UserError, match=message) as error:
            refused()
        assert "\n" not in str(error.value)
