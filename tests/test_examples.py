"""The scripts of examples/ run as their first lines say."""

import json

import pytest

from tests.conftest import REPOSITORY, start

V0_1 = REPOSITORY / "tests" / "fixtures" / "v0_1"


@pytest.mark.slow
def test_an_instruction_becomes_an_answer() -> None:
    """By `peft` as the live model: the answers that are recorded for this run."""
    recorded = json.loads((V0_1 / "recorded.json").read_text())
    instruction, inputs = recorded["instructions"][1], recorded["inputs"]
    run = "tests/fixtures/v0_1/run"
    done = start(["examples/instruction_to_answer.py", run, instruction, *inputs])
    assert done.returncode == 0, done.stderr[-3000:]
    pairs = zip(inputs, recorded["bundle"]["answers"][1], strict=True)
    lines = done.stdout.splitlines()[-len(inputs) :]
    for line, (text, answer) in zip(lines, pairs, strict=True):
        # An answer that did not end in time is none for ship_ds; the script prints what there is.
        assert line.startswith(f"{text} -> ") and (
            answer is None
            or line == f"{text} -> {answer}".rstrip()
            or line == f"{text} -> {answer}"
        )
