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
from ship_ds.console import no_log
from ship_ds.data.source import source_of
from ship_ds.data.task import Reading
from ship_ds.errors import UserError
from ship_ds.evaluation.config import Direction, HarnessConfig
from ship_ds.evaluation.evaluate import evaluate
from ship_ds.evaluation.harness import _changed
from ship_ds.evaluation.method import Setting
from ship_ds.evaluation.methods.one_pass import OnePass
from ship_ds.evaluation.questions import examples_to_read
from ship_ds.inference.scoring import fit_of_latents
from ship_ds.model.assemble import LoadedWeights, build_ship
from tests.conftest import start
from tests.pooled_run import LATENTS, WORDINGS, config_of, losses
from tests.starts import crash

QUERIES = "encoder.pooling.queries.weight"


def loss_of(method: dict[str, Any]) -> float:
    """Of the right answers on unseen tasks."""
    loss: float = method["deduction"]["unseen"]["answer_loss"]["value"]
    return loss


def test_it_resumes_bit_for_bit(pooled_run_folder: Path) -> None:
    repeats_to_the_bit(pooled_run_folder, pooled_run_folder.with_name("again"))


@pytest.mark.soak
def test_so_it_does_in_a_process_of_its_own(pooled_run_folder: Path, tmp_path: Path) -> None:
    """With nothing at hand that the first one compiled, loaded or hashed."""
    again = tmp_path / "run"
    shutil.copytree(pooled_run_folder, again)
    crash(again)
    done = start(["-m", "tests.pooled_run", str(again)], timeout=400)
    assert done.returncode == 0 and "after step 2\n" in done.stderr, done.stderr[-4000:]
    repeats_to_the_bit(pooled_run_folder, again)


def repeats_to_the_bit(run: Path, again: Path) -> None:
    assert losses(again) == losses(run)
    weights, repeated = (load_file(one / "bundle" / "ship.safetensors") for one in (run, again))
    assert weights.keys() == repeated.keys() and QUERIES in weights
    assert not any(name.startswith("decoder.") for name in weights)
    for name, tensor in weights.items():
        assert torch.equal(repeated[name], tensor), name
    assert (again / LATENTS).read_text() == (run / LATENTS).read_text()


def test_its_bundle_opens_and_encodes_what_the_trained_model_did(pooled_run_folder: Path) -> None:
    ship = Ship.from_run(pooled_run_folder)
    trained = dict(ship.model.named_parameters())[QUERIES]
    torch.manual_seed(0)
    config = config_of("nowhere").model
    first = dict(build_ship(config, LoadedWeights()).named_parameters())[QUERIES]
    assert trained.shape == (4 * 4, 128) and not torch.allclose(trained, first, atol=1e-4)
    live = torch.tensor(json.loads((pooled_run_folder / LATENTS).read_text()))
    torch.testing.assert_close(ship.model.encode(WORDINGS), live, rtol=1e-5, atol=1e-5)


def test_it_reads_examples_in_one_pass(pooled_run_folder: Path) -> None:
    ship = Ship.from_run(pooled_run_folder)
    pairs = [("3 1 2", "2 1 3"), ("4 7", "7 4")]
    read, with_text = ship.read(pairs), ship.read(pairs, WORDINGS[0])
    assert with_text.instruction == WORDINGS[0] and with_text.familiarity is not None
    assert read.familiarity is None and read.instruction == ""  # no decoder was trained
    others = [ship.read(pairs[:1]), with_text, ship.deduce(WORDINGS[0])]
    assert all(other.latent != read.latent for other in others)
    for given, message in ((pairs * 2, "4 are given.*at most 2"), ([], "there are none")):
        with pytest.raises(UserError, match=f"examples: .*{message}"):
            ship.read(given)


def test_the_harness_asks_it_in_one_pass(pooled_run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(
        pooled_run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")
    )

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


def test_an_encoder_that_reads_no_examples_is_told_so(one_rank_run: Path) -> None:
    one: Any = _changed("ship_one_pass", ["num_examples=1"])
    with pytest.raises(UserError, match=r"num_examples=1: .* instructions alone .* leave the met"):
        one.cannot(Ship.from_run(one_rank_run))


def test_right_answers_are_scored_under_what_was_read(pooled_run_folder: Path) -> None:
    """The latent and the fused states are both of the instruction with as many examples as set."""
    ship = Ship.from_run(pooled_run_folder)
    splits = source_of(ship.config.data).read(ship.model.prompts.tokenizer, no_log)
    tasks, prompts = splits.unseen[:2], ship.model.prompts
    asked, wordings = [task.test[:2] for task in tasks], [task.task.instruction for task in tasks]
    one: Any = _changed("ship_one_pass", ["num_examples=1"])
    assert one.about.endswith("in deduction beside 1 of them")
    found = one(Setting(ship, splits, Path(), None, 3)).answer_losses(tasks, wordings, asked)
    read = [Reading(task.task.instruction, examples_to_read(task, 1, 3)) for task in tasks]
    latent_TZ, num_tokens = (
        ship.model.encode(read),
        torch.tensor([[len(prompts.target(one.target)) for one in some] for some in asked]),
    )
    right, of_wordings = (
        fit_of_latents(ship.model, latent_TZ, wordings, asked, fused).loss_CM / num_tokens
        for fused in (read, wordings)
    )
    torch.testing.assert_close(torch.tensor(found), right, check_dtype=False)
    assert (right - of_wordings).abs().max() > 1e-4
    whole = OnePass(Setting(ship, splits, Path(), None, 3)).answer_losses(tasks, wordings, asked)
    assert (torch.tensor(whole) - right).abs().max() > 1e-4
