"""`Ship` and its verbs: plain types in, values and JSON lines out, one line for each kind of bad
input."""

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ship_ds import cli
from ship_ds.api import Ship
from ship_ds.config import LoraHypernetworkConfig
from ship_ds.console import no_log
from ship_ds.data.source import source_of
from ship_ds.errors import UserError
from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.evaluation.harness import Run
from ship_ds.export.bundling import bundle_from_checkpoint
from ship_ds.export.compose import compose
from ship_ds.files import sha256
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.latents import Familiarity
from ship_ds.model import budget
from ship_ds.model.nf4_linear import Nf4Linear

pytestmark = pytest.mark.slow

QUICK = InductionConfig(
    num_views=1,
    num_samples=2,
    num_beams=2,
    num_rounds=1,
    num_edits=4,
    refine_steps=2,
    steps=4,
    num_known=8,
    num_restarts=2,
    max_new_tokens=8,
)
PAIRS = [("3 4 9", "4 9"), ("1 2", "2")]


def test_deduce_gives_the_adapter_and_its_familiarity(ship: Ship) -> None:
    found = ship.deduce("add 3")
    assert found.latent == ship.encode("add 3") and found.adapter.num_tasks == 1
    assert found.familiarity is not None and not found.familiarity.is_far
    assert ship.nearest_known(found.latent, 1)[0].instruction == "add 3"
    assert isinstance(ship.decode(found.latent), str)


def test_many_instructions_at_once_are_each_alone(ship: Ship, inputs: list[str]) -> None:
    said = ["add 3", "remove every 5", "take the first 2"]
    asked = [inputs[:4], inputs[:1], inputs[4:8]]
    for num_beams in (1, 3):
        together = ship.answer_many(said, asked, num_beams)
        assert together == [
            ship.answer(text, own, num_beams) for text, own in zip(said, asked, strict=True)
        ]
    assert together[0] != ship.answer("remove every 5", inputs[:4])


def test_one_example_is_enough_and_ambiguity_is_reported(ship: Ship, inputs: list[str]) -> None:
    answer = ship.answer("add 3", inputs[:1])[0]
    assert answer is not None
    found = ship.induce([(inputs[0], answer)], QUICK)
    assert found.num_examples == 1 and found.num_right == 1
    assert (
        all(max(c.num_right, c.num_right_in_prompt) == 1 for c in found.that_fit) and found.that_fit
    )


def test_reason_answers_by_latent_refined_latent_and_text(ship: Ship, inputs: list[str]) -> None:
    for num_rounds in (1, 2):
        found = ship.reason(PAIRS, inputs[:3], QUICK, num_rounds)
        assert found.refined == ship.answer(found.induction.instruction, inputs[:3])
        said = [found.induction.instruction] * 3
        assert (
            found.in_prompt == ship.model.answer(None, inputs[:3], 6, said)
            and len(found.by_latent) == 3
        )


@pytest.mark.parametrize("key", ["embedded", "embedded (config.json)"])
def test_a_bundle_around_another_base_of_the_same_shape_is_one_line(
    key: str, bundle: Path, tmp_path: Path
) -> None:
    """Of other weights, or of other settings."""
    shutil.copytree(bundle, tmp_path / "bundle")
    bases = tmp_path / "bundle" / "bases.json"
    known = json.loads(bases.read_text())
    assert list(known) == ["embedded", "embedded (config.json)"]
    bases.write_text(json.dumps(known | {key: "0" * 64}))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["bases.json"] = {"bytes": bases.stat().st_size, "sha256": sha256(bases)}
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=rf"trained around {re.escape(key)} with fingerprint 000000000000"
    ):
        Ship.from_run(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda ship: ship.induce([("1 2", "2"), ("1 2", "1")]),
            "examples 1 and 2: the same input '1 2' has two targets",
        ),
        (lambda ship: ship.induce([]), "there are none"),
        (
            lambda ship: ship.induce([("1 2", "\u5b57")]),
            "example 1, target: '\u5b57' is not in the base model's vocabulary",
        ),
        (lambda ship: ship.answer("add \u5b57 3", ["1"]), "instruction: '\u5b57' is not in"),
        (lambda ship: ship.answer("add 3", ["1", "\u5b57"]), "input 2: '\u5b57' is not in"),
        (lambda ship: ship.answer(" ", ["1"]), "instruction: is empty"),
        (
            lambda ship: ship.answer("add 3 " * 300, ["1"]),
            "instruction: is 6.. tokens long .* the encoder reads at most 512",
        ),
        (
            lambda ship: ship.answer("add 3", ["1 " * 600]),
            "input 1 with an answer .* the Task LLM reads at most 512",
        ),
        # The letters of a text would be taken for inputs, and for a pair.
        (lambda ship: ship.answer("add 3", "1 2"), r"inputs: is one text; .* such as \['1 2'\]"),
        (lambda ship: ship.answer_bare("1 2"), "inputs: is one text"),
        (lambda ship: ship.confidence("add 3", "1 2"), "inputs: is one text"),
        (lambda ship: ship.reason([("1 2", "2")], "1 2"), "inputs: is one text"),
        (lambda ship: ship.answer("add 3", ["1", 2]), "inputs: number 2 is no text: 2"),
        (lambda ship: ship.induce(["1 2"]), "example 1: is '1 2'; give pairs of texts"),
        (lambda ship: ship.induce(["12"]), "example 1: is '12'; give pairs of texts"),
        (lambda ship: ship.induce([12]), "example 1: is 12; give pairs of texts"),
        (lambda ship: ship.induce([("1", 2)]), r"example 1: is \('1', 2\); give pairs of texts"),
        (lambda ship: ship.decode([0.0]), "has 1 numbers and this run's has 64"),
    ],
)
def test_text_that_a_model_cannot_read_is_one_line(ship: Ship, call: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(ship)  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def _file(folder: Path, text: str) -> str:
    path = folder / "lines.jsonl"
    path.write_text(text)
    return str(path)


def _rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_answer_verb_reads_arguments_a_file_and_standard_input(
    bundle: Path,
    ship: Ship,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = [
        {"input": x, "answer": y}
        for x, y in zip(["1 2", "3 4 9"], ship.answer("add 3", ["1 2", "3 4 9"]), strict=True)
    ]
    assert cli.main(["answer", "add 3", "1 2", "3 4 9", "--run", str(bundle)]) == 0
    assert _rows(capsys) == expected
    path = _file(tmp_path, '{"input": "1 2"}\n\n3 4 9\n')
    assert cli.main(["answer", "add 3", "--run", str(bundle), "--file", path]) == 0
    assert _rows(capsys) == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("1 2\n3 4 9\n"))
    assert cli.main(["answer", "add 3", "--run", str(bundle)]) == 0
    assert _rows(capsys) == expected


def test_answer_verb_warns_of_what_is_far_from_training(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside its rows, in one line; of a known instruction it says nothing."""
    far = "numbers numbers numbers after after list sort the front and then give"
    for instruction, num_lines in (("add 3", 0), (far, 1)):
        assert cli.main(["answer", instruction, "1 2", "--run", str(bundle)]) == 0
        printed = capsys.readouterr()
        assert printed.err.count("\n") == num_lines and printed.out.count("\n") == 1
    assert "far from the instructions this run was trained on" in printed.err


def test_a_warning_says_how_far() -> None:
    assert Familiarity(0.5, False).warning is None
    warning = Familiarity(1.0, True).warning
    assert warning is not None and "farther from the next than 100 % of them" in warning


def test_answer_verb_says_how_many_samples_agree(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked for, beside each answer."""
    run = ["--run", str(bundle)]
    assert cli.main(["answer", "add 3", "1 2", "3 4 9", *run]) == 0
    plain = _rows(capsys)
    assert cli.main(["answer", "add 3", "1 2", "3 4 9", "--confidence", *run]) == 0
    rows = _rows(capsys)
    assert [{k: row[k] for k in ("input", "answer")} for row in rows] == plain
    assert all(0 <= row["agreement"] <= 1 for row in rows)


def test_induce_verb_shows_candidates_and_progress(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _file(tmp_path, '{"input": "3 4 9", "target": "4 9"}\n')
    assert (
        cli.main(
            [
                "induce",
                "--run",
                str(bundle),
                "--file",
                path,
                "--method",
                "bank",
                "--candidates",
                "2",
            ]
        )
        == 0
    )
    shown = capsys.readouterr()
    row = json.loads(shown.out)
    assert row["instruction"] == row["candidates"][0]["instruction"] and len(row["candidates"]) == 2
    assert (
        row["num_examples"] == 1
        and len(row["latent"]) == 64
        and "ship-ds: induction: " in shown.err
    )


def test_reason_verb_gives_a_row_an_input(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _file(tmp_path, '{"input": "3 4 9", "target": "4 9"}\n')
    assert (
        cli.main(
            ["reason", "1 2", "5 5 5", "--run", str(bundle), "--file", path, "--method", "bank"]
        )
        == 0
    )
    rows = _rows(capsys)
    assert [row["input"] for row in rows] == ["1 2", "5 5 5"]
    names = {"input", "answer", "instruction", "by_latent", "refined", "in_prompt"}
    assert all(row.keys() == names and row["answer"] == row["refined"] for row in rows)


@pytest.mark.parametrize("verb", [["induce"], ["reason", "1 2"], ["answer", "add 3"]])
@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ('{"input": 3}\n', "line 1: input: expected a string, got int")],
)
def test_a_bad_file_is_one_line(
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: list[str],
    text: str,
    message: str,
) -> None:
    assert cli.main([*verb, "--run", str(bundle), "--file", _file(tmp_path, text)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out


@pytest.mark.parametrize("verb", [["induce"], ["reason", "1 2"]])
def test_contradiction_is_one_line_on_the_command_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    path = _file(tmp_path, '{"input": "1 2", "target": "2"}\n{"input": "1 2", "target": "1"}\n')
    assert cli.main([*verb, "--run", str(bundle), "--file", path]) == 2
    shown = capsys.readouterr()
    assert "no instruction gives both" in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_a_runs_bundle_and_one_from_its_checkpoint_know_the_seen_instructions(
    one_rank_run: Path, tmp_path: Path
) -> None:
    seen = json.loads((one_rank_run / "splits.json").read_text())["seen"]
    bundle_from_checkpoint(one_rank_run / "checkpoints" / "step-00000012", tmp_path / "bundle")
    known = [Ship.from_run(folder).known for folder in (one_rank_run, tmp_path / "bundle")]
    assert known[0] == known[1] and len(known[0]) == len(seen) == 24


def test_a_printed_induction_has_no_latents(ship: Ship) -> None:
    found = ship.induce([("1 2", "2")], QUICK)
    assert "latent=" not in repr(found) and len(found.latent) == 64
    assert found.candidates and found.instruction in repr(found)


def test_results_are_plain_frozen_values(ship: Ship) -> None:
    found = ship.induce(PAIRS, QUICK.model_copy(update={"method": "bank"}))
    assert dataclasses.is_dataclass(found) and all(
        isinstance(value, float) for value in found.latent
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.instruction = "other"  # type: ignore[misc]


def test_a_run_on_a_cpu_answers_with_its_base_dequantised(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is room, and so does a second copy of the base that baselines train over."""

    def is_unpacked(task_llm: torch.nn.Module) -> set[bool]:
        linears = [one for one in task_llm.modules() if isinstance(one, Nf4Linear)]
        return {linear.unpacked is not None for linear in linears}

    ship = Ship.from_run(bundle)
    assert is_unpacked(ship.model.task_llm) == {True}
    lora, device = LoraHypernetworkConfig(), ship.model.device
    base = FrozenBase.of_config(ship.config, lora, device, torch.float32)
    assert is_unpacked(base.task_llm) == {True}
    monkeypatch.setattr(budget, "bytes_to_keep", lambda device: 0)
    assert is_unpacked(Ship.from_run(bundle).model.task_llm) == {False}


def test_bf16_computes_what_fp32_does(
    bundle: Path, ship: Ship, inputs: list[str], tmp_path: Path
) -> None:
    """Weights in 16 bits, what training keeps in 32 bits in 32, and an export that is proved."""
    low = Ship.from_run(bundle, "cpu", "bfloat16")
    assert (ship.dtype, low.dtype) == (torch.float32, torch.bfloat16)
    dtypes = {parameter.dtype for parameter in low.model.parameters()}
    assert dtypes <= {torch.bfloat16, torch.uint8}
    frequencies = [
        buffer for name, buffer in low.model.named_buffers() if name.endswith("inv_freq")
    ]
    assert frequencies and all(buffer.dtype == torch.float32 for buffer in frequencies)
    latents = [torch.tensor(one.encode(ship.known[0])) for one in (ship, low)]
    assert latents[1].dtype == torch.float32
    assert torch.cosine_similarity(*latents, dim=0) > 0.999
    assert not torch.equal(*latents)
    assert len(low.answer(ship.known[0], inputs)) == len(inputs)
    # Four times what this short training taught: that is lost in the rounding of the logits.
    proof = compose(low, [(4.0, ship.known[0])], tmp_path / "adapter", inputs[:2]).proof
    assert proof.from_live <= 0.05 * proof.from_base
    with pytest.raises(UserError, match="nothing was written; --dtype float32 rounds less"):
        compose(low, [(0.1, ship.known[0])], tmp_path / "weak", inputs[:2])
    assert not (tmp_path / "weak").exists()
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_scores_in_bf16_do_not_stand_for_those_in_fp32(bundle: Path, ship: Ship) -> None:
    splits = source_of(ship.config.data).read(ship.model.prompts.tokenizer, no_log)
    low = Ship.from_run(bundle, "cpu", "bfloat16")
    in_fp32, in_bf16 = (Run(bundle, one, splits).fingerprint for one in (ship, low))
    assert in_bf16 == in_fp32 | {"dtype": "bfloat16"}
