"""The scripts of slurm/ beside programs that pretend to be Slurm's: what the ranks find in their
environment, and what a job does after its ranks have ended."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, environment

_SET = re.compile("SLURM_|SHIP_DS_|NCCL_|GLOO_|OMP_NUM_THREADS|TORCH_EXTENSIONS_DIR|MASTER_")
"""Variables of whoever runs the tests that the scripts would take over."""


@dataclass
class Job:
    """A job of train.sh with a trainer of the test's own.

    folder: of programs that come before Slurm's; run: the run folder.
    """

    folder: Path
    run: Path

    @property
    def logs(self) -> Path:
        return self.run / "logs" / "job-7"

    def program(self, name: str, text: str) -> Path:
        """What `name` does where the job calls it, as a script of bash."""
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        return path

    def calls(self, name: str) -> list[str]:
        """The arguments with which a program was called that writes them down."""
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def start(
        self, script: str = "train.sh", *arguments: str, restart: int = 0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", f"slurm/{script}", "--config", "quickstart-smoke", *arguments],
            cwd=REPOSITORY,
            env={
                **{name: text for name, text in environment().items() if not _SET.match(name)},
                "PATH": f"{self.folder}:{os.environ['PATH']}",
                "PYTHON": str(self.folder / "python"),
                "VENV": "/none",
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "node1",
                "SLURM_RESTART_COUNT": str(restart),
                **variables,
            },
            text=True,
            capture_output=True,
            check=False,
        )


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Its ranks end well; a test replaces `srun`, which has the run folder in $RUN and its logs in
    $LOGS."""
    folder, run = tmp_path / "bin", tmp_path / "run"
    folder.mkdir()
    run.mkdir()
    made = Job(folder, run)
    made.program("python", f"[[ $* != *preflight* ]] || echo {run}")
    made.program("srun", "true")
    made.program("squeue", f'echo "$*" >>{folder}/squeue.calls; echo RUNNING')
    made.program(
        "scontrol", f'[[ $1 != requeue ]] || echo "$*" >>{folder}/scontrol.calls; echo node1'
    )
    return made


@pytest.mark.parametrize("script", ["train.sh", "evaluate.sh", "convert.sh"])
def test_ranks_find_what_the_script_sets(script: str, job: Job) -> None:
    """Also at sites that submit with --export=NONE, which `srun` takes over."""
    job.program("srun", "env")
    done = job.start(
        script, SLURM_EXPORT_ENV="NONE", SLURM_CPUS_PER_TASK="6", SHIP_DS_NODES="node8 node9"
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    assert found["SLURM_EXPORT_ENV"] == "ALL"
    assert found["OMP_NUM_THREADS"] == "6"
    assert found["HF_HUB_OFFLINE"] == "1"
    # Those of a training job that submitted this one are not its own.
    assert found.get("SHIP_DS_NODES") == ("node1" if script == "train.sh" else None)
    assert found["TORCH_EXTENSIONS_DIR"] == str(REPOSITORY / ".build" / "torch_extensions")


MODULE = {"BASH_FUNC_module%%": "() { echo loaded $2 $NOT_SET_BY_ANYBODY; }"}


@pytest.mark.parametrize("script", ["train.sh", "evaluate.sh"])
def test_modules_and_environments_may_read_what_is_not_set(script: str, job: Job) -> None:
    activate = job.folder / "venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("echo activated $NOT_SET_BY_ANYBODY\n")
    done = job.start(script, MODULES="cuda", VENV=str(job.folder / "venv"), **MODULE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("loaded cuda\nactivated\n")


@pytest.mark.skipif(
    any(Path(f"/etc/profile.d/{name}.sh").exists() for name in ("modules", "lmod")),
    reason="has modules",
)
@pytest.mark.parametrize("script", ["train.sh", "evaluate.sh"])
def test_modules_on_a_node_without_them_are_one_line(script: str, job: Job) -> None:
    done = job.start(script, MODULES="cuda/12.6")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "MODULES=cuda/12.6: there is no `module` on" in done.stderr


@pytest.mark.parametrize(
    ("given", "gloo"),
    [
        ({"NCCL_SOCKET_IFNAME": "lo"}, "lo"),
        ({"NCCL_SOCKET_IFNAME": "=lo"}, "lo"),
        ({"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "eth9"}, "eth9"),
        ({"NCCL_SOCKET_IFNAME": "^lo"}, None),
        ({"NCCL_SOCKET_IFNAME": "lo,eth9"}, None),
        ({"NCCL_SOCKET_IFNAME": "l"}, None),  # NCCL takes whatever begins so
        ({}, None),
    ],
)
def test_gloo_takes_the_interface_of_nccl_where_that_is_one(
    given: dict[str, str], gloo: str | None, job: Job
) -> None:
    job.program("srun", "env")
    done = job.start(**given)
    assert done.returncode == 0, done.stderr
    found = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    assert found.get("GLOO_SOCKET_IFNAME") == gloo
    assert found.get("NCCL_SOCKET_IFNAME") == given.get("NCCL_SOCKET_IFNAME")


ANSWERS = """
[[ $1 != show ]] || exec echo node1
echo "$*" >>{folder}/{name}.calls
case $(wc -l <{folder}/{name}.calls) in {cases} esac
"""


def answers(job: Job, name: str, cases: str) -> None:
    """What a program of Slurm says the first time, the second, and so on; the nodes at all
    times."""
    job.program(name, ANSWERS.format(folder=job.folder, name=name, cases=cases))


@pytest.mark.parametrize("code", [9, 75])
def test_a_controller_that_does_not_answer_at_once_is_asked_again(code: int, job: Job) -> None:
    job.program("srun", f"exit {code}")
    answers(job, "squeue", "1) exit 1 ;; 2) ;; *) echo RUNNING ;;")
    answers(job, "scontrol", "1) exit 1 ;;")
    done = job.start(RETRY_SECONDS="0")
    assert done.returncode == code and "could not be requeued" not in done.stderr
    assert done.stdout.count(": requeued") == 1
    assert len(job.calls("squeue")) == 4
    assert job.calls("scontrol") == ["requeue 7", "requeue 7"]


@pytest.mark.parametrize(
    ("squeue", "scontrol"), [("exit 1", "exit 1"), ("", "true"), ("echo RUNNING", "exit 1")]
)
def test_a_job_that_cannot_be_requeued_says_so(squeue: str, scontrol: str, job: Job) -> None:
    job.program("srun", "exit 75")
    job.program("squeue", squeue)
    answers(job, "scontrol", f"*) {scontrol} ;;")
    done = job.start(RETRY_SECONDS="0")
    assert done.returncode == 75
    assert done.stderr == (
        "slurm/train.sh: job 7 could not be requeued: sbatch the same command again\n"
    )


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED"])
def test_a_job_that_runs_no_more_is_left_to_slurm(state: str, job: Job) -> None:
    """Cancelled, or preempted by Slurm, which requeues it by itself; or requeued although the
    request, which was ended with the job, says that it failed."""
    job.program("srun", "exit 75")
    answers(job, "squeue", f"1) echo RUNNING ;; *) echo {state} ;;")
    answers(job, "scontrol", "*) exit 143 ;;")
    done = job.start(RETRY_SECONDS="0")
    assert done.returncode == 75 and done.stderr == "" and len(job.calls("scontrol")) == 1
    done = job.start(RETRY_SECONDS="0")
    assert done.returncode == 75 and done.stderr == "" and "requeue" not in done.stdout
    assert len(job.calls("scontrol")) == 1


def test_the_last_job_of_an_array_is_requeued_alone(job: Job) -> None:
    """Slurm gives it the array's own id, by which it means all of them."""
    job.program("srun", "exit 75")
    job.program("squeue", '[[ $* == *"--jobs 7_2 "* ]] || echo RUNNING; echo RUNNING')
    of_array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    done = job.start("train.sh", "run.folder=run-%a", RETRY_SECONDS="0", **of_array)
    assert done.returncode == 75, done.stderr
    assert job.calls("scontrol") == ["requeue 7_2"]


def latest(job: Job, name: str) -> None:
    (job.run / "checkpoints").mkdir(exist_ok=True)
    (job.run / "checkpoints" / "latest").write_text(f"{name}\n")


@pytest.mark.parametrize(("code", "killed"), [(75, False), (138, False), (138, True)])
def test_preemptions_are_counted_from_the_newest_checkpoint(
    code: int, killed: bool, job: Job
) -> None:
    """A time limit that is shorter than loading takes would bring the job back for ever. Crashes
    are counted by themselves."""
    job.program("srun", "kill -USR1 $$" if killed else f"exit {code}")
    starts = [job.start(restart=number, MAX_PREEMPTIONS="2") for number in range(2)]
    job.program("srun", "exit 9")
    starts.append(job.start(restart=2, MAX_PREEMPTIONS="2", MAX_FAILURES="1"))
    assert all(f"code {one.returncode}" in one.stdout for one in starts)
    job.program("srun", f"exit {code}")
    latest(job, "step-00000004")
    starts += [job.start(restart=number, MAX_PREEMPTIONS="2") for number in (3, 4)]
    assert len(job.calls("scontrol")) == len(starts) == 5
    last = job.start(restart=5, MAX_PREEMPTIONS="2")
    assert last.returncode == code and len(job.calls("scontrol")) == 5
    assert last.stdout.endswith(
        "more than MAX_PREEMPTIONS=2 preemptions after step-00000004: not requeued\n"
    )


def test_what_slurm_requeues_by_itself_is_not_counted(job: Job) -> None:
    job.program("srun", "exit 75")
    job.program("squeue", "echo COMPLETING")
    for number in range(3):
        done = job.start(restart=number, MAX_PREEMPTIONS="1")
        assert done.returncode == 75 and "not requeued" not in done.stdout


def test_ten_preemptions_are_too_many(job: Job) -> None:
    job.program("srun", "exit 75")
    starts = [job.start(restart=number) for number in range(11)]
    assert len(job.calls("scontrol")) == 10
    assert "more than MAX_PREEMPTIONS=10 preemptions after the start" in starts[-1].stdout


RANKS = """
rank() { echo "$2" >>{logs}/rank-$1.log; }
rank 10 "ship-ds: rank 10: another rank has ended, or the network to it (from [::1]:4711)"
rank 2 "ship-ds: rank 2: another rank has ended, or the network to it (from [::1]:4712)"
rank 0 "ship-ds: resumed from step 4"
rank 0 "Traceback (most recent call last):"
rank 0 "ValueError: of rank 0"
"""


def test_a_failed_start_says_the_last_line_of_each_rank(job: Job) -> None:
    """What ranks have in common once, and nothing of the start before."""
    job.program("srun", f"rank() {{ echo $2 >>{job.logs}/rank-$1.log; }}; rank 3 'ship-ds: old'")
    assert job.start().returncode == 0
    job.program("srun", RANKS.replace("{logs}", str(job.logs)) + "\nexit 137")
    done = job.start(restart=1)
    assert done.returncode == 137 and done.stderr == ""
    assert done.stdout.splitlines()[1:4] == [
        "rank-0: ship-ds: resumed from step 4",
        "rank-0: ValueError: of rank 0",
        "rank-2: ship-ds: rank 2: another rank has ended, or the network to it "
        "(from [::1]:4712) (and 1 more)",
    ]
    assert job.calls("scontrol") == ["requeue 7"]


@pytest.mark.parametrize("code", [2, 75, 137])
def test_bad_input_of_one_rank_is_the_jobs_own(code: int, job: Job) -> None:
    """Whatever `srun` returns for those that were killed. What a start before it left is not."""
    job.program("srun", f'echo "ship-ds: /nowhere" >"$SHIP_DS_BAD_INPUT"; exit {code}')
    done = job.start()
    assert done.returncode == 2 and done.stdout.endswith("ship-ds: /nowhere\n")
    assert not job.calls("scontrol") and not job.calls("squeue")
    job.program("srun", "exit 137")
    for restart in (0, 1):
        done = job.start(restart=restart)
        assert done.returncode == 137 and len(job.calls("scontrol")) == restart + 1


def test_bad_input_without_a_line_is_told_by_the_logs(job: Job) -> None:
    """As where the disk is full."""
    says = f"echo 'ship-ds: its disk is full' >>{job.logs}/rank-0.log"
    for leaves in ('touch "$SHIP_DS_BAD_INPUT"; exit 137', "exit 2"):
        job.program("srun", f"{says}; {leaves}")
        done = job.start()
        assert done.returncode == 2 and not job.calls("scontrol")
        assert done.stdout.splitlines()[1:] == ["rank-0: ship-ds: its disk is full"]
