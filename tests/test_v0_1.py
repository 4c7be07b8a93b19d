"""What version 0.1.0 wrote opens and goes on: tests/fixtures/v0_1, made by its make.py.

The folder's runs name their base by a path from the root of the repository, where the tests stand.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ship_ds.api import Ship
from ship_ds.bundle import frozen_bases
from ship_ds.config import load_config, override_config, parse_config, recipe_names
from ship_ds.data.source import source_of
from ship_ds.errors import UserError
from ship_ds.export.bundling import bundle_from_checkpoint
from ship_ds.inference.adapter_reading import induce_from_weights, read_adapter
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.explaining import Threshold
from ship_ds.inference.lora_reader import LoraReader
from ship_ds.model.loading import load_tokenizer
from ship_ds.model.parameter_names import by_current_name, current_name
from ship_ds.origin import read_origin
from tests.conftest import REPOSITORY, start_warm

FOLDER = Path("tests/fixtures/v0_1")
RUN = FOLDER / "run"
RECORDED = json.loads((REPOSITORY / FOLDER / "recorded.json").read_text())


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the folder in its place: a run that is opened keeps what it works out."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(REPOSITORY / FOLDER, root / FOLDER)
    return root


@pytest.fixture(autouse=True)
def at_the_root(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied)


def check_behaviour(bundle: Path, recorded: dict[str, Any]) -> None:
    """Latents up to another processor's rounding; answers and texts word for word."""
    ship = Ship.from_run(bundle)
    for index, instruction in enumerate(RECORDED["instructions"]):
        assert ship.encode(instruction) == pytest.approx(recorded["latents"][index], rel=1e-4)
        assert ship.answer(instruction, RECORDED["inputs"]) == recorded["answers"][index]
        assert ship.decode(recorded["latents"][index]) == recorded["texts"][index]


def test_a_bundle_opens_and_answers_as_it_did() -> None:
    check_behaviour(RUN, RECORDED["bundle"])


def test_a_checkpoint_becomes_a_bundle(tmp_path: Path) -> None:
    bundle_from_checkpoint(RUN / "checkpoints" / "step-00000002", tmp_path / "bundle")
    check_behaviour(tmp_path / "bundle", RECORDED["bundle of step 2"])


def test_the_loras_that_peft_trained_have_their_names_of_now() -> None:
    old = "decoder.lm.model.layers.1.mlp.up_proj.lora_B.default.weight"
    assert current_name(old) == "decoder.adapter.model.layers.1.mlp.up_proj.lora_b.weight"
    for name in (current_name(old), "encoder.head.0.weight", "encoder.lm.model.norm.weight"):
        assert current_name(name) == name
    names = load_file(RUN / "bundle" / "ship.safetensors").keys()
    assert sum(current_name(name) != name for name in names) == 2 * 2 * 2 * 7


@pytest.mark.slow
def test_a_run_goes_on_without_padding_too(
    tmp_path: Path, rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """As users run it. The masks of the LoRAs' dropout are others, and move the loss a little."""
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    overrides = [*RECORDED["settings"], f"run.folder={run}"]
    done = start_warm(["-m", "ship_ds.train", "--config", "quickstart-smoke", *overrides])
    assert done.returncode == 0, done.stderr[-4000:]
    was, now = rows(RUN)[2], rows(run)[2]
    assert now["loss/total"] != was["loss/total"]
    assert now["loss/total"] == pytest.approx(was["loss/total"], rel=0.05)
    assert now["optimiser/lr"] == was["optimiser/lr"]


@pytest.mark.slow
def test_a_run_takes_its_last_step_and_leaves_the_bundle_that_it_left(
    tmp_path: Path, rows: Callable[[Path], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its third step, which 0.1.0 took as well: optimiser, generators and data came back."""
    monkeypatch.setenv("SHIP_DS_PLUGINS", "tests.padded_rows")
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    shutil.rmtree(run / "bundle")
    overrides = [*RECORDED["settings"], f"run.folder={run}"]
    done = start_warm(["-m", "ship_ds.train", "--config", "quickstart-smoke", *overrides])
    assert done.returncode == 0, done.stderr[-4000:]
    assert "after step 2" in done.stderr
    was, now = rows(RUN), rows(run)
    assert [row["step"] for row in now] == [0, 1, 2] and was[:2] == now[:2]
    for name in ("loss/total", "loss/kl", "optimiser/gradient_norm", "optimiser/lr"):
        assert now[2][name] == pytest.approx(was[2][name], rel=1e-5), name
    expected = by_current_name(load_file(RUN / "bundle" / "ship.safetensors"))
    trained = load_file(run / "bundle" / "ship.safetensors")
    assert len(json.loads((run / "bundle" / "probes.json").read_text())) == 3
    assert list(trained) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_an_adapter_is_read_back_into_words() -> None:
    """Both ways: a latent that makes these very weights, and what the adapter answers."""
    assert read_origin(FOLDER / "adapter").made_from == RECORDED["instructions"][0]
    ship = Ship.from_run(RUN)
    adapter = read_adapter(ship.model, FOLDER / "adapter")
    by_weights = induce_from_weights(ship.model, ship.bank, adapter, InductionConfig())
    assert by_weights.latent_distance < 1e-3
    ship._threshold, ship._reader = (
        Threshold(0.5, 0.0, 0.0, 0),
        LoraReader(ship.model.task_llm.sites(), ship.config.model.latent_size),
    )
    found = ship.explain(FOLDER / "adapter", RECORDED["inputs"])
    asked = list(dict.fromkeys(RECORDED["inputs"]))
    assert list(found.answers) == ship.answer(RECORDED["instructions"][0], asked)
    assert found.candidates and list(found.inputs) == asked


def test_another_base_of_the_same_shape_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FOLDER, tmp_path / FOLDER)
    weights = tmp_path / FOLDER / "base" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="put that model back, or train again") as error:
        Ship.from_run(RUN)
    assert "\n" not in str(error.value)
    weights.unlink()
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor") as error:
        Ship.from_run(RUN)
    assert "\n" not in str(error.value)


def test_files_have_the_fingerprint_that_they_had() -> None:
    """Else no run on files would go on; that of generated rules is compared by the resume above."""
    config = load_config(
        "list-functions",
        [
            f"data.path={FOLDER}/tasks.jsonl",
            "data.filters.min_examples_per_task=2",
            "model.task_llm.base=embedded",
        ],
    )
    source = source_of(config.data)
    splits = source.read(load_tokenizer("embedded"), lambda line: None)
    assert source.fingerprint(splits) == RECORDED["files fingerprint"]


def test_the_embedded_model_is_the_one_of_0_1_0() -> None:
    """Else no bundle of a quickstart would open."""
    assert frozen_bases(load_config("quickstart-smoke"))["embedded"] == RECORDED["embedded"]


AS_THE_AUTHORS = ["data.filters.max_instruction_words=32", "data.filters.min_examples_per_task=27"]
LONGEST_TARGET = "evaluation.max_new_tokens=129"
CHANGED = {
    "pretrain-7b": [*AS_THE_AUTHORS, LONGEST_TARGET],
    "in-domain-7b": [*AS_THE_AUTHORS, LONGEST_TARGET, "run.init_from=null"],
    "natural-instructions": ["evaluation.max_new_tokens=49"],
    "quickstart": ["checkpoint.every_minutes=0.75"],
    "quickstart-smoke": ["evaluation.final_share=null", "evaluation.num_final_tasks=6"],
}
"""What 0.2 put right in the published setting, where the recipes' first lines say so; answers as
long as the targets may be; how often is saved; and a report of six tasks a part after seconds
of training."""


@pytest.mark.parametrize("name", RECORDED["recipes"])
def test_the_config_of_a_recipe_means_what_it_meant(name: str) -> None:
    """A run stores its whole config; what 0.2 added has the default that 0.1 stood for."""
    assert name in recipe_names()
    recorded = parse_config(RECORDED["recipes"][name], name)
    assert override_config(recorded, CHANGED.get(name, [])) == load_config(name)
