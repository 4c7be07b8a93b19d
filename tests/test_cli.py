"""The verbs as a user types them: output, one line for bad input, exit codes."""

import json
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from safetensors.numpy import save_file

import ship_ds
from ship_ds import cli, doctor
from ship_ds.cli import verb
from ship_ds.cli.verb import _one_value_each, _refuse_unknown
from ship_ds.config import load_config, oracle_settings, recipe_names
from ship_ds.errors import UserError
from ship_ds.files import Manifest, write_json
from ship_ds.oracle_bank import OracleBank
from ship_ds.origin import Origin
from tests.conftest import REPOSITORY, start


def test_recipes_show_each_with_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all("ship_ds" in line and f"--config {line.split()[0]}" in line for line in lines)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_good_config(name: str) -> None:
    assert load_config(name).run.folder.startswith("runs/")


def test_doctor_says_what_is_missing_where_nothing_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    found = {name: value for name, value, _ in doctor.findings()}
    assert all(
        found[name] is None for name in ("torch", "CUDA", "deepspeed", "bitsandbytes", "flash-attn")
    )


def test_doctor_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    optional = ("peft", "gguf", "fastapi", "cores, memory")
    parts = ("torch", "CUDA", "compiler", "deepspeed", "bitsandbytes", "flash-attn", "Slurm")
    for part in (*parts, *optional):
        assert part in shown


@pytest.mark.parametrize(("has_bf16", "start"), [(True, "ok  "), (False, "none")])
def test_doctor_says_whether_the_processor_has_bf16(
    has_bf16: bool, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "processor_multiplies_in_bf16", lambda: has_bf16)
    rows = [row for row in doctor.lines() if row[6:].startswith("bf16 on the CPU ")]
    assert len(rows) == 1 and rows[0].startswith(start)
    assert ("zero2_auto" in rows[0]) is not has_bf16


def test_data_describes_a_file_of_our_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [
        {
            "id": f"t{i}",
            "instruction": f"add {i}",
            "examples": [{"input": str(n), "target": str(n + i)} for n in range(4)],
        }
        for i in range(3)
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["data", str(tmp_path / "tasks.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tasks"], found["examples"]) == (3, 12) and len(found["samples"]) == 3
    assert cli.main(["data", str(tmp_path / "tasks.jsonl")]) == 0
    assert "add 1" in capsys.readouterr().out


@dataclass(frozen=True)
class Bad:
    """Arguments that are wrong, and what the one line about them has to name."""

    arguments: str
    names: str


NOWHERE = [
    Bad("train --config nowhere", "nowhere: no such config file, and no recipe"),
    Bad("train --config quickstart training.stepz=3", "training.stepz: unknown key"),
    Bad("train --config quickstart training.steps", "section.key=value"),
    Bad("train --config quickstart training.deepspeed=zero9", "ds_configs/ has cpu"),
    Bad("train --config quickstart model.task_llm.base=FOLDER", "model.task_llm.base: "),
    Bad(f"train --config {'a' * 300}", f"{'a' * 300}: no such config file, and no recipe"),
    Bad(f"deduce it --run {'a' * 300} --out OUT", "File name too long"),
    Bad(f"explain {'a' * 300} --run RUN", "File name too long"),
    Bad("plan --config quickstart --input-tokens 99999999999999999999", "--input-tokens"),
    Bad("oracles --config quickstart --out OUT --examples-per-step 10001", "--examples-per-step"),
    Bad("answer it 1 --run RUN --beams 100000", "--beams"),
    Bad("train --config quickstart run.folder=/proc/x", "run.folder: /proc/x"),
    Bad(
        "train --config pretrain-7b data.path=nowhere model.task_llm.base=embedded",
        "data.path: nowhere",
    ),
    Bad("train", "missing option '--config'"),
    Bad("train --config quickstart run.init_from=nowhere", "nowhere: no bundle here"),
    Bad("plan --config nowhere", "nowhere: no such config file"),
    Bad("plan --config pretrain-7b", "model.encoder.base: "),
    Bad(
        "train --config smollm2-sni-shots",
        "bases/smollm2: expected a model folder with a config.json; `ship-ds base smollm2 --out "
        "bases/smollm2` makes it",
    ),
    Bad("plan --config pretrain-7b --shapes gpt", "--shapes gpt: unknown; known are llama"),
    Bad("plan --config quickstart --gpus 7", "must be a multiple of ranks"),
    Bad("plan --config quickstart training.deepspeed=zero9", "ds_configs/ has cpu"),
    Bad("plan --config pretrain-7b --gpus 0", "'--gpus'"),
    Bad("plan --config pretrain-7b --gpu-memory nan", "--gpu-memory: nan"),
    Bad("compare --out OUT", "missing argument"),
    Bad("compare quickstart", "missing option '--out'"),
    Bad("compare nowhere --out OUT", "nowhere: no such config file, and no recipe"),
    Bad("compare training.steps=3 --out OUT", "compare: name a recipe, a config or a file"),
    Bad("compare quickstart training.stepz=3 --out OUT", "training.stepz: unknown key"),
    Bad("compare quickstart-smoke --out OUT", "--minutes: give it, since"),
    Bad("compare quickstart quickstart --out OUT", "two variants are called 'quickstart'"),
    Bad("compare quickstart --out OUT --minutes 0", "--minutes: 0"),
    Bad("compare quickstart --out OUT --minutes nan", "--minutes: nan"),
    Bad("compare quickstart --out OUT --seeds 0,x", "--seeds 0,x: expected numbers"),
    Bad("compare quickstart --out OUT --nproc 0", "'--nproc'"),
    Bad("compare quickstart --out OUT --nproc 7", "quickstart: training.tasks_per_step (24) must"),
    Bad("compare quickstart --out OUT --parts all", "--parts: "),
    Bad("compare quickstart --out OUT --num-tasks 0", "--num-tasks: "),
    Bad(
        "compare quickstart --out OUT --methods ship,tagii", "--methods: there is no method 'tagii'"
    ),
    Bad("compare quickstart --out OUT --methods tagi,sft", "--methods: ship is missing"),
    Bad("compare quickstart --out OUT --budget hours", "--budget: "),
    Bad("compare quickstart --out OUT --set sft=3", "--set: sft=3: a change has the form METHOD"),
    Bad("compare quickstart --out OUT --set sft.lrr=3", "--set sft.lrr: "),
    Bad("compare quickstart --out OUT --set itd.lr=x --dry-run", "--set itd.lr: "),
    Bad("compare quickstart --out OUT --device gpu", "device gpu: expected auto"),
    Bad("compare VARIANTS --out OUT", "variants.yaml: seed: unknown key"),
    Bad("compare pretrain-7b --minutes 1 --out OUT", "pretrain-7b: model.task_llm.base: "),
    Bad("oracles --config nowhere --out OUT", "nowhere: no such config file, and no recipe"),
    Bad("oracles --config quickstart", "missing option '--out'"),
    Bad("oracles --config quickstart --out FOLDER", "already there"),
    Bad("oracles --config quickstart --out OUT --lr 0", "--lr: 0"),
    Bad("oracles --config quickstart --out OUT --steps 0", "'--steps'"),
    Bad("oracles --config quickstart --out OUT --examples-per-step 0", "'--examples-per-step'"),
    Bad("oracles --config quickstart --out OUT --device gpu", "device gpu: expected auto"),
    Bad(
        "oracles --config quickstart --out OUT model.hypernetwork.kind=prefix",
        "oracles are LoRAs, and model.hypernetwork generates none",
    ),
    Bad(
        "oracles --config quickstart --out OUT model.task_llm.instruction=hard",
        "model.task_llm.instruction=hard states it",
    ),
    Bad(
        "oracles --config quickstart --out OUT model.task_llm.base=FOLDER",
        "model.task_llm.base: ",
    ),
    Bad("oracles --config quickstart --out OUT 'data={path: nowhere}'", "data.path: nowhere"),
    Bad("train --config quickstart loss.oracles=0.1", "loss.oracles.bank: "),
    Bad("train --config quickstart loss.oracles.bank=nowhere", "nowhere: no bank of oracles here"),
    Bad("train --config quickstart loss.oracles.bank=ORACLES", "model.hypernetwork.rank=2, and"),
    Bad(
        "train --config quickstart model.hypernetwork.kind=prefix loss.oracles.bank=ORACLES",
        "loss.oracles: oracles are LoRAs",
    ),
    Bad("supply propse --run RUN --out a.jsonl", "expected one of propose"),
    Bad("supply propose --run RUN --out a.txt", "expected a name that ends in .jsonl"),
    Bad("supply propose --run RUN --out a.jsonl --set max_rogue=1", "--set max_rogue"),
    Bad("supply chains --run RUN --out a.jsonl --set num_inputs=0", "--set num_inputs"),
    Bad("supply compress --run RUN --out a.jsonl --data ROWS", "line 1"),
    Bad("supply disagreement --run nowhere --out a.jsonl", "nowhere: no bundle here"),
    Bad("deduce x --run nowhere --out OUT", "nowhere: no bundle here"),
    Bad("deduce x --run FOLDER --out OUT", "no bundle here"),
    Bad("deduce x --run CUT --out OUT", "ship.safetensors has "),
    Bad("deduce x --file FILE --run RUN --out OUT", "give one of an instruction, --file"),
    Bad("deduce --run RUN --out OUT", "give one of an instruction, --file"),
    Bad("deduce --inputs FILE --examples FILE --run RUN --out OUT", "give one of an instruction"),
    Bad("deduce --inputs nowhere --run RUN --out OUT", "nowhere: cannot be read"),
    Bad("deduce --file nowhere --run RUN --out OUT", "nowhere: no such file"),
    Bad("deduce --file EMPTY --run RUN --out OUT", "has no instructions"),
    Bad("deduce --latent OTHER --run RUN --out OUT", "made with another run's weights"),
    Bad("deduce --latent FILE --run RUN --out OUT", "not a latent file"),
    Bad("deduce --latent nowhere --run RUN --out OUT", "nowhere: not a latent file"),
    Bad("deduce x --run RUN --out FOLDER", "already there"),
    Bad("deduce x --run RUN --out OUT --pad-to 0", "'--pad-to'"),
    Bad("deduce x --run RUN --out OUT --rum", "no option --rum; did you mean --run?"),
    Bad("compose --part x y --run RUN --out OUT", "--part x: expected a weight"),
    Bad("compose --part 0.5 --run RUN --out OUT", "--part 0.5: expected a weight"),
    Bad("compose --part inf y --run RUN --out OUT", "--part inf: expected a weight"),
    Bad("compose --part 1 y --run nowhere --out OUT", "nowhere: no bundle"),
    Bad("compose --part 1 y --run RUN --out FOLDER", "already there"),
    Bad("compose --part 1 y --run RUN --out OUT --rank 0", "'--rank'"),
    Bad("compose --run RUN --out OUT", "missing option '--part'"),
    Bad("tune --run nowhere --from x --data PAIRS --out OUT", "nowhere: no bundle"),
    Bad("tune --run RUN --data PAIRS --out OUT", "missing option '--from'"),
    Bad("tune --run RUN --from x --data nowhere --out OUT", "nowhere: cannot be read"),
    Bad("tune --run RUN --from x --data FILE --out OUT", "line 1: expected a JSON object"),
    Bad("tune --run RUN --from x --data PAIRS --out FOLDER", "already there"),
    Bad("tune --run SOFT --from x --data PAIRS --out OUT", "this run's adapters are no LoRAs"),
    Bad("tune --run RUN --from x --data PAIRS --out OUT --steps 0", "'--steps'"),
    Bad("tune --run RUN --from x --data PAIRS --out OUT --lr 0", "--lr: 0"),
    Bad("tune --run RUN --from x --data PAIRS --out OUT --eval-share 1", "--eval-share: 1"),
    Bad("tune --run RUN --from x --data PAIRS --out OUT --eval-share nan", "--eval-share: nan"),
    Bad("tune --run RUN --from x --data PAIRS --out OUT --dtype half", "dtype half: expected auto"),
    Bad("answer x 1 --run nowhere", "nowhere: no bundle"),
    Bad("answer x 1 --run LOST", "model.task_llm.base: no/such/base: expected a model folder"),
    Bad("answer x --run RUN", "standard input: is empty"),
    Bad("answer x --file nowhere --run RUN", "nowhere: cannot be read"),
    Bad("answer x 1 --run RUN --beams 0", "'--beams'"),
    Bad("answer x 1 --file FILE --run RUN", "answer: give one of INPUT and --file"),
    Bad("answer --run RUN", "missing argument 'instruction'"),
    Bad("serve", "missing option '--run'"),
    Bad("serve --run nowhere", "nowhere: no bundle"),
    Bad("serve --run CUT", "ship.safetensors"),
    Bad("serve --run RUN --host 0.0.0.0", "SHIP_DS_API_KEY"),
    Bad("serve --run RUN --host no.such.host.invalid --api-key k", "--host"),
    Bad("serve --run RUN --port 65536", "'--port'"),
    Bad("serve --run RUN --max-wait 0", "--max-wait: 0: expected a number above zero"),
    Bad("induce --run nowhere --file PAIRS", "nowhere: no bundle"),
    Bad("induce --run RUN", "standard input: is empty"),
    Bad("induce --run RUN --file FILE", "line 1: expected a JSON object"),
    Bad("induce --run RUN --file FOLDER", "cannot be read"),
    Bad("induce --run RUN --file PAIRS --method best", "'--method'"),
    Bad("induce --run RUN --file PAIRS --candidates 0", "'--candidates'"),
    Bad("explain nowhere --run RUN", "nowhere: no such folder"),
    Bad(
        "explain FOLDER --run RUN", "no adapter here (no adapter_config.json); give it to --merged"
    ),
    Bad("explain --merged FOLDER --run RUN", "no merged model here (no config.json)"),
    Bad("explain --run RUN", "give one of a PEFT folder and --merged"),
    Bad("explain FOLDER --merged FOLDER --run RUN", "give one of a PEFT folder and --merged"),
    Bad("explain FOLDER --run RUN --input 1 --file FILE", "give one of --input and --file"),
    Bad("explain FOLDER --run RUN --file nowhere", "nowhere: cannot be read"),
    Bad("explain FOLDER --run nowhere", "nowhere: no bundle"),
    Bad("explain FOLDER --run RUN --set num_viewz=1", "--set num_viewz: unknown key"),
    Bad("induce --run RUN --file PAIRS --seed x", "'--seed'"),
    Bad("induce --run RUN --file PAIRS --set num_viewz=1", "--set num_viewz: unknown key"),
    Bad("induce --run RUN --file PAIRS --set num_views=0", "--set num_views: "),
    Bad("induce --run RUN --file PAIRS --set num_views", "section.key=value"),
    Bad("reason 1 --run RUN --file PAIRS --set steps=true", "--set steps"),
    Bad(
        "config modle",
        "config: there is no section and no setting 'modle'; the sections are run, data",
    ),
    Bad("reason 1 --run nowhere --file PAIRS", "nowhere: no bundle"),
    Bad("reason 1 --run RUN --file nowhere", "nowhere: cannot be read"),
    Bad("reason 1 --run RUN --file PAIRS --rounds 0", "'--rounds'"),
    Bad("reason --run RUN --file PAIRS", "missing argument 'INPUT...'"),
    Bad("data nowhere", "nowhere: no such file or folder"),
    Bad("data FOLDER", "holds no passage of 24 words or more"),
    Bad("data FILE --format csv", "csv: no such format"),
    Bad("data ROWS --format jsonl", "line 1: not JSON"),
    Bad("data FILE --max-input-words 0", "'--max-input-words'"),
    Bad("evaluate --run nowhere", "nowhere: no bundle"),
    Bad("evaluate --run FOLDER", "no bundle here"),
    Bad("evaluate --run RUN --methods magic", "--methods: there is no method 'magic'"),
    Bad("evaluate --run RUN --num-shown many", "--num-shown: "),
    Bad("evaluate --run RUN --minutes 0", "--minutes: "),
    Bad("plot --run nowhere", "nowhere: no such folder"),
    Bad("plot --run RUN --runs RUN nowhere", "nowhere: no such folder"),
    Bad("recipes --all", "recipes: no option --all"),
    Bad("doctor now", "got unexpected extra argument"),
    Bad("merge nowhere --out OUT", "nowhere: no ship.json"),
    Bad("merge FOLDER --out OUT", "no ship.json"),
    Bad("merge ADAPTER --out OUT --base nowhere", "--base: nowhere: expected a model folder"),
    Bad("merge ADAPTER --out OUT", "no/such/base: expected a model folder"),
    Bad("merge ADAPTER --out FOLDER --base embedded", "already there"),
    Bad("merge ADAPTER --out OUT --target nf5", "'nf5' is not one of 'original'"),
    Bad("merge ADAPTER --out OUT --dtype int8", "'--dtype'"),
    Bad("merge ADAPTER --out OUT --shard-gigabytes 0", "--shard-gigabytes: 0"),
    Bad("base nowhere --out OUT", "nowhere: no such file; give a .gguf file, or smollm2"),
    Bad("base FILE --out OUT", "not a GGUF file: it does not begin with the letters GGUF"),
    Bad("base smollm2 --out FOLDER", "already there"),
    Bad("base smollm2", "missing option '--out'"),
    Bad("bundle nowhere --out OUT", "nowhere: no checkpoint here"),
    Bad("bundle FOLDER --out OUT", "no checkpoint here"),
    Bad("bundle CHECKPOINT --out FOLDER", "already there"),
    Bad("convert nowhere --out OUT", "nowhere: no such folder"),
    Bad("convert FOLDER --out OUT", "no checkpoint here"),
    Bad("convert RUN --out OUT --file nowhere", "nowhere: no such file"),
    Bad("convert RUN --out OUT --base nowhere", "--base: nowhere"),
    Bad("convert RUN --out OUT --file x --instruction y", "give --instruction or --file, not both"),
    Bad("convert RUN --out OUT --instruction ''", "convert: --instruction: is empty"),
    Bad("convert RUN --out OUT --target nf5", "'nf5' is not one of"),
    Bad("convert RUN --out OUT --compute-dtype half", "dtype half: expected auto, bfloat16 or"),
    Bad("deduce x --run RUN --out OUT --device gpu", "device gpu: expected auto, cpu, cuda or"),
    Bad("compose --part 1 y --run RUN --out OUT --device gpu", "device gpu: expected auto"),
    Bad("answer x 1 --run RUN --dtype float16", "dtype float16: expected auto, bfloat16 or"),
    Bad("induce --run RUN --file PAIRS --device cuda:x", "device cuda:x: expected auto"),
    Bad("reason 1 --run RUN --file PAIRS --dtype half", "dtype half: expected auto"),
    Bad("evaluate --run RUN --device gpu", "device gpu: expected auto"),
    Bad("plot --run RUN --dtype half", "dtype half: expected auto"),
    Bad("trane", "no such command 'trane'"),
    Bad("", "which verb?"),
    Bad("--vresion", "no such option: --vresion"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of every case of NOWHERE, in one process."""
    folder = tmp_path_factory.mktemp("bad")
    places = make_places(folder)
    cases = [
        [re.sub(r"[A-Z]{3,}", lambda m: str(places.get(m[0], m[0])), part) for part in parts]
        for parts in (shlex.split(bad.arguments) for bad in NOWHERE)
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    done = start(["-m", "tests.bad_input", str(folder / "cases.json")])
    assert done.returncode == 0 and not done.stderr, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def make_places(folder: Path) -> dict[str, Path]:
    """What the cases name in capitals: a bundle that can be checked but holds no weights, and so
    on."""
    places = {
        name: folder / name.lower()
        for name in (
            "RUN CUT LOST SOFT OUT FOLDER FILE ROWS EMPTY PAIRS OTHER ADAPTER CHECKPOINT "
            "ORACLES".split()
        )
    }
    places["VARIANTS"] = folder / "variants.yaml"
    places["VARIANTS"].write_text("config: quickstart\nseed: 1\nvariants: {a: }\n")
    for name in ("RUN", "CUT", "LOST", "SOFT", "FOLDER", "ADAPTER", "CHECKPOINT", "ORACLES"):
        places[name].mkdir()
    (places["FOLDER"] / "notes.txt").write_text("nothing of ours")
    for name in ("RUN", "CUT", "LOST", "SOFT"):
        base = "no/such/base" if name == "LOST" else "embedded"
        kind = "soft_prompt" if name == "SOFT" else "lora"
        config = load_config(
            "quickstart-smoke",
            [f"model.task_llm.base={base}", f"model.hypernetwork.kind={kind}"],
        )
        write_json(places[name] / "config.json", config.model_dump(mode="json"))
        (places[name] / "ship.safetensors").write_text("weights")
        write_json(places[name] / "prompt_format.json", {})
        Manifest.of(places[name]).write(places[name])
    (places["CUT"] / "ship.safetensors").write_text("wei")
    places["FILE"].write_text("reverse the list\n")
    places["ROWS"] = places["ROWS"].with_suffix(".jsonl")
    places["ROWS"].write_text("reverse the list\n")
    places["EMPTY"].write_text("\n")
    places["PAIRS"].write_text('{"input": "3 9 5", "target": "9 5"}\n')
    save_file(
        {"latent_TZ": np.zeros((1, 64), np.float32)}, places["OTHER"], {"bundle": "of another"}
    )
    proof = {"from_live": 0.0, "from_base": 1.0}
    empty: dict[str, Any] = {"prompt_format": {}, "probes": [], "proof": proof}
    origin = dict.fromkeys((field.name for field in fields(Origin)), "") | empty
    needless = {"tuning": None, "confidence": None, "folders": []}
    write_json(places["ADAPTER"] / "ship.json", origin | needless | {"base": "no/such/base"})
    write_json(places["CHECKPOINT"] / "progress.json", {})
    quickstart = load_config("quickstart", ["model.hypernetwork.rank=2"])
    bank = OracleBank(
        made_for=oracle_settings(quickstart.model), trained={}, sites={}, tasks={}, group_size=1
    )
    write_json(places["ORACLES"] / "bank.json", bank.model_dump(mode="json"))
    Manifest.of(places["ORACLES"]).write(places["ORACLES"])
    return places


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(NOWHERE)), ids=[bad.arguments for bad in NOWHERE])
def test_bad_input_is_one_line_at_once(outcomes: list[dict[str, Any]], index: int) -> None:
    """On standard error alone, with exit code 2, and before torch is imported."""
    outcome = outcomes[index]
    assert (outcome["code"], outcome["out"]) == (2, ""), outcome
    assert outcome["err"].count("\n") == 1 and outcome["err"].startswith("ship-ds: "), outcome
    assert NOWHERE[index].names in outcome["err"], outcome["err"]
    assert not outcome["torch"], "torch was imported before the input was checked"


def test_every_verb_has_bad_input() -> None:
    verbs = {str(verb.name or verb.callback.__name__) for verb in cli.app.registered_commands}
    assert {bad.arguments.partition(" ")[0] for bad in NOWHERE} >= verbs


def test_verbs_are_in_panels_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    places = [shown.index(f"─ {panel} ─") for panel in ("Train", "Use", "Inspect", "Convert")]
    assert places == sorted(places) and "75: preempted" in shown


def test_help_and_page_have_the_same_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = re.findall(r"^ *(\d+): ", capsys.readouterr().out, re.MULTILINE)
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    assert shown == re.findall(r"^\| (\d+) \|", page, re.MULTILINE)
    [bad_input] = re.findall(r"^\| 2 \| (.+?) \|", page, re.MULTILINE)
    assert bad_input in verb.EXIT_CODES


def test_compose_says_what_a_sum_is_no_substitute_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the figures of the page that measured them."""
    monkeypatch.setenv("COLUMNS", "1000")
    assert cli.main(["compose", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    page = " ".join((REPOSITORY / "docs" / "serving.md").read_text().split())
    for figure in ("74 unseen rules", "671 steps", "2026-11-26", "0.200 of the inputs", "0.511"):
        assert figure in shown and figure in page, figure


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ship-ds {ship_ds.__version__}\n"


def test_option_takes_several_values_and_texts_that_begin_with_a_hyphen() -> None:
    options = {"--probe", "--run", "--json"}
    given = ["answer", "-3 4", "--probe", "a", "-1", "b", "--run", "r", "x"]
    assert list(_one_value_each(given, options)) == [
        *("answer", "-3 4", "--probe", "a", "--probe", "-1", "--probe", "b", "--run", "r", "x")
    ]
    given = ["--probe=a", "b", "--run=r", "x", "--probe", "c=d", "--json"]
    assert list(_one_value_each(given, options)) == [
        *("--probe=a", "--probe", "b", "--run=r", "x", "--probe", "c=d", "--json")
    ]
    _refuse_unknown(given, options, "ship-ds answer")
    with pytest.raises(UserError, match="answer: no option --probes; did you mean --probe?"):
        _refuse_unknown(["--probes", "a"], options, "ship-ds answer")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["recipes"], ["doctor"], ["config"], ["data", "FILE"], ["--version"], ["--help"]]
)
def test_what_needs_no_torch_imports_none(arguments: list[str], tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    examples = [{"input": str(n), "target": str(n + 1)} for n in range(4)]
    tasks.write_text(json.dumps({"id": "t", "instruction": "add 1", "examples": examples}) + "\n")
    given = [str(tasks) if part == "FILE" else part for part in arguments]
    program = (
        f"import sys; from ship_ds import cli; code = cli.main({given!r}); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = start(["-c", program])
    assert done.returncode == 0 and done.stdout, done.stderr


def test_choices_are_those_of_the_library() -> None:
    """The verbs name them again, since the library's own are beside code that needs torch."""
    from ship_ds.cli import converting, using
    from ship_ds.export.merge import MergedDtype
    from ship_ds.export.targets import TargetName
    from ship_ds.inference.config import InductionMethod

    assert tuple(target.value for target in converting.MergeTarget) == get_args(TargetName)
    assert get_args(get_args(converting.MergedDtypeOption)[0]) == get_args(MergedDtype)
    assert set(get_args(get_args(using.MethodOption)[0])) == set(get_args(InductionMethod))


def test_an_interrupt_from_the_keyboard_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a training, what goes on; of another verb, the line alone."""

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ship_ds.train.main", interrupted)
    monkeypatch.setattr("ship_ds.config.recipe_names", interrupted)
    monkeypatch.setattr("ship_ds.runtime.ranks._ignore_interrupts", lambda: None)
    assert cli.main(["recipes"]) == 130
    assert capsys.readouterr().err.strip() == "ship-ds: interrupted"
    monkeypatch.undo()
    monkeypatch.setattr("ship_ds.train.main", interrupted)
    monkeypatch.setattr("ship_ds.runtime.ranks._ignore_interrupts", lambda: None)
    assert cli.main(["train", "--config", "quickstart-smoke"]) == 130
    assert capsys.readouterr().err.startswith("ship-ds: interrupted: the same command goes on")
