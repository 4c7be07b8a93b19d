"""The config is strict: each mistake is one line that names the key; every shipped recipe
parses."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ship_ds.config import (
    Config,
    LoraHypernetworkConfig,
    LoraTuning,
    LossConfig,
    TaskLlmConfig,
    load_config,
    override_config,
    parse_config,
    recipe_names,
)
from ship_ds.data.task_files import FilesConfig
from ship_ds.errors import UserError
from ship_ds.parsing import parse_yaml

MINIMAL = {"run": {"folder": "runs/x"}, "training": {"steps": 3}}


def _load(tmp_path: Path, *overrides: str) -> object:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return load_config(str(path), overrides)


def _loss(tmp_path: Path, *overrides: str) -> LossConfig:
    loaded = _load(tmp_path, *overrides)
    assert isinstance(loaded, Config)
    return loaded.loss


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses_and_opens_with_its_command(name: str) -> None:
    from importlib import resources

    load_config(name)
    first = (resources.files("ship_ds") / "recipes" / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ") and f"--config {name}" in first


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=3", r"training.stepz: unknown key; did you mean steps\?$"),
        ("steps=3", r"steps: unknown key; did you mean training.steps\?$"),
        ("wholly_other=3", "wholly_other: unknown key$"),
        ("data={kind: files, pathe: x}", r"data.pathe: unknown key; did you mean path\?$"),
        (
            "data={kind: files, path: x, num_seen: 3}",
            r"data.num_seen: unknown key of kind files; one of kind rules has it: give all of the "
            r"section, such as '\{kind: rules, num_seen: \.\.\.\}'$",
        ),
        ("optimizer.lr=1", r"optimizer: unknown key; did you mean optimiser\?$"),
        ("model.task_llm.quantization=nf4", r"unknown key; did you mean quantisation\?$"),
        ("model.latent_siez=3", r"latent_siez: unknown key; did you mean latent_size\?$"),
        ("training.wholly_other=3", "training.wholly_other: unknown key$"),
        ('run.folder="\\ud800"', "run.folder: no Unicode text"),
        ("modle.latent_size=3", "modle: unknown key"),
        ("training.steps=many", "training.steps: .*valid integer"),
        ("training.steps=0", "training.steps: .*greater than 0"),
        ("model.encoder.quantisation=int8", "model.encoder.quantisation: .*'nf4' or 'none'"),
        ("model.encoder.pooling=mean", "model.encoder.pooling: .*'mean'.*'last', 'attention'"),
        ("model.encoder.pooling=3", "model.encoder.pooling: "),
        ("model.encoder.pooling=true", "model.encoder.pooling: true and false"),
        ("model.encoder.pooling={kind: last, num_queries: 2}", "pooling.num_queries: unknown key"),
        (
            "model.encoder.pooling={kind: attention, num_queries: 0}",
            "model.encoder.pooling.num_queries: .*greater than 0",
        ),
        (
            "model.encoder.pooling={kind: attention, num_heads: 1.5}",
            "model.encoder.pooling.num_heads: .*integer",
        ),
        ("model.decoder.pooling=attention", "model.decoder.pooling: unknown key"),
        ("model.decoder.drop_latent=1", "model.decoder.drop_latent: .*less than 1"),
        ("model.decoder.drop_tokens=-0.1", "model.decoder.drop_tokens: .*greater than or"),
        ("model.hypernetwork.kind=ia3", "model.hypernetwork.kind: .*'ia3'"),
        ("model.hypernetwork={kind: lora, targets: []}", "targets: .*at least 1"),
        (
            "model.hypernetwork={kind: lora, heads: per_token}",
            "heads: .*'per_module', 'per_layer', 'per_rank', 'diagonal' or 'square'",
        ),
        (
            "model.task_llm.instruction=loud",
            "model.task_llm.instruction: .*'none', 'hard' or 'soft'",
        ),
        (
            "model.task_llm={instruction: hard, fading_steps: 10}",
            "model.task_llm: fading_steps=10 is for instruction=none",
        ),
        ("model.attention=eager", "model.attention: .*'auto', 'sdpa', 'varlen' or 'flash'"),
        (
            "model.encoder.quantisation=nf4",
            "model.encoder: quantisation=nf4 needs tuning.kind=lora",
        ),
        (
            "model.decoder.quantisation=nf4",
            "model.decoder: quantisation=nf4 needs tuning.kind=lora",
        ),
        (
            "training.accumulation=5",
            r"training.accumulation \(5\) must divide training.tasks_per_step \(24\)",
        ),
        (
            "model.decoder={max_examples: 0, drop_latent: 0.5}",
            "model.decoder.drop_latent needs model.decoder.max_examples",
        ),
        ("training.steps", "an override has the form section.key=value"),
        ("run.folder.name=x", "folder is a value, not a section"),
    ],
)
def test_a_mistake_is_one_line_with_its_key(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        _load(tmp_path, override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1", "expected a mapping"), ("a: [", "not YAML"), ("", "expected a mapping")],
)
def test_file_that_is_no_config_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=true", "training.steps: true and false are no value of it"),
        ("data.num_seen=true", "data.num_seen: true and false"),
        ("optimiser.lr=.inf", "optimiser.lr: Input should be a finite"),
        ("training.threads=-3", "training.threads: "),
        ("data.test_examples=0", "data.test_examples: "),
        ("data.seed=1", "data.seed=1: the embedded model learnt"),
        ("data.form=brackets", "data.form and data.max_value: the embedded model reads"),
        ("data.max_value=99", "data.form and data.max_value: the embedded model reads"),
    ],
)
def test_values_that_mean_nothing_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("quickstart", [override])


def test_what_earlier_versions_wrote_still_opens() -> None:
    """A bundle or a checkpoint of a time when fewer keys existed and training.hang_minutes was
    30."""
    values = load_config("quickstart").model_dump(mode="json")
    values["training"]["hang_minutes"] = 30.0
    del (
        values["training"]["family_alpha"],
        values["optimiser"]["betas"],
        values["data"]["more_compositions"],
    )
    config = parse_config(values, "config.json")
    assert (config.training.family_alpha, config.optimiser.betas, config.data.kind) == (
        1.0,
        (0.9, 0.98),
        "rules",
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.more_compositions=201", "data.more_compositions: .*less than or equal to 200"),
        ("data.more_compositions=-1", "data.more_compositions: "),
        ("training.family_alpha=1.5", "training.family_alpha: "),
        ("optimiser.betas=[0.9]", "optimiser.betas.1: Field required"),
        ("optimiser.betas=[0.9, 1]", "optimiser.betas.1: "),
    ],
)
def test_settings_of_the_quickstart_out_of_their_range_are_one_line(
    override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config("quickstart", [override])
    assert "\n" not in str(error.value)


def test_encoder_and_decoder_take_the_task_llms_base_unless_they_have_their_own() -> None:
    model = load_config("quickstart", ["model.task_llm.base=X", "model.decoder.base=Y"]).model
    assert (model.encoder.base, model.decoder.base, model.task_llm.base) == ("X", "Y", "X")


def test_unknown_source_lists_the_recipes() -> None:
    with pytest.raises(
        UserError,
        match="no such config file, and no recipe of that name; the recipes are .*quickstart",
    ):
        load_config("quikstart")


def test_overrides_reach_their_keys_and_the_last_wins() -> None:
    config = load_config(
        "quickstart-smoke",
        [
            "training.steps=10",
            "optimiser.lr=1e-3",
            "training.steps=11",
            "model.hypernetwork.rank=3",
            "training.max_minutes=null",
            "model.encoder={quantisation: nf4, tuning: {kind: lora, rank: 2}}",
        ],
    )
    assert (config.training.steps, config.optimiser.lr, config.training.max_minutes) == (
        11,
        1e-3,
        None,
    )
    assert (
        isinstance(config.model.hypernetwork, LoraHypernetworkConfig)
        and config.model.hypernetwork.rank == 3
    )
    assert (
        isinstance(config.model.encoder.tuning, LoraTuning)
        and config.model.encoder.tuning.rank == 2
    )


def test_an_item_of_a_list_is_overridden_by_its_place() -> None:
    mixture = "data={kind: mixture, sources: [{path: a, weight: 2}, {path: b}]}"
    config = load_config(
        "smollm2-sni", [mixture, "data.sources.1.path=c", "data.sources.0.split.test_examples=3"]
    )
    first, second = config.data.sources
    assert second.path == "c"
    assert (first.path, first.weight, first.split.test_examples) == ("a", 2, 3)
    assert override_config(config, ["data.sources.1.path=d"]).data.sources[1].path == "d"
    for place in ("2", "-1", "x"):
        with pytest.raises(UserError, match=f"{place} is no place of the list; it has 0 to 1"):
            load_config("smollm2-sni", [mixture, f"data.sources.{place}.path=c"])
    with pytest.raises(UserError, match=r"data.sources.1.path: .*string"):
        load_config("smollm2-sni", [mixture, "data.sources.1.path=3"])


def test_dumped_config_is_read_back_equal(tmp_path: Path) -> None:
    """The bundle holds it as JSON."""
    config = load_config(
        "quickstart", ["model.hypernetwork={kind: soft_prompt, num_virtual_tokens: 3}"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.model_dump_json())
    assert load_config(str(path)) == config


def test_config_cannot_be_changed_after_parsing() -> None:
    config = load_config("quickstart")
    with pytest.raises(ValidationError, match="frozen"):
        config.training.steps = 5  # type: ignore[misc]


def test_reading_a_config_imports_no_torch() -> None:
    program = (
        "import sys; from ship_ds.config import load_config; load_config('quickstart'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=False
        ).returncode
        == 0
    )


def test_a_kl_of_a_number_and_of_a_section_are_one(tmp_path: Path) -> None:
    """config.json keeps the number that older versions read; a section comes back whole."""
    plain, section = _loss(tmp_path, "loss.kl=0.5"), _loss(tmp_path, "loss.kl={weight: 0.5}")
    assert plain == section and plain.model_dump(mode="json")["kl"] == 0.5
    assert _loss(tmp_path).model_dump(mode="json")["kl"] == 1e-3
    whole = _loss(tmp_path, "loss.kl={free_bits: 0.1, warmup_steps: 20}")
    assert (whole.kl.weight, whole.kl.free_bits) == (1e-3, 0.1)
    again = parse_config({**MINIMAL, "loss": whole.model_dump(mode="json")}, "again").loss
    assert again == whole and hash(again) == hash(whole) and hash(plain) != hash(whole)
    added = _loss(tmp_path, "loss.kl=0.5", "loss.kl.free_bits=0.1", "loss.distillation.weight=2")
    assert (added.kl.weight, added.kl.free_bits) == (0.5, 0.1)
    assert added.weights() == {"task": 1, "reconstruction": 1, "kl": 0.5, "distillation": 2}
    answers = _loss(tmp_path, "loss.task=2", "loss.task.mean_over=answers")
    assert (answers.task.weight, answers.task.mean_over) == (2, "answers")
    written = answers.model_dump(mode="json")["task"]
    assert written == {"weight": 2.0, "mean_over": "answers"}
    assert _loss(tmp_path, "loss.task=2").model_dump(mode="json")["task"] == 2.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.kl=-1", "loss.kl.weight: "),
        ("loss.kl=true", "loss"),
        ("loss.task.wieght=1", "loss.task.wieght: unknown key"),
        ("loss.task.mean_over=labels", "loss.task.mean_over: "),
        ("loss.task=-1", "loss.task.weight: "),
        ("loss.kl={free_bit: 1}", "loss.kl.free_bit: unknown key"),
        ("loss.kl={warmup_steps: 3, warmup_share: 0.1}", "loss.kl: .*set one to 0"),
        ("loss.kl={capacity: 1, free_bits: 0.1}", "loss.kl: capacity and free_bits"),
        ("loss.kl={capacity_steps: 3}", "loss.kl: capacity_steps needs capacity"),
        ("loss.distillation={temperature: 0}", "loss.distillation.temperature: "),
        ("loss.contrastive={wieght: 0}", "loss.contrastive.wieght: unknown key"),
        ("model.prior={kind: mixture, num_components: 0}", "model.prior.num_components: "),
    ],
)
def test_a_mistake_in_an_objective_or_prior_is_one_line(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        _load(tmp_path, override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stated", ["hard", "soft"])
def test_a_teacher_that_is_the_student_is_refused(tmp_path: Path, stated: str) -> None:
    """Before a training; what was trained so opens."""
    overrides = (f"model.task_llm.instruction={stated}", "loss.distillation=0.5")
    config = _load(tmp_path, *overrides)
    assert isinstance(config, Config)
    objective = config.loss.objectives()["distillation"]
    with pytest.raises(UserError, match=f"loss.distillation: .*instruction={stated} puts it"):
        objective.check(config.model)
    objective.check(config.model.model_copy(update={"task_llm": TaskLlmConfig()}))


def test_the_kls_schedule_is_a_function_of_the_step(tmp_path: Path) -> None:
    """Linear to the n-th step; named for the log only where it changes anything."""
    assert _loss(tmp_path).scheduled(0, 100) == {}
    steps = _loss(tmp_path, "loss.kl={weight: 0.8, warmup_steps: 4}")
    weights = [steps.weights_at(step, 100) for step in (0, 1, 2, 3, 4, 99)]
    assert [one["kl"] for one in weights] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert all((one["task"], one["reconstruction"]) == (1, 1) for one in weights)
    assert steps.weights()["kl"] == 0.8
    assert steps.scheduled(1, 100) == {"kl_weight": pytest.approx(0.4)}
    share = _loss(tmp_path, "loss.kl={weight: 0.8, warmup_share: 0.25}")
    assert [share.weights_at(step, 16)["kl"] for step in (0, 3, 9)] == pytest.approx(
        [0.2, 0.8, 0.8]
    )
    capacity = _loss(tmp_path, "loss.kl={capacity: 2, capacity_steps: 4}")
    assert capacity.scheduled(2, 100) == {"kl_capacity": pytest.approx(1.5)}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.seed=010", 10),
        ("training.steps=1e3", 1000),
        ("training.steps=1_000", 1000),
        ("optimiser.lr=1e-4", 1e-4),
        ("evaluation.ends_with_report=off", False),
        ("model.task_llm.checkpointing=yes", True),
        ("run.folder=2026-11-26", "2026-11-26"),
        ("run.folder=no", "no"),
    ],
)
def test_yaml_is_read_as_people_mean_it(override: str, value: object) -> None:
    """YAML 1.1 would make 8 of 010, a text of 1e3, false of the folder `no`."""
    config = load_config("quickstart", [override]).model_dump()
    section, *keys = override.partition("=")[0].split(".")
    found = config[section]
    for key in keys:
        found = found[key]
    assert found == value and type(found) is type(value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run: {folder: r}".encode("utf-16"), "byte 0: not UTF-8; save it as UTF-8"),
        (b"run: {folder: caf\xe9}", "byte 17: not UTF-8"),
        (b"run: {foldr: r}", "run.foldr: unknown key; did you mean folder?"),
        (b"runs: {folder: r}\ntraining: {steps: 1}", "runs: unknown key; did you mean run?"),
        (b"run: {folder: r}\nrun: {seed: 1}", "line 2, column 1: the key run is there twice"),
        (b"run:\n  seed: 1\n  seed: 2", "line 3, column 3: the key seed is there twice"),
        (b"run: {folder: r, seed: 1:30}\ntraining: {steps: 1}", "run.seed: Input should be a val"),
        (b"run: " + b"[" * 5000, "nested too deeply"),
        (b"a: &a [*a]", "its aliases"),
        (
            b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + b"".join(
                b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10))
                for i in range(8)
            ),
            "its aliases",
        ),
        (
            b"a: &a {x: 1}\n"
            + b"".join(
                b"%c: &%c {<<: [%s]}\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10))
                for i in range(7)
            ),
            "<< merges in too much",
        ),
        (b"a: &a {x: 1}\nb: {" + b"<<: *a, " * 17 + b"y: 1}", "<< merges in too much"),
        (b"run: {seed: " + b"9" * 5000 + b"}", "thousands of digits"),
        (b"a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (b"a: !!bool maybe", "cannot be read as what it is tagged to be"),
        (b"? [1, 2]\n: 3", "a key has to be a text"),
        (b"run: {folder: r}\ntraining: {steps: 1}\n1: 2", "Keys should be strings"),
        (b"", "got nothing"),
    ],
)
def test_a_file_that_is_no_usable_yaml_is_one_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and message in text and "\n" not in text


def test_a_name_that_no_file_can_have_is_no_config() -> None:
    with pytest.raises(UserError, match="no such config file, and no recipe of that name"):
        load_config("run: {folder: r}" * 100)


def test_a_file_that_may_not_be_looked_at_is_not_taken_for_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", "own.yaml")

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(PermissionError):
        load_config("own.yaml")


def test_what_yaml_merges_in_gives_way() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: [*b, *a], z: 3}"
    assert parse_yaml(text, "")["c"] == {"x": 1, "y": 2, "z": 3}


@pytest.mark.parametrize("value", [r'"\UFFFFFFFF"', r'"\U00110000"', "!!float", "!!float _"])
def test_a_value_that_pyyaml_stumbles_over_is_one_line(value: str) -> None:
    """Found by `make fuzz`: an OverflowError of `chr`; then an IndexError of an empty float."""
    with pytest.raises(UserError, match=r"^here: not YAML: .* no letter of Unicode's$"):
        parse_yaml(f"a: {value}", "here")


@pytest.mark.parametrize("key", ["model.system_message", "model.hypernetwork.targets", "data.path"])
def test_half_a_surrogate_pair_is_no_value(key: str) -> None:
    """Else the config is read, and fails where it is written."""
    with pytest.raises(UserError, match=f"{key}: no Unicode text"):
        load_config("quickstart", [rf'{key}="\uD800"'])


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes("\ufeffrun:\r\n  folder: r\r\ntraining: {steps: 1}\r\n".encode())
    assert load_config(str(path)).run.folder == "r"


def test_home_and_variables_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    overrides = ["run.folder=~/r", "data={path: '${DATA}/t'}", "model.task_llm.base=$HOME/m"]
    config = load_config("quickstart", overrides)
    assert (config.run.folder, config.model.task_llm.base) == ("/home/me/r", "/home/me/m")
    assert isinstance(config.data, FilesConfig) and config.data.path == "/data/t"
    for path, message in (
        ("$NOWHERE_AT_ALL/r", "there is no environment variable NOWHERE_AT_ALL"),
        ("~nobody_at_all/r", "there is no such user's home"),
    ):
        with pytest.raises(UserError, match=f"run.folder: .*{message}"):
            load_config("quickstart", [f"run.folder={path}"])


@pytest.mark.parametrize("seed", [-1, 10**12, 2**63, 10**30])
def test_a_seed_that_torch_would_refuse_later_is_refused_now(seed: int) -> None:
    with pytest.raises(UserError, match=r"run\.seed: Input should be"):
        load_config("quickstart", [f"run.seed={seed}"])


def test_one_target_is_a_list_of_one() -> None:
    config = load_config("quickstart", ["model.hypernetwork.targets=all-linear"])
    assert config.model.hypernetwork.model_dump()["targets"] == ("all-linear",)
