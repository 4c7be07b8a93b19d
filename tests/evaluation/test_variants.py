"""What is compared: files of variants, the commands that they become, and what is refused before
anything is trained."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from ship_ds.config import load_config
from ship_ds.errors import UserError
from ship_ds.evaluation.variants import (
    VariantRun,
    check,
    commands,
    in_turn,
    parse_names,
    plan,
    read_variants,
)
from ship_ds.files import write_json
from ship_ds.kinds import ADAPTERS, OBJECTIVES, PRIORS, Kinds
from tests.conftest import REPOSITORY

KINDS = """
config: quickstart-smoke
seeds: [3, 4]
variants:
  lora:
  2: {model.hypernetwork: {kind: soft_prompt, num_virtual_tokens: 2}, training.steps: 7}
"""


@pytest.fixture
def kinds(tmp_path: Path) -> str:
    (tmp_path / "kinds.yaml").write_text(KINDS)
    return str(tmp_path / "kinds.yaml")


def planned(
    names: Sequence[str],
    out: Path,
    common: Sequence[str] = (),
    minutes: float | None = 0.5,
    seeds: Sequence[int] | None = None,
) -> list[VariantRun]:
    return plan(read_variants(names), common, out, minutes, seeds)


def test_every_variant_is_trained_with_every_seed_for_equal_minutes(
    kinds: str, tmp_path: Path
) -> None:
    trials = planned([kinds], tmp_path / "out", ["training.tasks_per_step=4", "training.steps=9"])
    assert [trial.name for trial in trials] == [
        "lora, seed 3",
        "lora, seed 4",
        "2, seed 3",
        "2, seed 4",
    ]
    assert [trial.config.run.seed for trial in trials] == [3, 4, 3, 4]
    assert {trial.config.training.max_minutes for trial in trials} == {0.5}
    assert {trial.config.training.tasks_per_step for trial in trials} == {4}
    assert [trial.config.training.steps for trial in trials] == [9, 9, 7, 7], "its own come last"
    assert [trial.config.model.hypernetwork.model_dump()["kind"] for trial in trials] == [
        *("lora", "lora", "soft_prompt", "soft_prompt")
    ]
    assert trials[3].folder == tmp_path / "out" / "2" / "seed-4"
    assert not trials[0].config.evaluation.ends_with_report and not (tmp_path / "out").exists()


def test_command_is_what_a_user_would_start_and_means_the_same_config(
    kinds: str, tmp_path: Path
) -> None:
    trials = planned([kinds], tmp_path / "two words")
    assert [trial.name for trial in in_turn(trials)] == [
        *("lora, seed 3", "2, seed 3", "lora, seed 4", "2, seed 4")
    ]
    one, two = (shlex.split(commands(trials, ranks)[1]) for ranks in (1, 2))
    assert one[1:4] == ["-m", "ship_ds.train", "--config"] and two[1:3] == [
        *("-m", "torch.distributed.run")
    ]
    assert two[two.index("--nproc-per-node") + 1] == "2" and two[-len(one) + 1 :] == one[1:]
    assert load_config(one[4], one[5:]) == in_turn(trials)[1].config


def test_names_are_recipes_and_configs_and_their_own_seed_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run: {folder: x, seed: 5}\ntraining: {steps: 2}\n")
    names, common = parse_names(["quickstart", str(tmp_path / "mine.yaml"), "optimiser.lr=1e-4"])
    assert common == ["optimiser.lr=1e-4"]
    trials = planned(names, tmp_path, common)
    assert [trial.name for trial in trials] == ["quickstart, seed 0", "mine, seed 5"]
    assert [t.seed for t in planned(names, tmp_path, seeds=[1, 2])] == [1, 2, 1, 2]


def test_without_minutes_the_configs_have_to_agree(tmp_path: Path) -> None:
    (trial,) = planned(["quickstart"], tmp_path, minutes=None)
    assert trial.config.training.max_minutes == 7.9
    for names in (["quickstart-smoke"], ["quickstart", "quickstart-smoke"]):
        with pytest.raises(UserError, match="--minutes: give it, since .*null"):
            planned(names, tmp_path, minutes=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants: {}\nconfig: quickstart", "variants: Dictionary should have at least 1 item"),
        ("variants: {a: {}}", "config: Field required"),
        ("variants: [a]\nconfig: quickstart", "variants: Input should be a valid dictionary"),
        ("variants: {a: {}}\nconfig: quickstart\nseed: [1]", "seed: unknown key"),
        ("variants: {a: {}}\nconfig: quickstart\nseeds: []", "seeds: Tuple should have at least"),
        ("variants: {a b: {}}\nconfig: quickstart", "'a b': a variant's label becomes a folder"),
        ("variants: {a: {training.stepz: 3}}\nconfig: quickstart", "a: quickstart: training.stepz"),
        ("variants: {a: {}}\nconfig: nowhere", "a: nowhere: no such config file"),
    ],
)
def test_wrong_files_of_variants_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "kinds.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        planned([str(tmp_path / "kinds.yaml")], tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_two_variants_of_one_label_are_refused(kinds: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two variants are called 'lora'"):
        planned([kinds, kinds], tmp_path)


def test_a_folder_of_another_config_or_number_of_ranks_is_refused(tmp_path: Path) -> None:
    (trial,) = planned(["quickstart-smoke"], tmp_path)
    check([trial], 1, os.environ)
    write_json(trial.folder / "config.json", trial.config.model_dump(mode="json"))
    (trial.folder / "starts.jsonl").write_text(json.dumps({"world_size": 2}) + "\n")
    check([trial], 2, os.environ)
    with pytest.raises(UserError, match=r"seed-0: was trained by 2 rank\(s\); give --nproc 2"):
        check([trial], 1, os.environ)
    (other,) = planned(["quickstart-smoke"], tmp_path, minutes=1)
    with pytest.raises(
        UserError, match=r"^quickstart-smoke: .*seed-0: training.max_minutes was 0.5 and is 1.0 now"
    ):
        check([other], 2, os.environ)
    with pytest.raises(UserError, match=r"must be a multiple of ranks x training.accumulation"):
        check(planned(["quickstart-smoke"], tmp_path / "new"), 3, os.environ)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").glob("*.yaml")), ids=str)
def test_shipped_files_of_variants_are_good(path: Path, tmp_path: Path) -> None:
    trials = planned([str(path)], tmp_path)
    assert len({trial.config.model_dump_json() for trial in trials}) == len(trials) > 1


def own(kinds: Kinds) -> set[str]:
    """Those of the package; other tests register more."""
    ours = {name: kinds.config_class(name).__module__ for name in kinds.names()}
    return {name for name, module in ours.items() if module.startswith("ship_ds.")}


def test_the_file_of_all_kinds_has_them_all_and_at_one_width(tmp_path: Path) -> None:
    """But the objective that reads a bank. An override of a section puts its other settings back to
    their defaults, so that a narrower one would lose for its width."""
    trials = planned([str(REPOSITORY / "examples" / "kinds.yaml")], tmp_path)
    models = [trial.config.model for trial in trials]
    parts = [
        part
        for model in models
        for part in getattr(model.hypernetwork, "parts", (model.hypernetwork,))
    ]
    sections = [*parts, *(model.hypernetwork for model in models)]
    assert {section.kind for section in sections} == own(ADAPTERS)
    assert {model.prior.kind for model in models} == own(PRIORS)
    objectives = {name for trial in trials for name in trial.config.loss.weights()}
    assert objectives == own(OBJECTIVES) - {"oracles"}
    [width] = {part.width for part in parts if hasattr(part, "width")}
    assert width == load_config("quickstart").model.hypernetwork.width  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("asked", "stored", "is_the_same"),
    [
        ("zero2_auto", "zero2", True),
        ("zero2_auto", "zero2_bf16", True),
        ("zero2_auto", "zero3", False),
        ("zero2", "zero2_auto", False),
        ("zero2", "zero2_bf16", False),
    ],
)
def test_a_folder_holds_the_file_that_auto_was(
    asked: str, stored: str, is_the_same: bool, kinds: str, tmp_path: Path
) -> None:
    """So a second call goes on, on whichever machine."""
    trial, *_ = planned([kinds], tmp_path / "out", [f"training.deepspeed={asked}"])
    then = trial.config.model_copy(
        update={"training": trial.config.training.model_copy(update={"deepspeed": stored})}
    )
    write_json(trial.folder / "config.json", then.model_dump(mode="json"))
    if is_the_same:
        check([trial], 1, os.environ)
        return
    with pytest.raises(UserError, match=f"deepspeed was {stored} and is {asked} now; set it back"):
        check([trial], 1, os.environ)
