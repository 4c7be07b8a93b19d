"""`ship-ds evaluate` on the smoke run: every cell, resumption, ranks."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ship_ds import cli
from ship_ds.cli import checks
from ship_ds.console import no_log
from ship_ds.data.task_files import FilesConfig, parse_benchmark
from ship_ds.errors import UserError
from ship_ds.evaluation.baselines.tagi import Tagi
from ship_ds.evaluation.budgets import AnsweredExamples, Budget, Minutes, UntilDevStops
from ship_ds.evaluation.config import METHOD_NAMES, EndpointConfig, HarnessConfig
from ship_ds.evaluation.evaluate import evaluate
from ship_ds.evaluation.harness import Harness, Run, results_name
from ship_ds.evaluation.method import Setting
from ship_ds.evaluation.methods import METHODS
from ship_ds.evaluation.methods.icl import InContextLearning
from ship_ds.evaluation.questions import ask, tasks_of
from ship_ds.evaluation.report import confidence
from ship_ds.files import Manifest
from ship_ds.inference.deduction import answer_stated
from ship_ds.inference.proposals import asked_texts, without_preamble
from ship_ds.model.language_model import LanguageModel
from tests.conftest import start

DIRECTIONS = {
    "ship": ["deduction", "induction", "reasoning", "reconstruction"],
    "ship_confidence": ["deduction"],
    "nearest_known": ["induction", "reasoning"],
    "retrieval": ["induction", "reasoning"],
    "prompting": ["deduction"],
    "icl": ["reasoning"],
    "instruction_induction": ["induction"],
    "random_decode": ["induction"],
    "bare_base": ["deduction"],
    "shuffled_instruction": ["deduction"],
    "neighbour_instruction": ["deduction"],
    "majority_label": ["deduction"],
}
SMALL = HarnessConfig(methods=tuple(DIRECTIONS), num_tasks=2)
ABOUT = ("instruction_in_query", "sees_labels", "about")


def fresh(run: Path, folder: Path) -> Path:
    """The run without what it was evaluated to."""
    shutil.copytree(
        run, folder, ignore=shutil.ignore_patterns("checkpoints", "evaluation", "tensorboard")
    )
    return folder


def measure(run: Path, config: HarnessConfig) -> tuple[dict[str, Any], list[str]]:
    """The report, and the cells that were measured for it in this call."""
    said: list[str] = []
    report = evaluate(run, config, ["evaluate"], said.append)
    return report, [line for line in said if " tasks, " in line or "measured again" in line]


@pytest.fixture(scope="module")
def evaluated(one_rank_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = fresh(one_rank_run, tmp_path_factory.mktemp("evaluated") / "run")
    measure(run, SMALL)
    return run


def test_report_has_the_layout_of_every_method(evaluated: Path) -> None:
    report = json.loads((evaluated / "evaluation" / "report.json").read_text())
    assert list(report["methods"]) == [name for name in METHODS if name in DIRECTIONS]
    for name, directions in DIRECTIONS.items():
        method = report["methods"][name]
        assert [key for key in method if key not in ABOUT] == directions, name
        assert method["instruction_in_query"] is (name == "prompting")
        for direction in directions:
            for part in ("seen", "unseen"):
                cell = method[direction][part]
                metrics = ["exact_match", "rouge_l"]
                if direction == "induction":
                    metrics += ["execution_accuracy", "execution_accuracy_encoder"]
                if direction == "reasoning" and name in ("ship", "nearest_known"):
                    metrics += ["exact_match_found", "exact_match_stated"]
                for metric in metrics:
                    low, high = cell[metric]["ci95"]
                    assert 0 <= low <= cell[metric]["value"] <= high <= 1, (
                        name,
                        direction,
                        part,
                        metric,
                    )
                asked = {"induction": 10, "reconstruction": 1}.get(direction, 3)
                assert (cell["n_tasks"], cell["n_examples"]) == (2, 2 * asked)
    assert report["command"] == "ship-ds evaluate" and "torch" in report["versions"]


def test_kinds_of_unseen_tasks_add_up(evaluated: Path) -> None:
    cells = json.loads((evaluated / "evaluation" / "report.json").read_text())["methods"][
        "prompting"
    ]["deduction"]
    kinds = [cell for part, cell in cells.items() if part.startswith("unseen_")]
    assert kinds and sum(cell["n_tasks"] for cell in kinds) == cells["unseen"]["n_tasks"]


def test_every_task_has_a_line_and_a_row(evaluated: Path) -> None:
    rows = [
        json.loads(line)
        for line in (evaluated / "evaluation" / "tasks.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 4 * sum(map(len, DIRECTIONS.values()))
    named = next(
        row for row in rows if row["method"] == "nearest_known" and row["direction"] == "induction"
    )
    assert isinstance(named["said"], str) and len(named["execution_accuracy"]) == 10
    page = (evaluated / "evaluation" / "report.md").read_text()
    assert "| prompting | yes |" in page and "| icl | no |" in page
    assert all(f"| {row['part']} | {row['instruction']} |" in page for row in rows)


def test_the_report_says_what_agreement_is_worth(evaluated: Path) -> None:
    report = json.loads((evaluated / "evaluation" / "report.json").read_text())
    cell = report["methods"]["ship_confidence"]["deduction"]["seen"]
    assert 0 <= cell["agreement"]["value"] <= 1
    assert cell["confidence"].keys() == {"auc_tasks", "auc_answers"}
    assert cell["exact_match"] == report["methods"]["ship"]["deduction"]["seen"]["exact_match"]
    row = {"exact_match": [1, 0], "agreement": [0.9, 0.5]}
    other = {"exact_match": [0, 0], "agreement": [0.6, 0.6]}
    assert confidence([row, other]) == {"auc_tasks": 1.0, "auc_answers": 1.0}
    assert confidence([row]) == {"auc_tasks": None, "auc_answers": 1.0}


def test_nothing_is_measured_twice(evaluated: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    before = json.loads((run / "evaluation" / "report.json").read_text())
    report, measured = measure(run, SMALL)
    assert measured == [] and report["methods"] == before["methods"]
    (run / "evaluation" / "cells" / "prompting.deduction.unseen.json").unlink()
    report, measured = measure(run, SMALL)
    assert [line.split(":")[0] for line in measured] == ["prompting.deduction.unseen"]
    assert report["methods"] == before["methods"]


def test_cell_of_another_bundle_or_setting_is_measured_again_and_says_so(
    evaluated: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    path = run / "evaluation" / "cells" / "prompting.deduction.seen.json"
    stored = json.loads(path.read_text())
    stored["fingerprint"]["bundle"] = "another"
    path.write_text(json.dumps(stored))
    config = SMALL.model_copy(update={"methods": ("prompting",)})
    _, measured = measure(run, config)
    assert (
        measured[0]
        == "prompting.deduction.seen: measured again, since it was measured with another bundle"
    )
    assert len(measured) == 2
    report, measured = measure(run, config.model_copy(update={"num_tasks": 3}))
    assert (
        [line for line in measured if "num_tasks" in line]
        == [line for line in measured if "again" in line]
        != []
    )
    assert list(report["methods"]) == ["prompting"], (
        "cells of the old setting are not in the new report"
    )


def test_numbers_of_shown_examples_stand_side_by_side(evaluated: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    report, measured = measure(
        run, SMALL.model_copy(update={"methods": ("icl",), "num_shown": (5, 1)})
    )
    assert [line.split(":")[0] for line in measured] == [
        "icl.reasoning.seen.1_shown",
        "icl.reasoning.unseen.1_shown",
    ]
    cell = report["methods"]["icl"]["reasoning"]["unseen"]
    assert (
        list(cell["by_num_shown"]) == ["1", "5"]
        and cell["by_num_shown"]["5"]["exact_match"] == cell["exact_match"]
    )


def test_two_ranks_measure_what_one_does(
    evaluated: Path, one_rank_run: Path, tmp_path: Path
) -> None:
    run = fresh(one_rank_run, tmp_path / "run")
    done = start(
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "--",
            "ship_ds.cli",
            "evaluate",
            "--run",
            str(run),
            "--methods",
            "random_decode,icl",
            "--num-tasks",
            "2",
        ]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        (folder / "evaluation" / "tasks.jsonl").read_text().splitlines()
        for folder in (evaluated, run)
    )
    assert len(two) == 8 and two == [
        line for line in one if json.loads(line)["method"] in ("random_decode", "icl")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "ship,magic"], "--methods: there is no method 'magic'"),
        (["--num-shown", "0"], "--num-shown: "),
        (["--minutes", "0"], "--minutes: "),
        (["--parts", "all"], "--parts: "),
        (["--directions", "up"], "--directions: "),
        (["--judge", "jury"], "--judge: "),
        (["--num-tasks", "0"], "--num-tasks: "),
        (["--budget", "hours"], "--budget: "),
        (["--patience", "0"], "--patience: "),
        (["--set", "lr=1"], "--set: lr=1: a change has the form METHOD.key=value"),
        ([], "nowhere: no bundle here"),
    ],
)
def test_bad_option_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["evaluate", "--run", str(tmp_path / "nowhere"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_numbers_of_a_method_can_be_set_and_are_part_of_its_fingerprint(
    evaluated: Path, tmp_path: Path
) -> None:
    run = Run.open(evaluated, print)
    changes = ("tagi.oracles.lr=1e-3", "ship.num_rounds=0")
    harness = Harness(run, SMALL.model_copy(update={"changes": changes}), print)
    tagi: Any = harness.methods["tagi"]
    assert tagi.recipe.oracles.lr == 1e-3 and tagi.settings()["recipe"]["oracles"]["lr"] == 1e-3
    assert tagi.recipe.lr == Tagi.recipe.lr and Tagi.recipe.oracles.lr != 1e-3
    search: Any = harness.methods["ship"]
    assert search.recipe.model_fields_set == {"num_rounds"}, "the rest still suits the run"
    again = [cell.name for cell in harness.cells("ship") if harness.valid(cell) is None]
    assert len(again) == len(harness.cells("ship")), "measured with the default search"
    assert all(harness.valid(cell) for cell in harness.cells("prompting"))
    for change, message in (
        ("sft.warmth=1", "--set sft.warmth: unknown key; there are lr, num_examples"),
        # The keys at the top are none of those there.
        ("tagi.oracles.warmth=1", "--set tagi.oracles.warmth: unknown key"),
        (
            "sft.lr=fast",
            "--set sft.lr: Input should be a valid number, unable to parse string as a number",
        ),
        ("ship.num_rounds=true", "--set ship.num_rounds: true and false are no value of it"),
        ("icl.lr=1", "--set icl.lr=1: this method has no numbers to set"),
    ):
        with pytest.raises(UserError, match=rf"^{re.escape(message)}$"):
            Harness(run, SMALL.model_copy(update={"changes": (change,)}), print)


def test_the_base_may_be_asked_in_published_words(evaluated: Path, tmp_path: Path) -> None:
    run = fresh(evaluated, tmp_path / "run")
    shutil.copytree(evaluated / "evaluation", run / "evaluation")
    names = ("prompting", "instruction_induction")
    changes = tuple(f"{name}.prompt=published" for name in names)
    small = SMALL.model_copy(update={"methods": names, "parts": ("seen",)})
    assert measure(run, small)[1] == []
    _, said = measure(run, small.model_copy(update={"changes": changes}))
    assert any("another prompt" in line for line in said)
    opened = Run.open(run, no_log)
    model, length = opened.ship.model, opened.ship.config.evaluation
    tasks = tasks_of(opened.splits, "seen", small.num_tasks)
    asked = [ask(task, num, small.seed, part="seen") for num in (0, 5) for task in tasks]
    deduced, induced = asked[: len(tasks)], asked[len(tasks) :]
    answers = answer_stated(
        model,
        [question.wording for question in deduced],
        [question.inputs for question in deduced],
        length.max_new_tokens,
        prompt=model.prompts.published_task_prompt,
    )
    texts = asked_texts(
        model,
        [question.shown for question in induced],
        length.max_instruction_tokens,
        model.prompts.published_induction_prompt,
    )
    rows = [json.loads(line) for line in (run / "evaluation" / "tasks.jsonl").open()]
    by_method = {
        name: {
            row["task"]: row["said"]
            for row in rows
            if row["method"] == name and row["part"] == "seen"
        }
        for name in names
    }
    ids = [task.id for task in tasks]
    assert by_method["prompting"] == dict(zip(ids, answers, strict=True))
    assert by_method["instruction_induction"] == dict(
        zip(ids, map(without_preamble, texts), strict=True)
    )
    with pytest.raises(UserError, match=r"--set prompting\.prompt: Input should be 'own' or 'publ"):
        measure(run, small.model_copy(update={"changes": ("prompting.prompt=theirs",)}))


def test_budgets_are_what_the_options_say(evaluated: Path, tmp_path: Path) -> None:
    """The smoke run took 12 steps of 8 tasks and 2 examples."""
    run = Run.open(evaluated, print)

    def budget(**options: Any) -> Budget:
        return Harness(run, SMALL.model_copy(update=options), print).budget

    assert budget(minutes=90.0) == Minutes(90)
    assert budget(budget="examples") == AnsweredExamples(12 * 8 * 2)
    # As many as were trained, not as many as the config asked for: max_minutes may have ended it.
    shorter = tmp_path / "shorter"
    shorter.mkdir()
    lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (shorter / "metrics.jsonl").write_text("".join(lines[:5]))
    ended = Harness(
        replace(run, folder=shorter), SMALL.model_copy(update={"budget": "examples"}), print
    )
    assert ended.budget == AnsweredExamples(5 * 8 * 2)
    assert repr(ended.budget) == "Examples(examples=80)"  # by which earlier versions stored it
    assert budget(budget="until_dev_stops", patience=3) == UntilDevStops(3, 12 * 8 * 2)
    blind = replace(run, splits=replace(run.splits, dev=()))
    with pytest.raises(UserError, match="no dev tasks; take minutes or examples"):
        _ = Harness(blind, SMALL.model_copy(update={"budget": "until_dev_stops"}), print).budget


def test_every_option_of_the_verb_is_the_setting_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them another than the default; by name, since many are texts and numbers alike."""
    options = {
        "methods": "sft,icl",
        "parts": "dev",
        "directions": "deduction",
        "num-tasks": "7",
        "num-shown": "3,2",
        "budget": "examples",
        "minutes": "1.5",
        "patience": "9",
        "num-looks": "2",
        "judge": "rouge",
        "endpoint": "http://a",
        "endpoint-model": "b",
        "endpoint-prompts": "published",
        "seed": "5",
        "set": "sft.lr=1",
    }
    asked: list[HarnessConfig] = []
    monkeypatch.setattr(checks, "check_run", lambda run, base: None)
    monkeypatch.setattr(
        "ship_ds.evaluation.evaluate.evaluate",
        lambda run, config, *rest: asked.append(config) or {"methods": {}},
    )
    typed = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert cli.main(["evaluate", "--run", str(tmp_path), *typed]) == 0
    assert asked == [
        HarnessConfig(
            methods=("sft", "icl"),
            parts=("dev",),
            directions=("deduction",),
            num_tasks=7,
            num_shown=(3, 2),
            budget="examples",
            minutes=1.5,
            patience=9,
            num_looks=2,
            judges=("rouge",),
            endpoint=EndpointConfig(url="http://a", model="b", prompts="published"),
            seed=5,
            changes=("sft.lr=1",),
        )
    ]
    by_place: Any = HarnessConfig.from_options
    with pytest.raises(TypeError, match="positional"):
        by_place("sft")


def test_other_tasks_are_measured_as_unseen_ones_beside_the_runs_own(
    evaluated: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = fresh(evaluated, tmp_path / "run")
    known = json.loads((run / "bundle" / "known_instructions.json").read_text())[0]
    rows = [("first", "write the list as it is"), ("second", "give me nothing"), ("third", known)]
    benchmark = tmp_path / "benchmark.jsonl"
    with benchmark.open("w") as file:
        for name, text in rows:
            examples = [{"input": f"{i} 3", "target": f"{i} 3"} for i in range(8)]
            row = {"id": name, "instruction": text, "examples": examples}
            file.write(json.dumps(row) + "\n")
    data = f"{{path: {benchmark}, split: {{test_examples: 2}}}}"
    arguments = ["--run", str(run), "--methods", "prompting,nearest_known", "--judge", "none"]
    assert cli.main(["evaluate", *arguments, "--data", data]) == 0
    said = capsys.readouterr()
    assert "tasks with the rule of one that was trained or chosen on: 1" in said.err
    (results,) = run.glob("evaluation-benchmark.jsonl-*")
    assert said.out.splitlines()[-1] == str(results / "report.md")
    assert not (run / "evaluation").exists()
    cells = json.loads((results / "report.json").read_text())["methods"]
    assert list(cells["prompting"]["deduction"]) == ["unseen"]
    measured = cells["prompting"]["deduction"]["unseen"]
    assert (measured["n_tasks"], measured["n_examples"]) == (2, 4)
    asked = [json.loads(line) for line in (results / "tasks.jsonl").read_text().splitlines()]
    assert {row["task"] for row in asked} == {"first", "second"}
    assert cells["nearest_known"]["reasoning"]["unseen"]["n_tasks"] == 2

    # Of other settings there is another folder; and the very same, by another way to it, is there.
    monkeypatch.chdir(tmp_path)
    relative = data.replace(str(tmp_path), ".")
    assert cli.main(["evaluate", *arguments, "--data", relative]) == 0
    assert not re.search(r"tasks, [\d.]+ s$", capsys.readouterr().err, re.MULTILINE)
    others = ["--methods", "prompting", "--judge", "none", "--data", "benchmark.jsonl"]
    assert cli.main(["evaluate", "--run", str(run), *others]) == 0
    assert len(list(run.glob("evaluation-benchmark.jsonl-*"))) == 2


def test_what_an_earlier_run_was_trained_on_is_no_unseen_task(
    evaluated: Path, tmp_path: Path
) -> None:
    """Of the run that this one started from, and of the one before."""
    texts = ["write the list as it is", "say the third thing"]
    folders = [fresh(evaluated, tmp_path / name) for name in ("first", "second", "third")]
    for i, folder in enumerate(folders):
        config = json.loads((folder / "bundle" / "config.json").read_text())
        config["run"]["init_from"] = str(folders[i - 1]) if i else None
        (folder / "bundle" / "config.json").write_text(json.dumps(config))
        if i < 2:
            (folder / "bundle" / "known_instructions.json").write_text(json.dumps([texts[i]]))
        Manifest.of(folder / "bundle").write(folder / "bundle")
    with (tmp_path / "benchmark.jsonl").open("w") as file:
        for text in [*texts, "give me nothing"]:
            examples = [{"input": f"{i} 3", "target": f"{i} 3"} for i in range(8)]
            file.write(json.dumps({"id": text, "instruction": text, "examples": examples}) + "\n")
    said: list[str] = []
    benchmark = parse_benchmark(str(tmp_path / "benchmark.jsonl"), "--data")
    for folder, unseen in zip(folders, (3, 2, 1), strict=True):
        run = Run.open(folder, said.append, data=benchmark)
        assert len(run.splits.unseen) == unseen
    # The first folder was trained again, from what had begun with it.
    config = json.loads((folders[0] / "bundle" / "config.json").read_text())
    config["run"]["init_from"] = str(folders[2])
    (folders[0] / "bundle" / "config.json").write_text(json.dumps(config))
    Manifest.of(folders[0] / "bundle").write(folders[0] / "bundle")
    assert len(Run.open(folders[2], said.append, data=benchmark).splits.unseen) == 1
    shutil.rmtree(folders[0])
    assert len(Run.open(folders[2], said.append, data=benchmark).splits.unseen) == 2
    assert any(
        "run.init_from: what that run was trained on is not compared" in line for line in said
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("nowhere", "--data: nowhere: No such file or directory; give a readable"),
        ("{path: x, paht: y}", "--data: paht: unknown key"),
        ("{path: x", "--data: "),
        ("{path: ., split: {dev_share: 0.2}}", "--data: split.dev_share: all of these tasks are"),
        ("{path: ., cache: x}", "--data: cache: nothing of these tasks is kept"),
    ],
)
def test_other_tasks_that_cannot_be_read_are_one_line(
    text: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "--run", str(tmp_path), "--data", text]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and line in error


def test_every_method_can_be_named_and_has_its_place_in_the_tables() -> None:
    assert tuple(METHODS) == METHOD_NAMES


def test_data_that_changed_since_training_are_refused(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fresh(evaluated, tmp_path / "run")
    parts = json.loads((run / "splits.json").read_text())
    (run / "splits.json").write_text(json.dumps({**parts, "seen": parts["seen"][1:]}))
    assert cli.main(["evaluate", "--run", str(run), "--methods", "prompting"]) == 2
    assert "the data now give other seen tasks" in capsys.readouterr().err


def test_shots_that_do_not_fit_are_left_out_last_first(
    one_rank_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the row icl, and where the Task LLM is asked for the instruction."""
    run = Run.open(one_rank_run, print)
    task = run.splits.seen[0]
    method = InContextLearning(Setting(run.ship, run.splits, tmp_path, None, 0))
    model = run.ship.model
    shots = task.train[:3]
    whole = method.prompt(task.test[0].input, shots)
    assert whole == model.prompts.task_prompt(task.test[0].input, None, shots)
    read: list[Sequence[Sequence[int]]] = []
    monkeypatch.setattr(
        "ship_ds.inference.proposals.bare_answerer",
        lambda model: SimpleNamespace(rows=lambda asked, length: [read.extend(asked) or asked[0]]),
    )
    for room, num_left in ((0, 3), (-1, 2), (-len(whole), 0)):
        longest = len(whole) + run.ship.config.evaluation.max_new_tokens + room
        monkeypatch.setattr(LanguageModel, "context_length", longest)
        left = model.prompts.task_prompt(task.test[0].input, None, shots[:num_left])
        assert method.prompt(task.test[0].input, shots) == left
        for prompt in (model.prompts.published_induction_prompt, model.prompts.decoder_prompt):
            monkeypatch.setattr(LanguageModel, "context_length", len(prompt(shots)) + 5 + room)
            asked_texts(model, [shots, ()], 5, prompt)
            assert read.pop() == [prompt(shots[:num_left]), prompt(())]


def test_a_benchmark_goes_by_the_name_that_it_has_had() -> None:
    """Cells of other data lie in a folder of that name: a new setting must not move them."""
    assert results_name(FilesConfig(path="/data/x")) == "evaluation-x-011e3a18"
