"""`ship-ds oracles` on six rules: what the bank holds, and that work that was cut off goes on."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ship_ds import cli
from ship_ds.config import load_config
from ship_ds.console import no_log
from ship_ds.data.rules import build_world
from ship_ds.errors import UserError
from ship_ds.evaluation import oracle_training
from ship_ds.evaluation.baselines import oracles
from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.evaluation.baselines.oracles import nats_a_token
from ship_ds.evaluation.oracle_training import (
    BankRecipe,
    Learnt,
    lora_of_rows,
    make_bank,
    spread_of,
)
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.model.oracles import ROWS, SITE_SPREADS, RowLayout, mapped
from ship_ds.oracle_bank import SPREADS, check_files, read_bank

pytestmark = pytest.mark.slow

RULES = ["data.num_seen=6", "data.train_examples=4", "data.test_examples=2"]
LORA = "model.hypernetwork={kind: lora, rank: 2, targets: [q_proj, down_proj]}"
CONFIG = load_config("quickstart-smoke", [*RULES, LORA])
RECIPE = BankRecipe(steps=6, lr=3e-2, examples_per_step=2, seed=0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of four and of two tasks."""
    monkeypatch.setattr(oracles, "_MOST_IN_GROUP", 4)
    yield


def make(out: Path, recipe: BankRecipe = RECIPE, config: Any = CONFIG) -> list[Learnt]:
    return make_bank(config, out, recipe, CPU, torch.float32, no_log)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Learnt]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracles, "_MOST_IN_GROUP", 4)
        out = tmp_path_factory.mktemp("made") / "bank"
        return out, make(out)


def rows_of(folder: Path) -> Tensor:
    return torch.cat([mapped(folder / file, ROWS) for file, _ in read_bank(folder).groups()])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_seen_task_has_an_oracle_of_its_own_training_examples(
    bank: tuple[Path, list[Learnt]],
) -> None:
    """What is said of each is what its row does, by the likelihoods that baselines are scored by:
    better on its own examples than the bare base, and than another task's."""
    folder, learnt = bank
    described, splits = read_bank(folder), build_world(CONFIG.data)  # type: ignore[arg-type]
    check_files(folder)
    assert list(described.tasks) == [task.id for task in splits.seen]
    assert [len(ids) for _, ids in described.groups()] == [4, 2]
    assert [one.task_id for one in learnt] == list(described.tasks)
    base = FrozenBase.of_config(CONFIG, CONFIG.model.hypernetwork, CPU, torch.float32)  # type: ignore[arg-type]
    layout = RowLayout.of(base.sites, 2)
    lora = lora_of_rows(layout, rows_of(folder), 16 / 2)
    nothing = LoraAdapter({p: (a, b * 0) for p, (a, b) in lora.factors.items()}, 16 / 2)
    for row, (task, said) in enumerate(zip(splits.seen, learnt, strict=True)):
        own, other = (lora.rows(torch.tensor([one])) for one in (row, (row + 1) % 6))
        bare = nats_a_token(base, nothing.rows(torch.tensor([row])), task.train)
        assert said.before == pytest.approx(bare, rel=1e-5)
        assert said.after == pytest.approx(nats_a_token(base, own, task.train), rel=1e-5)
        assert said.after < 0.9 * said.before
        assert said.after < nats_a_token(base, other, task.train)


def test_the_mean_oracle_costs_one(bank: tuple[Path, list[Learnt]]) -> None:
    """At every site, with the updates formed whole."""
    folder, _ = bank
    described = read_bank(folder)
    layout, spreads = RowLayout.of(described.sites, 2), mapped(folder / SPREADS, SITE_SPREADS)
    lora = lora_of_rows(layout, rows_of(folder), 16 / 2)
    for path, spread in zip(layout.paths, spreads.tolist(), strict=True):
        a_TRI, b_TOR = lora.factors[path]
        updates_TOI = 8.0 * b_TOR @ a_TRI
        off = (updates_TOI - updates_TOI.mean(0)).square().sum((1, 2))
        assert float(off.mean()) == pytest.approx(spread, rel=1e-3)
    assert spread_of(a_TRI[:1], b_TOR[:1]) == pytest.approx(0, abs=1e-6)


def test_work_that_was_cut_off_ends_in_the_same_bytes(
    bank: tuple[Path, list[Learnt]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where memory has another size by then, and a group would have another."""
    train, titles = oracle_training.train_group, []

    def cut_off(*given: Any) -> LoraAdapter:
        titles.append(given[-1])
        if len(titles) == 2:
            raise KeyboardInterrupt
        return train(*given)

    monkeypatch.setattr(oracle_training, "train_group", cut_off)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "bank")
    assert not (tmp_path / "bank").exists() and (tmp_path / "bank.part").is_dir()
    monkeypatch.setattr(oracles, "_MOST_IN_GROUP", 3)
    learnt = make(tmp_path / "bank")
    assert titles == [f"oracles, group {number} of 2" for number in (1, 2, 2)]
    assert contents(tmp_path / "bank") == contents(bank[0]) and learnt == bank[1]
    assert not (tmp_path / "bank.part").exists()


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (BankRecipe(7, 3e-2, 2, 0), [], "--steps=6, which is 7 now; repeat that command"),
        (BankRecipe(6, 3e-2, 2, 1), [], "--seed=0, which is 1 now"),
        (RECIPE, ["model.hypernetwork.alpha=4"], "model.hypernetwork.alpha=16.0, which is 4.0"),
        (RECIPE, ["model.task_llm.quantisation=none"], "model.task_llm.quantisation=nf4, which"),
        (RECIPE, ["model.hypernetwork.targets=[q_proj]"], "other model.hypernetwork.targets"),
        (RECIPE, ["data.num_seen=5"], "other seen tasks, or other examples of them"),
        (RECIPE, ["data.train_examples=5"], "other seen tasks, or other examples of them"),
    ],
)
def test_another_command_is_refused_by_what_differs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: BankRecipe,
    overrides: list[str],
    message: str,
) -> None:
    def cut_off(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(oracle_training, "train_group", cut_off)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "bank")
    (tmp_path / "bank.part" / "group-0000.safetensors").touch()  # as if one had been trained
    other = load_config("quickstart-smoke", [*RULES, LORA, *overrides])
    with pytest.raises(UserError, match=message) as error:
        make(tmp_path / "bank", recipe, other)
    assert "bank.part: was begun with " in str(error.value) and "\n" not in str(error.value)


def test_a_second_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, said = [], []

    def begin_another(*given: Any) -> None:
        assert not begun, "a second one trains"
        begun.append(given)
        with pytest.raises(UserError, match="another process writes it; name another --out") as e:
            make(tmp_path / "bank")
        said.append(str(e.value))
        raise KeyboardInterrupt

    monkeypatch.setattr(oracle_training, "train_group", begin_another)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "bank")
    assert len(said) == 1


def test_oracles_that_all_do_the_same_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untrained(base: FrozenBase, first: Any, examples: Any, *_: Any) -> LoraAdapter:
        return first().rows(torch.zeros(len(examples), dtype=torch.long))  # type: ignore[no-any-return]

    monkeypatch.setattr(oracle_training, "train_group", untrained)
    with pytest.raises(UserError, match="the oracles of all tasks do the same there"):
        make(tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def test_one_task_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one seen task has no spread over tasks"):
        make(tmp_path / "bank", config=load_config("quickstart-smoke", ["data.num_seen=1", LORA]))


def test_the_verb_says_how_good_each_oracle_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the config of a run, too."""
    run = tmp_path / "config.json"
    run.write_text(json.dumps(CONFIG.model_dump(mode="json")))
    out, lr = tmp_path / "bank", ["--lr", "3e-2"]
    assert cli.main(["oracles", "--config", str(run), "--out", str(out), "--steps", "6", *lr]) == 0
    lines = capsys.readouterr().out.splitlines()
    ids = list(read_bank(out).tasks)
    assert [line.partition(": ")[0] for line in lines[:6]] == ids and len(lines) == 8
    both = [[float(one) for one in line.rpartition(": ")[2].split(" -> ")] for line in lines[:6]]
    before, after = zip(*both, strict=True)
    means = [float(word) for word in lines[6].replace(",", "").split() if "." in word]
    assert means == pytest.approx([sum(before) / 6, sum(after) / 6], abs=1e-3)
    assert lines[7] == str(out) and means[1] < means[0]
    assert cli.main(["oracles", "--config", str(run), "--out", str(out)]) == 2


def test_a_rate_that_is_too_high_is_one_line_and_binds_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What ended before its first group leaves nothing that another command has to repeat."""
    command = ["oracles", "--config", "quickstart-smoke", *RULES, "--steps", "6"]
    out = ["--out", str(tmp_path / "bank"), "--device", "cpu"]
    assert cli.main([*command, *out, "--lr", "1e30"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the loss of step" in last and "lower its lr (1e+30)" in last
    assert not (tmp_path / "bank").exists()
    # Its one loss is of the weights as they were; what they become is too large to be squared.
    once = [*command[:-1], "1", LORA, *out, "--lr", "1e25"]
    assert cli.main(once) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "oracles there are not finite; remove " in last and "lower --lr" in last
    shutil.rmtree(tmp_path / "bank.part")
    assert cli.main([*command, *out, "--lr", "1e-2"]) == 0
    check_files(tmp_path / "bank")
