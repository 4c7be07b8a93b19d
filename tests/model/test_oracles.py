"""The distance to oracles: by whole updates, by hand, and through the whole model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ship_ds.config import LossConfig, ModelConfig, OraclesConfig, oracle_settings, parse_config
from ship_ds.data.sampler import TaskDraw
from ship_ds.data.task import Example, SplitTask, Task
from ship_ds.errors import UserError
from ship_ds.files import Manifest, write_json
from ship_ds.model.adapters.combination import CombinedAdapter
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.model.adapters.soft_prompt import SoftPrompt
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.objectives import Training
from ship_ds.model.oracles import (
    DTYPE,
    ROWS,
    SITE_SPREADS,
    OracleDistance,
    OracleRows,
    RowLayout,
    made_for,
    squared_distances,
)
from ship_ds.model.ship import ShipModel
from ship_ds.oracle_bank import (
    BANK,
    SPREADS,
    OracleBank,
    examples_digest,
)
from tests.model.models import random_lora, wake_up

SITES = {"q": (5, 7), "down": (4, 3), "k": (5, 7)}
TASKS = [
    SplitTask(Task(name, f"do {name}", ()), (Example(f"{place} 9", "9"),), ())
    for place, name in enumerate("abc")
]
BASE = {"the base": "b" * 64}


def updates(lora: LoraAdapter) -> dict[str, Tensor]:
    """What is added to each weight, whole: (T, O, I)."""
    return {path: lora.scaling * b @ a for path, (a, b) in lora.factors.items()}


def test_a_row_gives_back_the_factors_whatever_the_order_of_the_sites() -> None:
    lora = random_lora(SITES, 4)
    layout, other = RowLayout.of(SITES, 3), RowLayout.of(dict(reversed(SITES.items())), 3)
    rows_TX = layout.row(lora)
    assert rows_TX.shape == (4, layout.num_numbers) == (4, 3 * (12 + 7 + 12))
    assert torch.equal(rows_TX, other.row(lora))
    seen = []
    for paths, a_of_sites, b_of_sites in layout.factors(rows_TX):
        for path, a_TRI, b_TOR in zip(paths, a_of_sites, b_of_sites, strict=True):
            assert torch.equal(a_TRI, lora.factors[path][0])
            assert torch.equal(b_TOR, lora.factors[path][1])
            seen.append(path)
    assert seen == layout.paths == ["down", "k", "q"]


def test_a_squared_distance_is_that_of_whole_updates() -> None:
    one, other = random_lora({"q": (5, 7)}, 4), random_lora({"q": (5, 7)}, 4, seed=9)
    pairs = [tuple(factor[None] for factor in lora.factors["q"]) for lora in (one, other)]
    found = squared_distances(pairs[0], pairs[1], (2.0, 0.5))  # type: ignore[arg-type]
    difference = updates(one)["q"] - 0.25 * updates(other)["q"]
    torch.testing.assert_close(found[0], difference.square().sum((1, 2)))


def summed(made: Any, rows_TX: Tensor, spreads: list[float], has_one: list[float]) -> Tensor:
    """Of an objective that knows its sites."""
    objective = OracleDistance(OraclesConfig(bank="unused"))
    objective.layout = RowLayout.of(SITES, 3)
    rows = OracleRows(rows_TX, torch.tensor(has_one), torch.tensor(spreads), 0)
    outputs: Any = SimpleNamespace(adapter=made, batch=SimpleNamespace(extras={"oracles": rows}))
    return objective.sum(outputs)


def test_the_distance_is_in_units_of_each_sites_spread_over_tasks_that_have_an_oracle() -> None:
    """Of three tasks the second has none, and whatever stands in its row counts for nothing."""
    made, oracles = random_lora(SITES, 3), random_lora(SITES, 3, seed=5)
    spreads = {"down": 0.5, "k": 2.0, "q": 8.0}
    rows_TX = RowLayout.of(SITES, 3).row(oracles).detach()
    found = summed(made, rows_TX, list(spreads.values()), [1.0, 0.0, 1.0])
    aims, expected = updates(oracles), 0.0
    for path, update in updates(made).items():
        for task in (0, 2):
            off = (update[task] - aims[path][task]).detach()
            expected += float(off.square().sum()) / spreads[path] / 3
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    found.backward()
    for pair in made.factors.values():
        for factor in pair:
            assert factor.grad is not None and not factor.grad[1].any()
            assert factor.grad[0].any() and factor.grad[2].any()


def test_other_factors_of_one_update_are_no_distance() -> None:
    """A to G A and B to B / G."""
    oracles = random_lora(SITES, 2)
    g = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -4.0]])
    turned = LoraAdapter(
        {path: (g @ a, b @ g.inverse()) for path, (a, b) in oracles.factors.items()},
        oracles.scaling,
    )
    rows_TX = RowLayout.of(SITES, 3).row(oracles).detach()
    assert float(summed(turned, rows_TX, [1.0] * 3, [1.0, 1.0]).detach()) == pytest.approx(
        0, abs=1e-4
    )


def test_loras_of_16_bits_are_compared_in_32_where_no_data_can_be_read() -> None:
    """On the meta device whatever would make the host wait raises."""
    with torch.device("meta"):
        factors = {
            path: tuple(
                torch.empty(2, *shape, dtype=torch.bfloat16, requires_grad=True)
                for shape in ((3, num_in), (num_out, 3))
            )
            for path, (num_in, num_out) in SITES.items()
        }
        objective = OracleDistance(OraclesConfig(bank="unused"))
        objective.sites, objective.layout = SITES, RowLayout.of(SITES, 3)
        batch: Any = SimpleNamespace(num_tasks=2, noise_TZ=torch.empty(2, 4))
        extras = {"oracles": objective.prepare_shapes(batch)}
        outputs: Any = SimpleNamespace(
            adapter=LoraAdapter(factors, 2.0),  # type: ignore[arg-type]
            batch=SimpleNamespace(extras=extras),
        )
        loss = objective.sum(outputs)
        loss.backward()
    assert loss.is_meta and loss.dtype == torch.float32
    assert all(factor.grad.dtype == torch.bfloat16 for pair in factors.values() for factor in pair)  # type: ignore[union-attr]


def test_the_lora_among_the_parts_of_a_combination_is_compared() -> None:
    made = random_lora(SITES, 1)
    rows_TX = RowLayout.of(SITES, 3).row(random_lora(SITES, 1, seed=5)).detach()
    alone = summed(made, rows_TX, [1.0] * 3, [1.0])
    beside = SoftPrompt(torch.zeros(1, 2, 4))
    combined = CombinedAdapter((beside, made))
    assert torch.equal(summed(combined, rows_TX, [1.0] * 3, [1.0]), alone)


def test_a_combination_gives_its_one_lora_and_takes_another_in_its_place() -> None:
    made, other, beside = (
        random_lora(SITES, 1),
        random_lora(SITES, 1, seed=5),
        SoftPrompt(torch.ones(1)),
    )
    within = CombinedAdapter((beside, made)).lora_within()
    assert within is not None and within.lora is made
    assert within.around(other) == CombinedAdapter((beside, other))
    assert beside.lora_within() is None
    assert CombinedAdapter((made, other)).lora_within() is None


CHANGES = {
    "latent_size": 16,
    "task_llm": {"quantisation": "none"},
    "hypernetwork": {"rank": 2, "width": 8, "targets": ["q_proj", "down_proj"]},
}


def model_config(**hypernetwork: Any) -> ModelConfig:
    changed = {**CHANGES, "hypernetwork": {**CHANGES["hypernetwork"], **hypernetwork}}  # type: ignore[dict-item]
    return ModelConfig.model_validate(changed)


def write_bank(folder: Path, ship: ShipModel, tasks: list[SplitTask]) -> Tensor:
    """A bank of random oracles of these tasks in groups of two, and its rows."""
    sites = ship.task_llm.sites()
    layout, prompts = RowLayout.of(sites, 2), ship.prompts.describe()
    rows_TX = torch.randn(len(tasks), layout.num_numbers).to(DTYPE)
    bank = OracleBank(
        made_for={**made_for(BASE, prompts), **oracle_settings(ship.config)},
        trained={},
        sites=dict(sites),
        tasks={task.id: examples_digest(task) for task in tasks},
        group_size=2,
    )
    folder.mkdir()
    for start, (file, _) in zip(range(0, len(tasks), 2), bank.groups(), strict=True):
        save_file({ROWS: rows_TX[start : start + 2].clone()}, folder / file)
    save_file({SITE_SPREADS: torch.full((len(sites),), 2.0)}, folder / SPREADS)
    write_json(folder / BANK, bank.model_dump(mode="json"))
    Manifest.of(folder).write(folder)
    return rows_TX


@pytest.fixture
def ship(tmp_path: Path) -> ShipModel:
    torch.manual_seed(0)
    loss = LossConfig.model_validate({"oracles": {"bank": str(tmp_path / "bank")}})
    ship = build_ship(model_config(), LoadedWeights(), loss)
    wake_up(ship)
    return ship


def begin(ship: ShipModel, tasks: list[SplitTask], **changes: Any) -> tuple[str, list[str]]:
    said: list[str] = []
    given = {"base": BASE, "prompts": ship.prompts.describe(), **changes}
    return ship.objectives["oracles"].begin(Training(tasks, log=said.append, **given)), said


def drawn(task: SplitTask) -> TaskDraw:
    return TaskDraw(task.id, task.task.instruction, task.train, (), True)


def test_a_step_reads_the_rows_of_its_tasks_and_leaves_out_who_has_none(
    ship: ShipModel, tmp_path: Path
) -> None:
    """The second's examples are others than its oracle was trained on, the third is not there."""
    other = SplitTask(TASKS[1].task, (Example("1", "2"),), ())
    rows_TX = write_bank(tmp_path / "bank", ship, [TASKS[2], other, TASKS[0]])
    stranger = SplitTask(Task("d", "do d", ()), TASKS[0].train, ())
    _, said = begin(ship, [TASKS[0], TASKS[1], TASKS[2], stranger])
    assert said == [
        "loss.oracles: 2 of 4 seen tasks have an oracle "
        "(of 1 one that was trained on other examples)"
    ]
    batch = ship.collate([drawn(one) for one in (TASKS[0], TASKS[1], TASKS[2], stranger)], 0, 0)
    rows = batch.extras["oracles"]
    assert torch.equal(rows.rows_TX[[0, 2]], rows_TX[[2, 0]]) and not rows.rows_TX[[1, 3]].any()
    assert rows.has_one_T.tolist() == [1, 0, 1, 0]
    assert ship.objectives["oracles"].count(batch) == 2
    shapes = ship.objectives["oracles"].prepare_shapes(batch)
    assert shapes.rows_TX.shape == rows.rows_TX.shape and shapes.count == 4
    assert [one.shape for one in shapes._tensors()] == [one.shape for one in rows._tensors()]
    loss = ship(batch).objectives["oracles"]
    assert float(loss.detach()) > 0
    loss.backward()
    moved = {name.split(".")[0] for name, p in ship.named_parameters() if p.grad is not None}
    assert moved == {"encoder", "hypernetwork"}


def test_a_step_of_tasks_without_oracles_costs_nothing(ship: ShipModel, tmp_path: Path) -> None:
    write_bank(tmp_path / "bank", ship, TASKS[:1])
    begin(ship, TASKS)
    batch = ship.collate([drawn(TASKS[1])], 0, 0)
    loss = ship(batch).objectives["oracles"]
    loss.backward()
    assert float(loss.detach()) == 0 and ship.objectives["oracles"].count(batch) == 0
    assert not any(p.grad is not None and p.grad.any() for p in ship.parameters())


def test_the_fingerprint_is_that_of_all_files(ship: ShipModel, tmp_path: Path) -> None:
    write_bank(tmp_path / "bank", ship, TASKS)
    first, _ = begin(ship, TASKS)
    (tmp_path / "bank").rename(tmp_path / "old")
    write_bank(tmp_path / "bank", ship, TASKS)
    assert begin(ship, TASKS)[0] != first


def test_a_bank_that_does_not_fit_is_one_line(ship: ShipModel, tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    write_bank(folder, ship, TASKS)

    def says(message: str, tasks: list[SplitTask] = TASKS, **changes: Any) -> None:
        with pytest.raises(UserError, match=message) as error:
            begin(ship, tasks, **changes)
        assert "\n" not in str(error.value) and str(error.value).startswith("loss.oracles.bank: ")

    says("made for the base=bbb.*, and this run has ccc", base={"the base": "c" * 64})
    says("made for the prompt format=.*this run has 0", prompts={"hash": "0"})
    stranger = SplitTask(Task("d", "do d", ()), TASKS[0].train, ())
    says("no seen task of this run has an oracle there: name", [stranger])
    changed = SplitTask(TASKS[0].task, (Example("1", "2"),), ())
    says(r"has an oracle there \(of 1 one that was trained", [changed])
    ship.objectives["oracles"].sites = {"q": (1, 1)}  # type: ignore[attr-defined]
    says("its oracles change 8 linears, and this run's 1 others")
    data = bytearray((folder / "group-0001.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "group-0001.safetensors").write_bytes(data)
    says("group-0001.safetensors is not the file that was written; make the bank anew")


@pytest.mark.parametrize(
    ("hypernetwork", "message"),
    [
        ({"rank": 4}, "made for model.hypernetwork.rank=2, and this run has 4: name"),
        ({"alpha": 4}, "made for model.hypernetwork.alpha=16.0, and this run has 4.0"),
        (
            {"targets": ["q_proj"]},
            r"model.hypernetwork.targets=\['down_proj', 'q_proj'\], and this run has \['q_proj'\]",
        ),
    ],
)
def test_a_bank_of_other_loras_is_one_line_before_anything_is_loaded(
    ship: ShipModel, tmp_path: Path, hypernetwork: dict[str, Any], message: str
) -> None:
    write_bank(tmp_path / "bank", ship, TASKS)
    OraclesConfig(bank=str(tmp_path / "bank")).check(model_config())
    with pytest.raises(UserError, match=message):
        OraclesConfig(bank=str(tmp_path / "bank")).check(model_config(**hypernetwork))


def test_a_bank_that_is_none_is_one_line(ship: ShipModel, tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    with pytest.raises(UserError, match="no bank of oracles here"):
        OraclesConfig(bank=str(folder)).check(model_config())
    write_bank(folder, ship, TASKS)
    (folder / "group-0001.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="group-0001.safetensors has 0 bytes instead of"):
        OraclesConfig(bank=str(folder)).check(model_config())
    (folder / BANK).write_text('{"version": 2}')
    with pytest.raises(UserError, match="bank.json: version: "):
        OraclesConfig(bank=str(folder)).check(model_config())


MINIMAL: dict[str, Any] = {"run": {"folder": "unused"}, "training": {"steps": 1}}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hypernetwork": {"kind": "prefix"}}, "loss.oracles: oracles are LoRAs, and model.hyper"),
        (
            {"hypernetwork": {"kind": "combination", "parts": [{"kind": "lora"}] * 2}},
            "generates none, or several",
        ),
        ({"task_llm": {"instruction": "hard"}}, "instruction=hard states it: set it to none"),
    ],
)
def test_a_model_that_no_oracle_is_of_is_one_line(model: dict[str, Any], message: str) -> None:
    loss = {"oracles": {"bank": "there"}}
    with pytest.raises(UserError, match=message):
        parse_config({**MINIMAL, "model": model, "loss": loss}, "config")
    parts = [{"kind": "lora"}, {"kind": "prefix"}]
    good = {"hypernetwork": {"kind": "combination", "parts": parts}}
    assert parse_config({**MINIMAL, "model": good, "loss": loss}, "c").loss.weights()["oracles"]
