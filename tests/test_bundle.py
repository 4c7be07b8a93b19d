"""What a bundle carries beside its weights, and bundles of earlier versions."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ship_ds.api import Ship
from ship_ds.bundle import Bundle, frozen_bases, probe_inputs, write_bundle
from ship_ds.config import load_config, parse_config
from ship_ds.data.task import Example, SplitTask, Task
from ship_ds.errors import UserError
from ship_ds.files import Manifest
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.ship import ShipModel
from ship_ds.prompt import describe_roles

pytestmark = pytest.mark.slow

PROBES = ["4 4 1", "0 9", "é"]


def task(name: str, *inputs: str) -> SplitTask:
    examples = tuple(Example(text, text) for text in inputs)
    return SplitTask(Task(name, name, examples), examples[:1], examples[1:])


def test_probes_are_the_first_three_distinct_test_inputs_of_seen_tasks() -> None:
    seen = [task("a", "1", "2", "2"), task("b", "3"), task("c", "4", "2", "5", "6", "7")]
    assert probe_inputs(seen) == ["2", "5", "6"]
    assert probe_inputs(seen[:2]) == ["2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = load_config("quickstart-smoke", [])
    torch.manual_seed(0)
    model = build_ship(config.model, LoadedWeights())
    trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    bases, prompt_format = frozen_bases(config), describe_roles(vars(model.collator.prompts))
    write_bundle(
        tmp_path / "bundle", trainable, config, prompt_format, bases, ["add 1", "add 2"], PROBES
    )
    return tmp_path / "bundle"


def without(folder: Path, *names: str) -> None:
    """Make it the bundle of a version that did not have these files."""
    for name in names:
        (folder / name).unlink()
    Manifest.of(folder).write(folder)


def test_a_bundle_gives_back_what_was_written(folder: Path) -> None:
    ship, bundle = Ship.from_run(folder.parent), Bundle.open(folder)
    assert ship.probes == tuple(PROBES) and ship.known == ("add 1", "add 2")
    assert ship.digest == bundle.digest == Manifest.of(folder).files["ship.safetensors"].sha256
    torch.manual_seed(0)
    trained = dict(build_ship(bundle.config.model, LoadedWeights()).named_parameters())
    for name, parameter in ship.model.named_parameters():
        assert parameter.equal(trained[name]), name


def test_bundles_of_0_1_0_and_before_open(folder: Path) -> None:
    without(folder, "probes.json")
    ship = Ship.from_run(folder)
    assert ship.probes == ("3 7 3 5", "1 3 9 3 0") and ship.known == ("add 1", "add 2")
    without(folder, "known_instructions.json", "bases.json")
    ship = Ship.from_run(folder)
    assert ship.known == () and ship.deduce("add 1").familiarity is None


def test_a_folder_of_something_else_is_one_line(folder: Path) -> None:
    without(folder, "ship.safetensors")
    with pytest.raises(UserError, match="no bundle here: its manifest does not list ship.safe"):
        Ship.from_run(folder)
    with pytest.raises(UserError, match=r"no bundle here \(manifest.json is missing\)"):
        Ship.from_run(folder.parent / "none")


def test_damaged_weights_are_one_line(folder: Path) -> None:
    path = folder / "ship.safetensors"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4976\n"
    # Not the file's own pages, which writing takes away.
    tensors = {name: one.clone() for name, one in load_file(path).items()}
    name = min(tensors)
    path.write_bytes(pointer)
    with pytest.raises(UserError, match=r"ship\.safetensors: a Git LFS pointer"):
        Ship.from_run(folder)
    Manifest.of(folder).write(folder)
    with pytest.raises(UserError, match=r"ship\.safetensors: cannot be read: .*; write the bundle"):
        Ship.from_run(folder)
    for wrong in (torch.full_like(tensors[name], torch.nan), tensors[name].int()):
        save_file(tensors | {name: wrong}, path)
        Manifest.of(folder).write(folder)
        with pytest.raises(UserError, match=rf"{re.escape(name)} has values that are no finite"):
            Ship.from_run(folder)


def test_weights_of_another_model_are_one_line(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model"]["hypernetwork"] = {"kind": "soft_prompt"}
    path.write_text(json.dumps(config))
    Manifest.of(folder).write(folder)
    with pytest.raises(UserError, match=r"more names differ from the model in its config"):
        Ship.from_run(folder)


def test_a_model_without_decoder_takes_the_rest_of_a_bundle(folder: Path) -> None:
    config = load_config("quickstart-smoke", ["loss.reconstruction=0"])
    model = build_ship(config.model, LoadedWeights(), config.loss)
    drawn = {name: one.clone() for name, one in model.decoder.state_dict().items()}
    Bundle.open(folder).load_into(model)
    assert torch.equal(
        model.encode(["reverse the list"]), Ship.from_run(folder).model.encode(["reverse the list"])
    )
    assert all(torch.equal(one, drawn[name]) for name, one in model.decoder.state_dict().items())


def test_a_bundle_without_decoder_leaves_the_models_as_it_was_drawn(
    folder: Path, tmp_path: Path
) -> None:
    """As after pre-training a hypernetwork alone: a run with a decoder starts from it."""
    config = load_config("quickstart-smoke", ["loss.reconstruction=0"])
    without = build_ship(config.model, LoadedWeights(), config.loss)
    state = {n: p.detach() for n, p in without.named_parameters() if p.requires_grad}
    assert not any(name.startswith("decoder.") for name in state)
    prompts = describe_roles(vars(without.collator.prompts))
    write_bundle(tmp_path / "b", state, config, prompts, frozen_bases(config), [], [])
    whole = build_ship(load_config("quickstart-smoke").model, LoadedWeights())
    drawn = {name: one.clone() for name, one in whole.decoder.state_dict().items()}
    Bundle.open(tmp_path / "b").load_into(whole)
    text = ["reverse the list"]
    assert torch.equal(whole.encode(text), without.encode(text))
    assert all(torch.equal(one, drawn[name]) for name, one in whole.decoder.state_dict().items())


def combined(rank: int) -> ShipModel:
    """The smoke recipe's hypernetwork with HINT's fusion beside it."""
    own = load_config("quickstart-smoke").model.hypernetwork.model_dump() | {"rank": rank}
    config = load_config("quickstart-smoke").model_dump()
    config["model"]["hypernetwork"] = {"kind": "combination", "parts": [{"kind": "fusion"}, own]}
    return build_ship(parse_config(config, "test").model, LoadedWeights())


def test_a_combination_starts_from_a_run_of_one_of_its_parts(folder: Path) -> None:
    bundle = Bundle.open(folder)
    whole = build_ship(bundle.config.model, LoadedWeights())
    bundle.load_into(whole)
    model = combined(bundle.config.model.hypernetwork.model_dump()["rank"])
    drawn = {name: one.clone() for name, one in model.state_dict().items()}
    bundle.load_into(model)
    part = {f"parts.1.{name}": one for name, one in whole.hypernetwork.state_dict().items()}
    loaded = model.hypernetwork.state_dict()
    assert part and all(loaded[name].equal(one) for name, one in part.items())
    new = {f"hypernetwork.{name}" for name in loaded.keys() - part.keys()}
    for name, one in model.state_dict().items():
        if name in new:
            assert one.equal(drawn[name]), name
        elif not name.startswith("hypernetwork."):
            assert one.equal(whole.state_dict()[name]), name
    assert any("from_state" in name for name in new)
    with pytest.raises(
        UserError, match=r"more names differ .*give one of model.hypernetwork.parts"
    ):
        bundle.load_into(combined(rank=3))


def test_weights_of_other_shapes_are_one_line(folder: Path) -> None:
    config = load_config("quickstart-smoke", ["model.latent_size=32"])
    model = build_ship(config.model, LoadedWeights())
    with pytest.raises(UserError, match=r"encoder\.head\.2\.weight is \(128, .*\(64, "):
        Bundle.open(folder).load_into(model)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("alpha=4", r"hypernetwork\.alpha=16\.0: set"),
        ("normalises_latent=true", "latent=false: set"),
    ],
)
def test_weights_that_would_make_other_adapters_are_one_line(
    folder: Path, setting: str, line: str
) -> None:
    """Names and shapes are the same, and a run that began with them would begin elsewhere."""
    config = load_config("quickstart-smoke", [f"model.hypernetwork.{setting}"])
    with pytest.raises(UserError, match=line):
        Bundle.open(folder).load_into(build_ship(config.model, LoadedWeights()))


def test_a_run_opens_from_inside_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert list(Bundle.open(Path(".")).probes) == PROBES
