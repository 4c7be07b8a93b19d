"""A run as HINT trains, with learned queries over instructions and examples: sharded, checkpointed,
resumed, opened."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from ship_ds.api import Ship
from ship_ds.errors import UserError
from ship_ds.evaluation.config import Direction, HarnessConfig
from ship_ds.evaluation.evaluate import evaluate
from ship_ds.model.assemble import LoadedWeights, build_ship
from tests.conftest import start
from tests.pooled_run import LATENTS, WORDINGS, config_of

QUERIES = "encoder.pooling.queries.weight"
LOSSES = ("loss/total", "loss/task", "loss/reconstruction", "loss/kl", "optimiser/gradient_norm")


def train(folder: Path, *launcher: str) -> str:
    done = start([*launcher, "-m", "tests.pooled_run", str(folder)], timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def losses(folder: Path) -> list[list[float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    return [[row[name] for name in LOSSES] for row in rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On one rank."""
    folder = tmp_path_factory.mktemp("pooled") / "run"
    train(folder)
    return folder


@pytest.mark.slow
def test_it_resumes_bit_for_bit(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step-00000004")
    shutil.rmtree(again / "bundle")
    assert "after step 2" in train(again)
    assert losses(again) == losses(run)
    weights, repeated = (load_file(one / "bundle" / "ship.safetensors") for one in (run, again))
    assert weights.keys() == repeated.keys() and QUERIES in weights
    assert not any(name.startswith("decoder.") for name in weights)
    for name, tensor in weights.items():
        assert torch.equal(repeated[name], tensor), name
    assert (again / LATENTS).read_text() == (run / LATENTS).read_text()


@pytest.mark.slow
def test_its_bundle_opens_and_encodes_what_the_trained_model_did(run: Path) -> None:
    ship = Ship.from_run(run)
    trained = dict(ship.model.named_parameters())[QUERIES]
    torch.manual_seed(0)
    config = config_of("nowhere").model
    first = dict(build_ship(config, LoadedWeights()).named_parameters())[QUERIES]
    assert trained.shape == (4 * 4, 128) and not torch.allclose(trained, first, atol=1e-4)
    live = torch.tensor(json.loads((run / LATENTS).read_text()))
    torch.testing.assert_close(ship.model.encode(WORDINGS), live, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_it_reads_examples_in_one_pass(run: Path) -> None:
    ship = Ship.from_run(run)
    pairs = [("3 1 2", "2 1 3"), ("4 7", "7 4")]
    read, with_text = ship.read(pairs), ship.read(pairs, WORDINGS[0])
    assert with_text.instruction == WORDINGS[0] and with_text.familiarity is not None
    assert read.familiarity is None and read.instruction == ""  # no decoder was trained
    others = [ship.read(pairs[:1]), with_text, ship.deduce(WORDINGS[0])]
    assert all(other.latent != read.latent for other in others)
    for given, message in ((pairs * 2, "4 are given.*at most 2"), ([], "there are none")):
        with pytest.raises(UserError, match=f"examples: .*{message}"):
            ship.read(given)


@pytest.mark.slow
def test_the_harness_asks_it_in_one_pass(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    config = HarnessConfig(
        methods=("ship_one_pass",), num_tasks=2, parts=("seen", "unseen"), num_shown=(2,)
    )
    report = evaluate(tmp_path / "run", config, ["evaluate"], lambda line: None)
    directions = report["methods"]["ship_one_pass"]
    # Texts are a decoder's, and none was trained.
    assert {"deduction", "reasoning"} == directions.keys() & set(get_args(Direction))
    assert directions["reasoning"]["unseen"]["n_tasks"] == 2


@pytest.mark.distributed
def test_two_ranks_take_its_steps(run: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    train(tmp_path / "run", *launcher)
    for one, two in zip(losses(run), losses(tmp_path / "run"), strict=True):
        assert two == pytest.approx(one, rel=1e-3)
