"""The verbs as a user types them: output, one line for bad input, exit codes."""

import json
from pathlib import Path

import pytest

from ship_ds import cli, doctor
from ship_ds.config import load_config, recipe_names


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
    for part in ("torch", "CUDA", "compiler", "deepspeed", "bitsandbytes", "flash-attn", "Slurm"):
        assert part in shown


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


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "nowhere"],
        ["bundle", "nowhere", "--out", "out"],
        ["deduce", "x", "--run", "nowhere", "--out", "out"],
        ["train", "--config", "nowhere"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "nowhere" in shown.err and not shown.out
