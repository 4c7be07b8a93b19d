"""A run as HINT trains, with learned queries over instructions and examples: sharded, checkpointed,
resumed, opened. runtime/test_two_ranks.py takes its steps on two ranks."""

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
from tests.pooled_run import LATENTS, WORDINGS, config_of, losses

QUERIES = "encoder.pooling.queries.weight"


def loss_of(method: dict[str, Any]) -> float:
    """Of the right answers on unseen tasks."""
    loss: float = method["deduction"]["unseen"]["answer_loss"]["value"]
    return loss


def test_it_resumes_bit_for_bit(pooled_run: Path) -> None:
    run, again = pooled_run, pooled_run.with_name("again")
    assert losses(again) == losses(run)
    weights, repeated = (load_file(one / "bundle" / "ship.safetensors") for one in (run, again))
    assert weights.keys() == repeated.keys() and QUERIES in weights
    assert not any(name.startswith("decoder.") for name in weights)
    for name, tensor in weights.items():
        assert torch.equal(repeated[name], tensor), name
    assert (again / LATENTS).read_text() == (run / LATENTS).read_text()


def test_its_bundle_opens_and_encodes_what_the_trained_model_did(pooled_run: Path) -> None:
    ship = Ship.from_run(pooled_run)
    trained = dict(ship.model.named_parameters())[QUERIES]
    torch.manual_seed(0)
    config = config_of("nowhere").model
    first = dict(build_ship(config, LoadedWeights()).named_parameters())[QUERIES]
    assert trained.shape == (4 * 4, 128) and not torch.allclose(trained, first, atol=1e-4)
    live = torch.tensor(json.loads((pooled_run / LATENTS).read_text()))
    torch.testing.assert_close(ship.model.encode(WORDINGS), live, rtol=1e-5, atol=1e-5)


def test_it_reads_examples_in_one_pass(pooled_run: Path) -> None:
    ship = Ship.from_run(pooled_run)
    pairs = [("3 1 2", "2 1 3"), ("4 7", "7 4")]
    read, with_text = ship.read(pairs), ship.read(pairs, WORDINGS[0])
    assert with_text.instruction == WORDINGS[0] and with_text.familiarity is not None
    assert read.familiarity is None and read.instruction == ""  # no decoder was trained
    others = [ship.read(pairs[:1]), with_text, ship.deduce(WORDINGS[0])]
    assert all(other.latent != read.latent for other in others)
    for given, message in ((pairs * 2, "4 are given.*at most 2"), ([], "there are none")):
        with pytest.raises(UserError, match=f"examples: .*{message}"):
            ship.read(given)


def test_the_harness_asks_it_in_one_pass(pooled_run: Path, tmp_path: Path) -> None:
    shutil.copytree(pooled_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))

    def rows_of(*changes: str) -> dict[str, Any]:
        config = HarnessConfig(
            methods=("ship_one_pass", "ship"),
            num_tasks=2,
            parts=("seen", "unseen"),
            num_shown=(2,),
            changes=changes,
        )
        report: Any = evaluate(tmp_path / "run", config, ["evaluate"], lambda line: None)
        rows: dict[str, Any] = report["methods"]
        return rows

    rows = rows_of()
    directions = rows["ship_one_pass"]
    # Texts are a decoder's, and none was trained.
    assert {"deduction", "reasoning"} == directions.keys() & set(get_args(Direction))
    assert directions["reasoning"]["unseen"]["n_tasks"] == 2
    # The right answers have a loss beside examples, and without them it is the instruction's own.
    two, own = loss_of(rows["ship_one_pass"]), loss_of(rows["ship"])
    assert own != two
    none = rows_of("ship_one_pass.num_examples=0")["ship_one_pass"]
    assert loss_of(none) == pytest.approx(own, rel=1e-5)
    with pytest.raises(UserError, match=r"num_examples=3: this run's encoder .* at most 2"):
        rows_of("ship_one_pass.num_examples=3")
