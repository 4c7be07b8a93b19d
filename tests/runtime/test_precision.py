"""`zero2_auto` is bf16 where every rank multiplies in it, and a run says which it took."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ship_ds.config import Config, load_config
from ship_ds.planner.plan import Machines, make_plan
from ship_ds.runtime import precision
from ship_ds.runtime.deepspeed_config import AUTO_CONFIGS, read_deepspeed_config
from ship_ds.runtime.precision import choose_precision
from tests.conftest import environment


def config(deepspeed: str, *overrides: str) -> Config:
    return load_config("quickstart-smoke", [f"training.deepspeed={deepspeed}", *overrides])


@pytest.mark.parametrize("name", AUTO_CONFIGS)
@pytest.mark.parametrize(
    ("ranks", "suffix"), [([True, True], "_bf16"), ([True, False], ""), ([False], "")]
)
def test_every_rank_has_to_multiply_in_bf16(
    name: str,
    ranks: list[bool],
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(precision.ranks, "gather_objects", lambda value: ranks)
    chosen = name.replace("_auto", suffix)
    assert choose_precision(config(name)) == config(chosen)
    line = f"training.deepspeed={name} is {chosen} here: the ranks compute in "
    assert capsys.readouterr().err == f"ship-ds: {line}{'bf16' if suffix else 'fp32'}\n"


@pytest.mark.parametrize(("has_bf16", "is_said"), [(True, False), (False, True)])
def test_bf16_by_name_stays_and_is_told_where_it_is_imitated(
    has_bf16: bool,
    is_said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(precision, "multiplies_in_bf16", lambda device: has_bf16)
    own = tmp_path / "own.json"
    own.write_text(json.dumps(read_deepspeed_config("zero3_bf16")))
    for name in ("zero2_bf16", str(own)):
        assert choose_precision(config(name)) == config(name)
        said = capsys.readouterr().err
        assert said.startswith(f"ship-ds: training.deepspeed={name}: ") is is_said
        assert "zero2_auto" in said or not is_said
    assert choose_precision(config("zero2")) == config("zero2")
    assert capsys.readouterr().err == ""


def test_a_plan_is_for_gpus_that_have_it() -> None:
    machines = Machines(1, 2, 80 * 10**9)
    plan, known = (make_plan(config(name), machines) for name in ("zero2_auto", "zero2_bf16"))
    assert plan.memory == known.memory


PROGRAM = """
import sys
from pathlib import Path
from ship_ds import placement
from ship_ds.train import main
placement._PROCESSOR = Path(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.soak  # test_two_ranks.py has the move itself in `make test`
def test_a_run_goes_on_in_what_the_next_machine_has(tmp_path: Path) -> None:
    """Begun on a processor without bf16, gone on with on one with it."""
    folder = tmp_path / "run"
    for flags, stop, chosen in (("avx2", "1e-6", "zero2"), ("amx_bf16", "null", "zero2_bf16")):
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
        arguments = ["--config", "quickstart-smoke", "training.deepspeed=zero2_auto"]
        arguments += [f"training.max_minutes={stop}", "training.steps=3", f"run.folder={folder}"]
        arguments += ["evaluation.ends_with_report=false"]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "cpuinfo"), *arguments],
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert f"training.deepspeed=zero2_auto is {chosen} here: " in done.stderr
        assert ("after step 1" in done.stderr) is (flags == "amx_bf16")
        assert ("written in fp32: goes on in bf16" in done.stderr) is (flags == "amx_bf16")
        written = json.loads((folder / "config.json").read_text())
        assert written["training"]["deepspeed"] == chosen
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss/total"] for row in rows if "loss/total" in row]
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)
