"""What `slurm/train.sh` asks for: lines of sweep files, a folder for one run alone, ports and node
lists."""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ship_ds.errors import UserError
from ship_ds.runtime import ranks, run_lock
from ship_ds.runtime.run_lock import RunLock
from ship_ds.runtime.sweep import main, overrides_of_line
from tests.conftest import REPOSITORY, environment

SWEEP = """# learning rates
optimiser.lr=1e-4 training.steps=2

  # and more
optimiser.lr=1e-3  # higher
run.folder="runs/my run-%a" data.path='a b'
model.hypernetwork.targets=[q_proj, v_proj] training.steps=3
"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_comments_and_empty_lines_do_not_count_and_quotes_are_a_shells(
    tmp_path: Path, end: str
) -> None:
    path = tmp_path / "sweep.txt"
    path.write_bytes(("\ufeff" + SWEEP.replace("\n", end)).encode())
    assert [overrides_of_line(path, number) for number in range(1, 5)] == [
        ["optimiser.lr=1e-4", "training.steps=2"],
        ["optimiser.lr=1e-3"],
        ["run.folder=runs/my run-%a", "data.path=a b"],
        ["model.hypernetwork.targets=[q_proj, v_proj]", "training.steps=3"],
    ]


@pytest.mark.parametrize(
    ("text", "number", "message"),
    [
        (SWEEP, 5, "has 4 lines of overrides, and the array index is 5: submit with --array=1-4"),
        (SWEEP, 0, "the array index is 0"),
        ("lr 3", 1, "line 1: lr: expected section.key=value"),
        ("# one\na.b='x", 1, "line 2: no closing quotation"),
    ],
)
def test_a_line_that_is_not_there_or_is_none_is_said(
    tmp_path: Path, text: str, number: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.txt"
    path.write_text(text)
    assert main([str(path), str(number)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["sweep.txt"], ["sweep.txt", "x"], ["a", "1", "2"]])
def test_sweep_says_what_it_wants(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "expected a sweep file and a line's number" in error and error.count("\n") == 1


def dry_run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "slurm/train.sh", *arguments],
        cwd=REPOSITORY,
        env={**environment(), "PYTHON": sys.executable, "VENV": "/none", **variables},
        capture_output=True,
        text=True,
    )


def test_the_job_of_a_sweep_whose_folder_has_a_space(tmp_path: Path) -> None:
    """And --dry-run may come last."""
    sweep = tmp_path / "sweep.txt"
    sweep.write_text(
        "# first\r\n\r\ntraining.steps=7 model.hypernetwork.targets=[q_proj, v_proj]\r\n"
    )
    folder = tmp_path / "my run-%a"
    done = dry_run(
        "--config",
        "quickstart-smoke",
        f"run.folder={folder}",
        "--dry-run",
        SWEEP=str(sweep),
        SLURM_ARRAY_TASK_ID="1",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "my\\ run-1 training.steps=7" in done.stdout and "\\[q_proj\\,\\ v_proj\\]" in done.stdout
    )
    refused = dry_run(
        "--dry-run",
        "--config",
        "quickstart-smoke",
        f"run.folder={tmp_path}/a",
        SLURM_ARRAY_TASK_ID="1",
    )
    assert refused.returncode == 2 and "an array needs %a in run.folder" in refused.stderr


def test_a_sweep_without_an_array_is_no_plain_job(tmp_path: Path) -> None:
    """It is refused; a dry run, which is made before there is an array, prints the first line's."""
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("training.steps=7\ntraining.steps=8\n")
    words = ["--config", "quickstart-smoke", f"run.folder={tmp_path}/run-%a"]
    refused = dry_run(*words, SWEEP=str(sweep))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"SWEEP={sweep} has a line for each array index" in refused.stderr
    assert "submit with --array=1-N" in refused.stderr
    done = dry_run("--dry-run", *words, SWEEP=str(sweep))
    assert done.returncode == 0 and "/run-1 training.steps=7" in done.stdout, done.stderr
    assert "this is the job of line 1; SLURM_ARRAY_TASK_ID=N" in done.stderr


_HOLD = """
import sys, time
from pathlib import Path
from ship_ds.runtime.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
print("taken", flush=True)
time.sleep(60)
"""


@contextmanager
def held(folder: Path, **variables: str) -> Iterator["subprocess.Popen[str]"]:
    """By another process, which has taken the folder and is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "taken\n"
            yield process
        finally:
            process.kill()


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with (
        held(tmp_path),
        pytest.raises(UserError, match=r"run\.folder: .*another run is writing there"),
    ):
        RunLock(tmp_path).take()
    first_here, again_here = RunLock(tmp_path), RunLock(tmp_path)
    first_here.take()
    again_here.take()  # the same process
    del again_here
    other = subprocess.run(
        [sys.executable, "-c", _HOLD, str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert "another run is writing there" in other.stderr, "the first still has it"
    shutil.rmtree(tmp_path)
    RunLock(tmp_path).take()
    assert (tmp_path / ".lock").exists(), "a folder of that name is another one"


def in_job(job: str, restarts: int) -> dict[str, str]:
    return {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restarts)}


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the second start of job 77, and waits for half a second."""
    for name, value in in_job("77", 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run_lock, "_WAIT_SECONDS", 0.5)
    monkeypatch.setattr(run_lock, "_PAUSE_SECONDS", 0.1)


@pytest.mark.usefixtures("requeued")
def test_a_requeued_job_goes_on_without_the_lock_of_a_start_that_was_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As NFS 3 keeps it for a node that is gone. What it then has is its own: a third is refused,
    though the first lives."""
    with held(tmp_path, **in_job("77", 0)) as first:
        RunLock(tmp_path).take()
        who = f"locked by an earlier start of this job (process {first.pid} on {platform.node()}, "
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 2 and all(f"{tmp_path}: {who}job 77)" in line for line in said)
        assert "waiting for its end" in said[0] and "going on without its lock" in said[1]
        third = subprocess.run(
            [sys.executable, "-c", _HOLD, str(tmp_path)],
            env=environment(**in_job("78", 0)),
            capture_output=True,
            text=True,
        )
    assert "another run is writing there (process" in third.stderr and "job 77)" in third.stderr
    assert json.loads((tmp_path / ".lock").read_text())["restarts"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.usefixtures("requeued")
def test_a_requeued_job_waits_for_a_start_that_is_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(tmp_path, **in_job("77", 0)) as first:
        monkeypatch.setattr(run_lock.time, "sleep", lambda _: (first.kill(), first.wait()))
        RunLock(tmp_path).take()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("requeued")
@pytest.mark.parametrize(("job", "restarts"), [("78", 0), ("77", 1), ("77", 2)])
def test_any_other_run_is_refused_at_once_and_named(
    job: str, restarts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock.time, "sleep", None)
    with (
        held(tmp_path, **in_job(job, restarts)) as first,
        pytest.raises(UserError, match=rf"\(process {first.pid} on .*, job {job}\); wait for its"),
    ):
        RunLock(tmp_path).take()


@pytest.mark.usefixtures("requeued")
@pytest.mark.parametrize("content", ["", "\0\xff", "[]", '{"host": 1}'])
def test_a_lock_that_does_not_say_whose_it_is_is_anothers(content: str, tmp_path: Path) -> None:
    with held(tmp_path):
        (tmp_path / ".lock").write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match="another run is writing there; wait"):
            RunLock(tmp_path).take()


@pytest.mark.parametrize("takes", [True, False])
@pytest.mark.parametrize(
    ("before", "written", "left"),
    [
        ([], [], []),
        ([], ["metrics.jsonl"], ["run", "run/.lock", "run/metrics.jsonl", "run/ranks"]),
        (["run"], [], ["run"]),  # a user's own, which may have rights that nobody makes again
        ([], ["ranks/mine"], ["run", "run/.lock", "run/ranks", "run/ranks/mine"]),
    ],
)
def test_a_start_that_wrote_nothing_takes_away_what_it_has_made(
    before: list[str], written: list[str], left: list[str], takes: bool, tmp_path: Path
) -> None:
    """`takes`: it came as far as to have the folder."""
    above = tmp_path / "above"
    for name in before:
        (above / name).mkdir(parents=True)
    run_lock.make_run_folder(above / "run")
    if takes:
        RunLock(above / "run").take()
    (above / "run" / "ranks").mkdir()
    (above / "run" / "ranks" / "rank-0.json").write_text("{}")
    for name in written:
        (above / "run" / name).write_text("")
    RunLock(above / "run").leave_unused()
    found = {str(path.relative_to(above)) for path in above.rglob("*")} - {"run/ranks/rank-0.json"}
    assert found == set(left) - ({"run/.lock"} if not takes else set())
    assert above.exists() == bool(left)


def test_a_folder_of_another_process_or_of_a_user_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    RunLock(tmp_path / "own").leave_unused()
    assert (tmp_path / "own").is_dir()
    folder = tmp_path / "theirs"
    run_lock.make_run_folder(folder)
    (folder / ".lock").write_text("")
    RunLock(folder).leave_unused()
    assert (folder / ".lock").exists()


def test_ports_stay_below_those_that_linux_hands_out_and_change_with_a_requeue() -> None:
    jobs = [{"SLURM_JOB_ID": str(number)} for number in (*range(3000), 10**7, 10**9)]
    ports = [ranks.slurm_port(job) for job in jobs]
    assert all(1024 < port < 32_768 for port in ports)
    assert len(set(ports[:3000])) == 3000  # jobs that run at once have ids close together
    again = [ranks.slurm_port(job | {"SLURM_RESTART_COUNT": "1"}) for job in jobs]
    assert all(one != other for one, other in zip(ports, again, strict=True))


@pytest.mark.parametrize(
    ("compact", "nodes"),
    [
        ("node1", ["node1"]),
        ("node[1-2]", ["node1", "node2"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
        ("a-b[1]-ib,c", ["a-b1-ib", "c"]),
    ],
)
def test_a_node_list_without_scontrol(
    compact: str, nodes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert ranks.slurm_nodes(compact, {}) == nodes


def test_a_scontrol_that_fails_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that has Slurm's programs and no slurm.conf."""
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho 'error: s_p_parse_file: unable to read' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert ranks.slurm_nodes("node[1-2]", {}) == ["node1", "node2"]


@pytest.mark.parametrize(
    ("tasks", "given", "address"),
    [
        ("1", {}, "127.0.0.1"),
        ("1", {"MASTER_ADDR": "node9"}, "node9"),
        ("1", {"SHIP_DS_NODES": "node7 node8"}, "127.0.0.1"),  # of a job that submitted this one
        ("2", {}, "node1"),
        ("2", {"MASTER_ADDR": "node9"}, "node9"),
    ],
)
def test_a_single_task_meets_at_its_own_machine(
    tasks: str, given: dict[str, str], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    task = {
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": tasks,
        "SLURM_STEP_NODELIST": "node[1-2]",
    }
    found = ranks.slurm_ranks(task | given)
    assert found is not None and found["MASTER_ADDR"] == address
