"""A real Slurm cluster on this machine: one controller, three nodes of one CPU and one pretended
GPU each.

    with Cluster(folder) as cluster:
        job = cluster.sbatch(
            "slurm/train.sh", "--config", "quickstart-smoke", options=["--nodes=2"]
        )

`lose(node)` kills a node's daemon and everything it started, as a power cut would. Needs root and
Debian's slurm-wlm.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

NODES = ("node1", "node2", "node3")
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def missing() -> str | None:
    """Why no cluster can start here, or None."""
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm"
    return None if os.geteuid() == 0 else "slurmctld and slurmd need root"


class Cluster:
    """Starts on entry and ends, with every process of its jobs, on exit; all its files are in
    `folder`."""

    def __init__(self, folder: Path, port: int = 16800) -> None:
        self.folder, self.port = folder, port
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        self._write_config()
        try:
            self._start("slurmctld", ["slurmctld", "-D"])
            for node in NODES:
                self.add(node)
            self.wait("three idle nodes", lambda: self.idle() == set(NODES), 60)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        for name in (*NODES, "slurmctld"):
            self.lose(name)

    def idle(self) -> set[str]:
        return set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())

    def add(self, node: str) -> None:
        self._start(node, ["slurmd", "-D", "-N", node])

    def lose(self, node: str) -> None:
        """SIGKILL for the node's slurmd, its step daemons and their tasks."""
        daemon = self.daemons.pop(node, None)
        if daemon is not None:
            daemon.kill()
            daemon.wait()
        for process in self._processes_on(node):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def sbatch(
        self,
        *command: str,
        options: Sequence[str] = (),
        cwd: Path,
        environment: Mapping[str, str] = {},
    ) -> str:
        """Submit from `cwd`; the job's id."""
        done = subprocess.run(
            ["sbatch", "--parsable", *options, *command],
            cwd=cwd,
            env={**self.environment, **environment},
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def run(self, *command: str) -> str:
        """A Slurm client's standard output."""
        return subprocess.run(
            command, env=self.environment, text=True, capture_output=True, check=False
        ).stdout

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`, such as JobState, Restarts, ExitCode or NodeList."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return next((word.partition("=")[2] for word in words if word.startswith(name + "=")), "")

    def wait(self, what: str, condition: Callable[[], object], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} after {seconds} s\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-40:])
            for path in sorted(self.folder.glob("*.log"))
        )

    def _start(self, name: str, command: Sequence[str]) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        self.daemons[name] = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**self.environment, "SHIP_DS_NODE": name},
            cwd=self.folder,
        )
        log.close()

    def _processes_on(self, node: str) -> list[int]:
        """Step daemons carry the slurmd's environment, and tasks the name of their node."""
        marks = (f"SHIP_DS_NODE={node}".encode(), f"SLURMD_NODENAME={node}".encode())
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if f"SLURM_CONF={self.folder / 'slurm.conf'}".encode() in variables and any(
                mark in variables for mark in marks
            ):
                found.append(int(path.parent.name))
        return found

    def _write_config(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 "
            f"Port={self.port + 1 + index} CPUs=2 RealMemory=8000 "
            "Gres=gpu:1"
            for index, node in enumerate(NODES)
        )
        (self.folder / "slurm.conf").write_text(f"""ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={self.port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool-%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
MinJobAge=600
SchedulerParameters=sched_interval=1,batch_sched_delay=0
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
