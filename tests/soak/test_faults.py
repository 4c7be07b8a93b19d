"""Ten kinds of fault in eight phases of a run, three seeds each: every resume is exact, and a hang
is named within a minute.

    make soak                       # all of it, beside the other soak tests
    make soak SHARD=2/10            # the second of ten shares, each with three runs of the matrix
    python -m pytest -m soak -s tests/soak/test_faults.py -k "sigkill-0"      # one run of eight
    FAULT_PHASES=save,step python -m pytest ...                               # some phases alone

The figures of all shards go to runs/faults.json. A full disk is a tmpfs that is filled to the last
byte, which root alone may mount: without, its cells say so.
"""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from filelock import FileLock

from ship_ds.config import load_config
from ship_ds.files import sha256, write_json
from ship_ds.monitor.machine import describe_machine
from tests.conftest import REPOSITORY, start
from tests.soak.faults import (
    CHECKPOINT,
    ENGINE,
    KINDS,
    OP,
    ORDERS,
    Bench,
    Fault,
    Outcome,
    Run,
    Site,
    effective_share,
    wrong_end,
)

pytestmark = pytest.mark.soak
WANTED = os.environ.get("FAULT_PHASES", "").split(",") if "FAULT_PHASES" in os.environ else None
FIGURES = REPOSITORY / "runs" / "faults.json"
SIZE_OF_DISK = "192m"


@pytest.fixture(scope="module")
def bench(data: Path) -> Bench:
    """The undisturbed run, and a compiled `OP`; kept in .build/ for as long as the code is the
    same, since every shard needs them."""
    digest = hashlib.sha256(json.dumps([version("torch"), version("deepspeed")]).encode())
    for path in sorted((REPOSITORY / "ship_ds").rglob("*.py")):
        digest.update(path.read_bytes())
    root = REPOSITORY / ".build" / f"undisturbed-{digest.hexdigest()[:12]}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "lock"):
        kept = root / "tasks.jsonl"
        run = Run(root / "place", Bench(kept), root)
        if not run.is_done():
            shutil.copy(data, kept)
            outcome = run.start()
            assert outcome.code == 0, outcome.log[-4000:]
            print(f"undisturbed: first step after {outcome.seconds_to_first_step:.0f} s")
        compiles = f"from ship_ds.runtime import compiled_ops; compiled_ops.build(['{OP}'], print)"
        done = start(["-c", compiles], timeout=600, TORCH_EXTENSIONS_DIR=str(run.ops))
        assert done.returncode == 0, done.stderr
    weights = sha256(run.folder / "bundle" / "ship.safetensors")
    return Bench(kept, run.rows(), weights, run.ops)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of its own; None: it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_OF_DISK}", "none", str(folder)]
    is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    yield folder if is_mounted else None
    if is_mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def record(rows: list[dict[str, Any]]) -> None:
    """Put the cells into runs/faults.json, in the place of what an earlier run found of them."""
    old = json.loads(FIGURES.read_text())["cells"] if FIGURES.exists() else []
    cells = {(row["kind"], row["phase"], row["seed"]): row for row in [*old, *rows]}
    FIGURES.parent.mkdir(exist_ok=True)
    write_json(FIGURES, {"cells": [cells[key] for key in sorted(cells)]})


class BadDay:
    """Runs of one kind of fault and one seed. A run that is done, as after a fault that harms
    nothing, is followed by a new one for the phases that are left."""

    def __init__(self, kind: str, seed: int, bench: Bench, notes: Path, disk: Path | None) -> None:
        self.kind, self.seed, self.bench, self.notes = kind, seed, bench, notes
        self.disk = disk
        self.problems: list[str] = []
        self.runs: list[Run] = []
        self.cells: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        """Cells of the run that is not done."""

    def new_run(self) -> Run:
        place = (self.disk or self.notes) / f"run-{len(self.runs)}"
        return Run(place, self.bench, self.notes)

    def meet(self, phase: str) -> None:
        """One start, with the fault in it."""
        if not self.open:
            self.runs.append(self.new_run())
        fault = Fault.draw(self.kind, phase, self.seed)
        outcome = self.runs[-1].start(fault, self.disk)
        self.open.append(row_of(fault, outcome))
        self.cells.append(self.open[-1])
        self.judge(str(fault), outcome, wrong_end(fault, outcome))

    def finish(self) -> None:
        """One start without a fault, where a run is not done."""
        if not self.open:
            return
        outcome = self.runs[-1].start(disk=self.disk)
        problems = list(outcome.problems)
        if outcome.code:
            problems.append(f"left alone it ended with {outcome.code}")
        self.judge(f"{self.kind}, seed {self.seed}: left alone", outcome, problems)

    def judge(self, name: str, outcome: Outcome, problems: list[str]) -> None:
        """Compare the run with the one that nobody disturbed, and write down what is found."""
        run = self.runs[-1]
        is_done = outcome.code == 0 and run.is_done()
        difference = run.difference_of_whole() if is_done else run.difference()
        for cell in self.open:
            cell["exact"] = cell["exact"] and difference is None
            cell["resumed to the end"] = is_done
        # Of the fault before, from which this start went on.
        before = self.open if outcome.hit is None else self.open[:-1]
        if before and outcome.seconds_to_first_step is not None:
            before[-1]["seconds to restart"] = round(outcome.seconds_to_first_step, 1)
        found = [*problems, *([] if difference is None else [difference])]
        self.open[-1]["problems"] += found
        self.problems += [f"{name}: {one}" for one in found]
        print(f"{name}: code {outcome.code}, ranks {outcome.codes}; {found or 'as it should be'}")
        if found:
            keep = FIGURES.with_suffix("") / f"{self.kind}-{self.seed}-{run.num_starts}.log"
            keep.parent.mkdir(parents=True, exist_ok=True)
            keep.write_text(outcome.log)
        record(self.cells)
        if is_done:
            self.open = []


@pytest.mark.parametrize("seed", range(len(ORDERS)))
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_in_each_phase_changes_no_step(
    kind: str, seed: int, bench: Bench, disk: Path | None, tmp_path: Path
) -> None:
    phases = [phase for phase in ORDERS[seed] if WANTED is None or phase in WANTED]
    if kind == "disk" and disk is None:
        reason = "a file system of its own cannot be mounted here"
        record([{"kind": kind, "phase": p, "seed": seed, "not run": reason} for p in phases])
        pytest.skip(reason)
    day = BadDay(kind, seed, bench, tmp_path, disk if kind == "disk" else None)
    for phase in phases:
        day.meet(phase)
    day.finish()
    assert not day.problems, "\n".join(day.problems)


def row_of(fault: Fault, outcome: Outcome) -> dict[str, Any]:
    """A cell of runs/faults.json."""
    seconds = {"until named": outcome.seconds_to_name, "until the end": outcome.seconds_to_end}
    # Of each cell, since no one call runs them all.
    machine = describe_machine()
    return {
        "date": machine["date"],
        "cpu": machine["cpu"],
        "kind": fault.kind,
        "phase": fault.phase,
        "seed": fault.seed,
        "where": str(fault),
        "code": outcome.code,
        "codes of ranks": outcome.codes,
        **{
            f"seconds {name}": None if value is None else round(value, 1)
            for name, value in seconds.items()
        },
        "exact": True,
        "problems": [],
    }


def test_how_much_of_the_time_goes_into_steps_that_are_kept(tmp_path: Path) -> None:
    """At one failure an hour, with the embedded default as `make quickstart` trains it: measured
    and written down. How much it is, is the machine's; that the formula was asked is tested."""
    config = load_config("quickstart")
    every_minutes = config.checkpoint.every_minutes
    assert every_minutes is not None
    settings = ["evaluation.every_steps=0", "evaluation.ends_with_report=false"]
    settings += ["--config", "quickstart", "training.steps=12", "checkpoint.every_steps=4"]
    settings += ["checkpoint.every_minutes=null"]
    run = Run(tmp_path / "run", Bench(tmp_path), tmp_path, settings)
    killed = Fault("sigkill", "step", 0, Site(ENGINE, "Engine.step"), 6, True, 1, "rank")
    times = tmp_path / "times"
    time_saves = Fault("time", "save", 0, Site(CHECKPOINT, "save"), 0, True, 0, "rank")
    first = run.start(killed)
    second = run.start(variables=time_saves.variables(times, tmp_path))
    assert second.code == 0, second.log[-4000:]
    assert first.seconds_to_end is not None and second.seconds_to_first_step is not None
    measured = {
        "seconds to restart": first.seconds_to_end + second.seconds_to_first_step,
        "seconds of a step": median(row["speed/step_seconds"] for row in run.rows()),
        "seconds of a save": median(map(float, times.read_text().split())),
    }
    # The first step that ends after the minutes is the one that is saved.
    between_saves = 60 * every_minutes + measured["seconds of a step"] / 2
    share = effective_share(
        3600, measured["seconds to restart"], between_saves, measured["seconds of a save"]
    )
    print(f"effective training time at one failure an hour: {share:.3f} of {measured}")
    path = FIGURES.with_name("effective_time.json")
    write_json(path, {**measured, "seconds between saves": between_saves, "share": share})
    kept = json.loads(path.read_text())
    between_saves = kept["seconds between saves"]
    lost = kept["seconds to restart"] + (between_saves + kept["seconds of a save"]) / 2
    again = (1 - lost / 3600) * between_saves / (between_saves + kept["seconds of a save"])
    assert kept["share"] == pytest.approx(again)
