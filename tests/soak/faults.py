"""Runs of two ranks that fail on purpose, again and again, until they are done.

A run folder has a fault of one kind in each phase, one after the other, each in a start of the same
command; the last start is left alone. What a fault leaves behind is therefore gone on from by the
next start, which fails elsewhere. After every start the rows of metrics.jsonl are those of the run
that nobody disturbed, and after the last one the bundle's weights are too.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ship_ds.files import sha256
from tests.conftest import REPOSITORY, environment
from tests.runtime.test_resume import LOSSES, _ranks_of

KINDS = (
    "exception",
    "thread",
    "abort",
    "sigsegv",
    "sigint",
    "sigkill",
    "sigterm",
    "sigstop",
    "gil",
    "disk",
)
HANGS = ("sigstop", "gil")
SECONDS_A_START = 600
SECONDS_TO_NAME = 60
NUM_STEPS = 12
HANG_MINUTES = 0.75
"""Above 30 s, after which a rank without a sign of life is named, and below what a soak has time
for. A user has 20."""

ORDERS = (
    ("start", "compile", "load", "data", "step", "save", "evaluation", "report"),
    ("step", "load", "start", "save", "data", "compile", "evaluation", "report"),
    ("compile", "step", "data", "evaluation", "start", "save", "load", "report"),
)
"""In which order a seed's run meets the phases: at the first start, and at one that goes on from a
checkpoint."""


@dataclass(frozen=True)
class Site:
    """A function of the package, or of torch, in which a phase can be hit.

    calls: the fault comes in one of its first so many calls. rank: the only one that calls it;
    None: both do. spared: calls before these.
    """

    module: str
    name: str
    calls: int = 1
    rank: int | None = None
    spared: int = 0


OP = "ShareMemCommBuilder"
"""What a run compiles in the phase of that name. No run on CPUs needs an op; one on GPUs that
offloads its optimiser compiles another, which takes four times as long."""
CHECKPOINT, ENGINE = "ship_ds.runtime.checkpoint", "ship_ds.runtime.engine"
PHASES = {
    "start": (
        # The first call is the program's own before torch is there, and before it hears signals.
        Site("ship_ds.runtime.preflight", "check", spared=1),
        Site("ship_ds.runtime.ranks", "start"),
        Site("ship_ds.runtime.run_lock", "RunLock.take", rank=0),
    ),
    "compile": (
        Site("ship_ds.runtime.compiled_ops", "build"),
        # Whoever comes first compiles.
        Site("torch.utils.cpp_extension", "_run_ninja_build", rank=-1),
    ),
    "load": (
        # The first call counts weights on the meta device, and is done without where it fails.
        Site("ship_ds.model.assemble", "build_ship", spared=1),
        Site(ENGINE, "Engine.__init__"),
        Site(CHECKPOINT, "newest_good_to_resume"),
    ),
    "data": (
        Site("ship_ds.data.task_files", "FilesSource.read"),
        Site("ship_ds.data.task_files", "FilesSource.fingerprint"),
        Site("ship_ds.data.token_cache", "tokenise_all"),
    ),
    "step": (
        Site("ship_ds.data.sampler", "StepSampler.draw_rank", calls=2),
        Site(ENGINE, "Engine.backward", calls=2),
        Site(ENGINE, "Engine.step", calls=2),
        Site("ship_ds.runtime.agreement", "agree", calls=2),
        Site("ship_ds.monitor.writer", "Monitor.step", calls=2, rank=0),
    ),
    "evaluation": (
        Site("ship_ds.evaluation.measure", "measure_over_ranks", calls=2),
        Site("ship_ds.inference.deduction", "answer_latents", calls=2),
        Site("ship_ds.monitor.writer", "Monitor.evaluation", rank=0),
    ),
    "save": (
        Site(ENGINE, "Engine.save_shards"),
        Site(CHECKPOINT, "_hash_shared_out"),
        Site(CHECKPOINT, "replace_folder", rank=0),
        Site(CHECKPOINT, "_prune", rank=0),
    ),
    "report": (
        Site("ship_ds.bundle", "write_bundle", rank=0),
        Site("ship_ds.evaluation.final_report", "measure_run"),
        Site("ship_ds.evaluation.final_report", "write", rank=0),
    ),
}


@dataclass(frozen=True)
class Fault:
    """One injection; `target` is whom a signal goes to."""

    kind: str
    phase: str
    seed: int
    site: Site
    call: int
    before: bool
    rank: int | None
    target: str

    @classmethod
    def draw(cls, kind: str, phase: str, seed: int) -> "Fault":
        """The one of these three; the same in every process."""
        rng = random.Random(f"{kind} {phase} {seed}")
        site = rng.choice(PHASES[phase])
        rank = {None: rng.randrange(2), -1: None}.get(site.rank, site.rank)
        targets = ["rank", "ranks", "launcher"] if kind in ("sigint", "sigterm") else ["rank"]
        return cls(
            kind,
            phase,
            seed,
            site,
            site.spared + rng.randint(1, site.calls),
            rng.random() < 0.5,
            rank,
            rng.choice(targets),
        )

    def variables(self, fired: Path, disk: Path) -> dict[str, str]:
        """What tests/soak/injected/sitecustomize.py reads."""
        plan = {
            "kind": self.kind,
            "module": self.site.module,
            "name": self.site.name,
            "call": self.call,
            "before": self.before,
            "rank": self.rank,
            "target": self.target,
            "fired": str(fired),
            "disk": str(disk),
            "op": OP if self.phase == "compile" else None,
        }
        injected = REPOSITORY / "tests" / "soak" / "injected"
        return {"FAULT": json.dumps(plan), "PYTHONPATH": f"{injected}:{REPOSITORY}"}

    def __str__(self) -> str:
        when = "before" if self.before else "after"
        who = "the first rank there" if self.rank is None else f"rank {self.rank}"
        whom = "" if self.target == "rank" else f", to the {self.target}"
        return (
            f"{self.kind} in {self.phase}, seed {self.seed}: {who}, {when} call {self.call} of "
            f"{self.site.name}{whom}"
        )


@dataclass
class Outcome:
    """What a start came to. Seconds are None where there was nothing to measure; `codes` are those
    that torchrun reports, by rank, negative for a signal; `hit` is the rank that failed."""

    code: int
    codes: dict[int, int]
    log: str
    hit: int | None
    seconds_to_end: float | None = None
    seconds_to_name: float | None = None
    seconds_to_first_step: float | None = None
    problems: list[str] = field(default_factory=list)


@dataclass
class Bench:
    """What the runs of the matrix have in common."""

    data: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of the undisturbed run."""
    weights: str = ""
    """SHA-256 of the undisturbed run's."""
    extensions: Path | None = None
    """A folder with the compiled `OP`, that runs copy."""

    def settings(self) -> list[str]:
        """Of every run of the matrix: under a minute on two idle cores, and each phase in it."""
        return [
            *("--config", "quickstart-smoke"),
            f"data={{kind: files, path: {self.data}}}",
            f"training.steps={NUM_STEPS}",
            f"training.hang_minutes={HANG_MINUTES}",
            "training.grace_seconds=60",
            "checkpoint.every_steps=2",
            "evaluation.num_tasks=2",
            "evaluation.num_final_tasks=2",
        ]


class Run:
    """One run folder and its own folder of compiled ops, both below `root`; what it says goes to
    `notes`, which no fault fills."""

    def __init__(
        self, root: Path, bench: Bench, notes: Path, settings: Sequence[str] | None = None
    ) -> None:
        self.root, self.bench, self.notes = root, bench, notes
        self.settings = bench.settings() if settings is None else settings
        self.folder, self.ops = root / "run", root / "ops"
        self.num_starts = 0
        root.mkdir(parents=True, exist_ok=True)
        if bench.extensions is not None and not self.ops.exists():
            shutil.copytree(bench.extensions, self.ops)
            self.ops.chmod(0o700)

    @property
    def log(self) -> Path:
        """Of the newest start."""
        return self.notes / f"{self.root.name}-{self.num_starts}.log"

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "ship_ds.train"),
            f"run.folder={self.folder}",
            *self.settings,
        ]

    def start(
        self,
        fault: Fault | None = None,
        disk: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Start it once and wait for its end; a fault that did not come is a problem."""
        if fault is not None and fault.phase == "compile":
            # What remains to be done is to link it: seconds, and the same lock is held meanwhile.
            for library in self.ops.glob("*/*.so"):
                library.unlink()
        self.num_starts += 1
        fired = self.notes / f"{self.root.name}-{self.num_starts}"
        extra = fault.variables(fired, disk or self.root) if fault is not None else variables or {}
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                self.command(),
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                env={**environment(), "TORCH_EXTENSIONS_DIR": str(self.ops), **extra},
                start_new_session=True,
                # A shell has its background jobs ignore it, and so would these.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            try:
                outcome = self._watch(process, fired)
            except BaseException:
                for number in _ranks_of(self.folder):
                    os.kill(number, signal.SIGKILL)
                raise
        if disk is not None:
            (disk / "balloon").unlink(missing_ok=True)
        if fault is not None and outcome.hit is None:
            outcome.problems.append("the fault did not come")
        return outcome

    def _watch(self, process: "subprocess.Popen[bytes]", fired: Path) -> Outcome:
        begun, num_rows = time.time(), self.num_rows()
        named = first_step = None
        while process.poll() is None and time.time() < begun + SECONDS_A_START:
            time.sleep(0.1)
            if first_step is None and self.num_rows() != num_rows:
                num_rows, before = self.num_rows(), num_rows
                first_step = time.time() if num_rows > before else None
            if named is None and fired.exists() and b"no sign of life for" in self.log.read_bytes():
                named = time.time()
        ended = time.time()
        problems = self._leftovers(process)
        text = self.log.read_text(errors="replace")
        codes = {
            int(rank): int(code)
            for rank, code in re.findall(r"rank +: (\d+) .*\n\s*exitcode +: (-?\d+)", text)
        }
        at, hit = None, None
        if fired.exists():
            when, rank = fired.read_text().split()
            at, hit = float(when), int(rank)
        return Outcome(
            process.returncode,
            codes,
            text,
            hit,
            None if at is None else ended - at,
            None if at is None or named is None else named - at,
            None if first_step is None else first_step - begun,
            problems,
        )

    def _leftovers(self, process: "subprocess.Popen[bytes]") -> list[str]:
        """End what is left of a start, and say so: nobody would on a user's machine."""
        deadline = time.time() + 40
        while process.poll() is not None and _ranks_of(self.folder) and time.time() < deadline:
            time.sleep(0.2)
        left = _ranks_of(self.folder)
        for number in left:
            os.kill(number, signal.SIGKILL)
        problems = [f"{len(left)} processes were left"] if left else []
        if process.poll() is None:
            process.wait()
            problems.append(f"no end within {SECONDS_A_START} s")
        return problems

    def num_rows(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def rows(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def difference(self) -> str | None:
        """The first row that differs from the undisturbed run's, or None."""
        for number, row in enumerate(self.rows()):
            for name in ("step", *LOSSES):
                if row[name] != self.bench.rows[number][name]:
                    return f"step {number}: {name} {row[name]} != {self.bench.rows[number][name]}"
        return None

    def is_done(self) -> bool:
        return (self.folder / "report.json").exists()

    def difference_of_whole(self) -> str | None:
        """The same of a run that is done, whose last row and weights have to be there too."""
        if len(self.rows()) != NUM_STEPS:
            return f"{len(self.rows())} rows"
        if sha256(self.folder / "bundle" / "ship.safetensors") != self.bench.weights:
            return "the bundle's weights differ"
        if (
            not (self.folder / "report.json").exists()
            and not (self.folder / "report_failure.txt").exists()
        ):
            return "no report"
        return self.difference()


def wrong_end(fault: Fault, outcome: Outcome) -> list[str]:
    """What is not as docs/troubleshooting.md has it about how a start ended."""
    problems = list(outcome.problems)
    # torchrun lists no ranks where all ended with 0.
    code = outcome.code if outcome.hit is None else outcome.codes.get(outcome.hit, outcome.code)
    if fault.kind == "disk":  # it is full for all, and who writes first finds out
        code = max(outcome.codes.values(), default=outcome.code)
    wanted = codes_of(fault)
    if fault.kind in HANGS:
        if outcome.seconds_to_name is None or outcome.seconds_to_name > SECONDS_TO_NAME:
            problems.append(f"named after {outcome.seconds_to_name} s")
        if 76 not in outcome.codes.values() and -9 not in outcome.codes.values():
            problems.append(f"codes {outcome.codes} instead of 76 and -9")
    elif fault.target == "launcher":
        # torchrun's own code; it gives its ranks 30 s and reports none of their codes.
        if outcome.code == 0 and fault.phase != "report":
            problems.append("code 0")
    elif code not in wanted:
        problems.append(f"codes {outcome.codes} of {outcome.code} instead of {wanted}")
    # Then comes torchrun's own.
    own = re.split(r"torch.distributed.elastic", outcome.log)[0]
    if outcome.code and fault.kind in ("sigterm", "disk", "sigint") and "Traceback" in own:
        problems.append("a trace of Python")
    return problems


def codes_of(fault: Fault) -> tuple[int, ...]:
    """Those that the rank which was hit may end with."""
    in_report = fault.phase == "report"
    if fault.kind == "exception" and fault.site.name == "_run_ninja_build":
        # What torch raises there is a compiler's failure: one line of what to install.
        return (2,)
    return {
        # A report that fails is one line; a bundle that cannot be written is a crash.
        "exception": (0,) if in_report and "bundle" not in fault.site.module else (1,),
        "thread": (1,) if fault.site.name == "StepSampler.draw_rank" else (0,),
        "abort": (-6,),
        "sigsegv": (-11,),
        "sigint": (130,),
        "sigkill": (-9,),
        "sigterm": (75,),
        "disk": (0, 2) if in_report else (2,),
    }.get(fault.kind, ())


def effective_share(
    seconds_between_failures: float,
    seconds_to_restart: float,
    seconds_between_saves: float,
    seconds_to_save: float,
) -> float:
    """The share of the time that goes into steps which are kept.

    Of the seconds between two failures each costs a restart, from the failure to the next step,
    and on average half of what lies between two saves; of what is left, a save takes its part:

        (1 - (restart + between saves / 2) / between failures) / (1 + save / between saves)

    Args:
        seconds_between_failures: on average.
        seconds_to_restart: from the failure to the first step that is new.
        seconds_between_saves: of training, saves left out.
        seconds_to_save: of one.
    """
    lost = seconds_to_restart + (seconds_between_saves + seconds_to_save) / 2
    kept = 1 - lost / seconds_between_failures
    return kept / (1 + seconds_to_save / seconds_between_saves)
