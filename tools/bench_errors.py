"""How long bad input takes to be told, beside what pydantic and yaml take to be imported.

    python tools/bench_errors.py --rounds 15      # writes tools/results/errors.json

Each command is started once a round, in another order each round, so that a machine that is busy
for a while slows all of them alike. Wall time is what a user waits; processor time is less noisy.
"""

import argparse
import datetime
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "tools" / "results" / "errors.json"
SHIP = ["-m", "ship_ds.cli"]
COMMANDS = {
    "python alone": ["-c", "pass"],
    "import pydantic, yaml": ["-c", "import pydantic, yaml"],
    "import torch": ["-c", "import torch"],
    "wrong verb": [*SHIP, "trane"],
    "missing option": [*SHIP, "train"],
    "mistyped recipe": [*SHIP, "train", "--config", "quikstart"],
    "unknown key": [*SHIP, "train", "--config", "quickstart", "training.stepz=3"],
    "mistyped recipe, by module": ["-m", "ship_ds.train", "--config", "quikstart"],
    "missing base": [*SHIP, "train", "--config", "quickstart", "model.task_llm.base=nowhere"],
    "missing run": [*SHIP, "deduce", "x", "--run", "nowhere", "--out", "out"],
    "missing run (induce)": [*SHIP, "induce", "--run", "nowhere", "--file", "PAIRS"],
    "wrong method": [*SHIP, "evaluate", "--run", "nowhere", "--methods", "magic"],
    "missing adapter": [*SHIP, "merge", "nowhere", "--out", "out"],
    "missing checkpoint": [*SHIP, "bundle", "nowhere", "--out", "out"],
    "missing data": [*SHIP, "data", "nowhere"],
}


def timed(
    arguments: list[str], folder: Path
) -> tuple[float, float, subprocess.CompletedProcess[str]]:
    """Seconds on the wall and on the processor, and how it ended."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, processor, done


def measure(rounds: int) -> dict[str, Any]:
    """Every command `rounds` times; one that does not end with code 2 and one line ends this."""
    order = random.Random(0)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.jsonl"
        pairs.write_text('{"input": "3 9 5", "target": "9 5"}\n')
        for _ in range(rounds + 1):
            for name in order.sample(list(COMMANDS), len(COMMANDS)):
                arguments = [str(pairs) if part == "PAIRS" else part for part in COMMANDS[name]]
                wall, processor, done = timed(arguments, Path(folder))
                assert arguments[0] == "-c" or (done.returncode, done.stderr.count("\n")) == (2, 1)
                times[name].append((wall, processor))
    # The first round filled the caches of the disk.
    return {name: summary(measured[1:]) for name, measured in times.items()}


def summary(times: list[tuple[float, float]]) -> dict[str, Any]:
    """Median, and the range that holds half of the times, in seconds."""
    return {
        kind: {
            "median": round(statistics.median(values), 3),
            "half_within": [round(q, 3) for q in statistics.quantiles(values, n=4)[::2]],
        }
        for kind, values in (
            ("wall", [wall for wall, _ in times]),
            ("processor", [processor for _, processor in times]),
        )
    }


def machine() -> dict[str, Any]:
    """What it was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("ship-ds", "pydantic", "pyyaml", "typer", "torch")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    results = {"machine": machine(), "rounds": rounds, "seconds": measure(rounds)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name, row in results["seconds"].items():
        wall, busy = row["wall"], row["processor"]["median"]
        low, high = wall["half_within"]
        print(f"{name:<24} {wall['median']:6.3f} s ({low:.3f} to {high:.3f}), {busy:.3f} s busy")


if __name__ == "__main__":
    main()
