"""Ten kinds of fault in eight phases of a run, three seeds each: every resume is exact, and a hang
is named within a minute.

    make soak                       # all of it, beside the other soak tests
    SHARD=2/6 make soak             # the second sixth, which takes under an hour on two idle cores
    python -m pytest -m soak -s tests/soak/test_faults.py -k "sigkill-0"      # one run of eight
    FAULT_PHASES=save,step python -m pytest ...                               # some phases alone

The figures of all shards go to runs/faults.json. A full disk is a tmpfs that is filled to the last
byte, which root alone may mount: without, its cells say so.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ship_ds.files import sha256, write_json
from tests.conftest import REPOSITORY, environment
from tests.soak.faults import KINDS, ORDERS, Bench, Fault, Run, wrong_end

pytestmark = pytest.mark.soak
WANTED = os.environ.get("FAULT_PHASES", "").split(",") if "FAULT_PHASES" in os.environ else None
FIGURES = REPOSITORY / "runs" / "faults.json"
SIZE_OF_DISK = "192m"


@pytest.fixture(scope="module")
def bench(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The undisturbed run, and the op that it compiled."""
    root = tmp_path_factory.mktemp("undisturbed")
    extensions = root / "extensions"
    shutil.copytree(environment()["TORCH_EXTENSIONS_DIR"], extensions)
    run = Run(root / "disk", Bench(root, data, extensions=extensions))
    outcome = run.start()
    assert outcome.code == 0, outcome.log[-4000:]
    weights = sha256(run.folder / "bundle" / "ship.safetensors")
    print(f"undisturbed: first step after {outcome.seconds_to_first_step:.0f} s")
    return Bench(root, data, run.rows(), weights, run.ops)


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
    cells: list[dict[str, Any]] = []
    problems: list[str] = []
    num_runs = 0
    run: Run | None = None
    of_this_run: list[dict[str, Any]] = []
    for phase in [*phases, None]:
        if run is None:
            if phase is None:
                break
            num_runs += 1
            place = (disk if kind == "disk" and disk else tmp_path) / f"run-{num_runs}"
            run, of_this_run = Run(place, bench), []
        fault = None if phase is None else Fault.draw(kind, phase, seed)
        outcome = run.start(fault, disk if kind == "disk" else None)
        if outcome.seconds_to_first_step is not None and of_this_run:
            of_this_run[-1]["seconds to restart"] = round(outcome.seconds_to_first_step, 1)
        found = wrong_end(fault, outcome) if fault is not None else list(outcome.problems)
        is_whole = outcome.code == 0
        if fault is None and not is_whole:
            found.append(f"the start that nobody disturbed ended with {outcome.code}")
        difference = run.difference_of_whole() if is_whole else run.difference()
        if difference is not None:
            found.append(difference)
        if fault is not None:
            of_this_run.append(row_of(fault, outcome))
            cells.append(of_this_run[-1])
        for cell in of_this_run:
            cell["exact"] = cell.get("exact", True) and difference is None
            cell["resumed"] = is_whole
        of_this_run[-1].setdefault("problems", []).extend(found)
        name = str(fault) if fault is not None else f"{kind}, seed {seed}: left alone"
        print(f"{name}: code {outcome.code}, ranks {outcome.codes}; {found or 'as it should be'}")
        for one in found:
            problems.append(f"{name}: {one}")
            keep = FIGURES.parent / "faults" / f"{kind}-{phase}-{seed}.log"
            keep.parent.mkdir(parents=True, exist_ok=True)
            keep.write_text(outcome.log)
        record(cells)
        if is_whole:
            run = None
    assert not problems, "\n".join(problems)


def row_of(fault: Fault, outcome: Any) -> dict[str, Any]:
    """A cell of runs/faults.json."""

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 1)

    return {
        "kind": fault.kind,
        "phase": fault.phase,
        "seed": fault.seed,
        "where": str(fault),
        "code": outcome.code,
        "codes of ranks": outcome.codes,
        "seconds until named": rounded(outcome.seconds_to_name),
        "seconds until the end": rounded(outcome.seconds_to_end),
    }
