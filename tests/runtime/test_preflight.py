"""What stops a run in seconds, with one line and without torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ship_ds.config import base_folder, load_config
from ship_ds.errors import UserError
from ship_ds.planner.public_shapes import check_planned_bases, with_shapes
from ship_ds.runtime import preflight
from tests.conftest import REPOSITORY, environment

SLURM = {"SLURM_GPUS_ON_NODE": "4", "SLURM_TASKS_PER_NODE": "8(x2),4"}


def check(tmp_path: Path, *overrides: str, environment: dict[str, str] | None = None) -> None:
    preflight.check(
        load_config("quickstart-smoke", [f"run.folder={tmp_path / 'run'}", *overrides]),
        environment or {},
    )


def test_a_good_run_passes_and_leaves_nothing(tmp_path: Path) -> None:
    check(tmp_path, environment={**SLURM, "SLURM_TASKS_PER_NODE": "4(x3)"})
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    check(tmp_path)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data={kind: files, path: /nowhere}"], "data.path: /nowhere: No such file"),
        (
            ["model.task_llm.base=/nowhere"],
            "model.task_llm.base: /nowhere: expected a model folder",
        ),
        (["training.deepspeed=zero9"], "ds_configs/ has cpu, zero1, zero1_bf16, zero2"),
        (
            ["training.hang_minutes=26"],
            "training.hang_minutes: 26 is above 25.*set it lower, or null",
        ),
        (["run.folder=/dev/null/run"], "run.folder: /dev/null/run: Not a directory"),
        (["run.folder=/dev/null"], "run.folder: /dev/null: Not a directory"),
        (["run.folder=/proc/run/x"], "run.folder: /proc/run/x: No such file"),
        ([f"run.folder={'x' * 300}"], "File name too long"),
        (["run.folder=''"], "run.folder: expected a folder of the run's own"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(tmp_path, *overrides)


def test_where_one_stands_may_be_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(tmp_path, "run.folder=.")


def test_a_link_to_nothing_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"run.folder: .*run: No such file"):
        check(tmp_path)


def test_a_chat_template_that_raises_is_said_before_ranks_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(base_folder("embedded"), tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ raise_exception('no tools') }}")
    arguments = [f"model.encoder.base={base}", f"run.folder={tmp_path / 'run'}"]
    assert preflight.main(["--config", "quickstart-smoke", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ship-ds: model.encoder.base: {base}: chat template: ")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def t5(tmp_path: Path) -> str:
    """What tells a T5: its config.json."""
    base = shutil.copytree(base_folder("embedded"), tmp_path / "t5")
    config = {"model_type": "t5", "is_encoder_decoder": True, "feed_forward_proj": "gated-gelu"}
    (base / "config.json").write_text(json.dumps(config))
    return f"model.task_llm.base={base}"


OTHERS = ["model.encoder.base=embedded", "model.decoder.base=embedded"]
LINEARS = "model.hypernetwork.targets=[q, wi_1]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([LINEARS], "model.encoder.base: .*: a t5 can be the Task LLM alone: set it to"),
        ([LINEARS, OTHERS[0]], "model.decoder.base: .*: a t5 can be the Task LLM alone"),
        (
            [
                "model.backbone=shared",
                "model.encoder={quantisation: nf4, tuning: {kind: lora, rank: 2}}",
                "model.decoder={quantisation: nf4, tuning: {kind: lora, rank: 2}}",
            ],
            "model.backbone=shared: .*: a t5 can be the Task LLM alone.*: set it to separate",
        ),
        (
            [*OTHERS, LINEARS, "model.attention=flash"],
            "model.attention=flash: .*: a t5 adds a bias .*: set it to auto or sdpa",
        ),
        (
            OTHERS,
            "model.hypernetwork.targets: .*: a t5 has no linear module 'q_proj'; its blocks have "
            "k, o, q, v, wi_0, wi_1, wo: name of these, or all-linear",
        ),
        (
            [*OTHERS, "model.hypernetwork={kind: combination, parts: [{kind: prefix}, {}]}"],
            "model.hypernetwork.targets: .* no linear module 'q_proj'",
        ),
    ],
)
def test_what_a_t5_cannot_do_is_named(
    tmp_path: Path, t5: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check(tmp_path, t5, *overrides)
    assert "\n" not in str(caught.value)


def test_a_t5_beside_a_published_shape_is_named_as_it_is_planned(t5: str) -> None:
    """Of the roles whose bases are shapes alone nothing is there to look at."""
    base = t5.partition("=")[2]
    config = load_config("pretrain-7b", [f"model.decoder.base={base}"])
    planned = with_shapes(config, "llama-2-7b")
    with pytest.raises(UserError, match=r"model\.decoder\.base: .*: a t5 can be the"):
        check_planned_bases(planned)


def test_a_t5_passes_without_a_template_it_takes_no_system_message(tmp_path: Path, t5: str) -> None:
    message = "model.system_message=Be brief."
    for linears in (LINEARS, "model.hypernetwork.targets=all-linear"):
        check(tmp_path, t5, *OTHERS, linears, message)
    (tmp_path / "t5" / "chat_template.jinja").unlink()
    check(tmp_path, t5, *OTHERS, LINEARS)
    with pytest.raises(UserError, match="model.system_message: .* has no chat template"):
        check(tmp_path, t5, *OTHERS, LINEARS, message)


@pytest.mark.parametrize("part", ["offload_param", "offload_optimizer"])
def test_an_nvme_path_that_is_no_folder_is_named(tmp_path: Path, part: str) -> None:
    path, disk = tmp_path / "own.json", tmp_path / "disk"
    disk.touch(mode=0o777)
    other = "offload_param" if part == "offload_optimizer" else "offload_optimizer"
    for where in (str(tmp_path / "nowhere"), str(disk), ""):
        path.write_text(
            json.dumps(
                {
                    "zero_optimization": {
                        "stage": 3,
                        part: {"device": "nvme", "nvme_path": where},
                        other: None,
                    }
                }
            )
        )
        with pytest.raises(
            UserError,
            match=rf"training.deepspeed: {part}.nvme_path: .*: no folder that can be written",
        ):
            check(tmp_path, f"training.deepspeed={path}")
    path.write_text(
        json.dumps(
            {
                "zero_optimization": {
                    "stage": 3,
                    part: {"device": "nvme", "nvme_path": str(tmp_path)},
                }
            }
        )
    )
    check(tmp_path, f"training.deepspeed={path}")


def test_an_optimiser_that_is_offloaded_in_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    for ratio in (0.5, 1.0):
        path.write_text(
            json.dumps(
                {
                    "zero_optimization": {
                        "stage": 2,
                        "offload_optimizer": {"device": "cpu", "ratio": ratio},
                    }
                }
            )
        )
        if ratio == 1:
            check(tmp_path, f"training.deepspeed={path}")
        else:
            with pytest.raises(
                UserError,
                match=r"training.deepspeed: offload_optimizer.ratio: 0.5: .* would lose them",
            ):
                check(tmp_path, f"training.deepspeed={path}")


def test_an_empty_folder_and_an_unreadable_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder is empty"):
        check(tmp_path, f"data={{kind: files, path: {tmp_path}}}")
    (tmp_path / "task.json").symlink_to(tmp_path / "task.json")  # root reads everything but a loop
    with pytest.raises(UserError, match=r"task\.json: Too many levels of symbolic links"):
        check(tmp_path, f"data={{kind: files, path: {tmp_path / 'task.json'}}}")


def test_fewer_gpus_than_processes_on_a_node_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"8 processes a node and 4 GPU.*--ntasks-per-node=4"):
        check(tmp_path, environment=SLURM)


def test_it_loads_no_torch() -> None:
    code = "import sys, ship_ds.runtime.preflight; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), check=False
        ).returncode
        == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("program", ["-m ship_ds.train", "ship_ds/train.py --local_rank=0"])
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--config quikstart", "ship-ds: quikstart: no such config file"),
        ("--config quickstart-smoke training.stepz=3", "training.stepz: unknown key"),
        ("--config quickstart-smoke model.task_llm.base=/nowhere", "expected a model folder"),
    ],
)
def test_a_rank_says_what_is_wrong_before_it_imports_torch(
    program: str, arguments: str, line: str, tmp_path: Path
) -> None:
    # Whoever imports it here fails.
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    path = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "SHIP_DS_BAD_INPUT": str(tmp_path / "line")}
    done = subprocess.run(
        [sys.executable, *program.split(), *arguments.split(), f"run.folder={tmp_path / 'run'}"],
        cwd=REPOSITORY,
        env={**environment(), **path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    [said] = done.stderr.splitlines()
    assert line in said and not done.stdout
    left = (tmp_path / "line").read_text()
    assert left.startswith("ship-ds: rank 0 on ") and left.endswith(said[len("ship-ds: ") :] + "\n")


def test_an_interrupt_before_torch_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preflight, "check", interrupted)
    monkeypatch.setattr(sys, "argv", ["train", "--config", "quickstart-smoke"])
    with pytest.raises(SystemExit) as ended:
        preflight.exit_on_bad_input(None)
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 130 and line.startswith("ship-ds: interrupted")
