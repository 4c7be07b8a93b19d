"""A base that lies elsewhere now: the run opens by `base`, and no other model passes for it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ship_ds.api import Ship
from ship_ds.bundle import Bundle, check_bases_of_roles, frozen_bases, write_bundle
from ship_ds.cli import main
from ship_ds.config import Config, base_folder, load_config
from ship_ds.errors import UserError
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.prompt import describe_roles
from ship_ds.runtime.checkpoint import Progress, check_same_run
from ship_ds.train import open_start


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle around a base in a folder of its own, and that folder."""
    folder = tmp_path_factory.mktemp("moved")
    base = Path(shutil.copytree(base_folder("embedded"), folder / "base"))
    config = load_config("quickstart-smoke", [f"model.task_llm.base={base}"])
    torch.manual_seed(0)
    model = build_ship(config.model, LoadedWeights())
    state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    prompts = describe_roles(vars(model.collator.prompts))
    write_bundle(folder / "bundle", state, config, prompts, frozen_bases(config), ["reverse"], [])
    return folder / "bundle", base


def test_a_run_opens_with_its_base_elsewhere(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, base = run
    before = Ship.from_run(bundle).answer("reverse the list", ["1 2 3"])
    moved = tmp_path / "elsewhere"
    base.rename(moved)
    try:
        assert main(["answer", "reverse the list", "1 2 3", "--run", str(bundle)]) == 2
        assert "if it is elsewhere now, say where by --base" in capsys.readouterr().err
        ship = Ship.from_run(bundle, base=str(moved))
        assert ship.answer("reverse the list", ["1 2 3"]) == before
        assert ship.config.model.encoder.base == str(moved)
    finally:
        moved.rename(base)


@pytest.mark.parametrize("change", ["weights", "settings"])
def test_another_model_does_not_pass_for_the_base(
    run: tuple[Path, Path], tmp_path: Path, change: str
) -> None:
    bundle, base = run
    other = Path(shutil.copytree(base, tmp_path / "other"))
    if change == "weights":
        weights = load_file(other / "model.safetensors")
        weights[min(weights)] += 1
        save_file(weights, other / "model.safetensors", {"format": "pt"})
    else:
        path = other / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match=str(other)):
        Ship.from_run(bundle, base=str(other))


def test_a_base_that_is_in_use_elsewhere_changes_nothing_of_the_rest(
    run: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle, base = run
    moved = Path(shutil.copytree(base, tmp_path / "copy"))
    theirs, ours = Bundle.open(bundle, str(moved)), Bundle.open(bundle)
    assert sorted(theirs.bases.values()) == sorted(ours.bases.values())
    assert theirs.config.data == ours.config.data and theirs.config.run == ours.config.run


def test_a_resume_takes_the_same_base_elsewhere_and_no_other(tmp_path: Path) -> None:
    def config(base: str) -> dict[str, object]:
        made = load_config("quickstart-smoke", [f"model.task_llm.base={base}"])
        return made.model_dump(mode="json")

    then = Progress(1, 0, 0, 0, 1, config("/old"), "data", bases={"/old": "a"}, git_revision="")
    check_same_run(tmp_path, then, config("/new"), "data", {"/new": "a"})
    for bases in ({"/new": "b"}, {}):
        with pytest.raises(UserError, match=r"model\.decoder\.base was /old and is /new now"):
            check_same_run(tmp_path, then, config("/new"), "data", bases)


def test_a_resume_takes_no_base_elsewhere_of_other_settings(tmp_path: Path) -> None:
    """Where both say them: earlier versions have the weights' fingerprint alone."""

    def config(base: str) -> dict[str, object]:
        made = load_config("quickstart-smoke", [f"model.task_llm.base={base}"])
        return made.model_dump(mode="json")

    bases = {"/old": "a", "/old (config.json)": "s"}
    then = Progress(1, 0, 0, 0, 1, config("/old"), "data", bases=bases, git_revision="")
    for now in ({"/new": "a", "/new (config.json)": "s"}, {"/new": "a"}):
        check_same_run(tmp_path, then, config("/new"), "data", now)
    with pytest.raises(UserError, match="was /old and is /new now"):
        other = {"/new": "a", "/new (config.json)": "t"}
        check_same_run(tmp_path, then, config("/new"), "data", other)


def test_a_start_from_a_bundle_takes_the_same_base_elsewhere_and_no_other(
    run: tuple[Path, Path], tmp_path: Path
) -> None:
    """The shapes are equal, and so nothing else would tell that z says other things here."""
    bundle, base = run
    same, other, set_otherwise = (
        Path(shutil.copytree(base, tmp_path / name)) for name in ("same", "other", "set")
    )
    weights = load_file(other / "model.safetensors")
    weights[min(weights)] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    settings = json.loads((base / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (set_otherwise / "config.json").write_text(json.dumps(settings))

    def start(*overrides: str) -> None:
        config = load_config("quickstart-smoke", [f"run.init_from={bundle}", *overrides])
        opened = open_start(config, frozen_bases(config))
        assert opened is not None
        opened.load_into(build_ship(config.model, LoadedWeights()))

    start(f"model.task_llm.base={same}")
    with pytest.raises(UserError, match=rf"model\.task_llm\.base={base} with .* {other} has"):
        start(f"model.task_llm.base={other}")
    with pytest.raises(
        UserError, match=rf"{base} \(config.json\) with .*: set model.task_llm.base"
    ):
        start(f"model.task_llm.base={set_otherwise}")
    # The encoder is trained whole, and its weights are the bundle's wherever they began.
    start(f"model.task_llm.base={same}", f"model.encoder.base={other}", "model.backbone=separate")


def test_a_start_from_a_bundle_names_the_role_whose_base_is_another(tmp_path: Path) -> None:
    def model(task_llm: str, encoder: str) -> Config:
        bases = [f"model.task_llm.base={task_llm}", f"model.encoder.base={encoder}"]
        return load_config(
            "quickstart-smoke", [*bases, "model.encoder.tuning={kind: lora, rank: 2}"]
        )

    prints = {"/a": "of a", "/b": "of b"}
    then = Bundle(tmp_path, "", model("/a", "/b"), {}, prints, (), ())
    check_bases_of_roles(then, model("/c", "/d").model, {"/c": "of a", "/d": "of b"})
    line = "model.encoder.base=/b with fingerprint of b, and this run's /a has of a: set model.enc"
    with pytest.raises(UserError, match=line):
        check_bases_of_roles(then, model("/a", "/a").model, prints)
    # Bundles before 0.1.0 say none.
    unknown = replace(then, bases={})
    check_bases_of_roles(unknown, model("/a", "/a").model, prints)
