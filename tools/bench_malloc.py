r"""Steps of training on a CPU under the system's malloc and under the one that the trainer takes,
side by side; writes tools/results/malloc.json.

    python tools/bench_malloc.py --config smollm2-sni-large --steps 20 \
        data.sources.0.path=FOLDER data.sources.1.path=FOLDER training.tasks_per_step=2

Each round starts the same training twice at once, each on half of the cores, and the next round
changes the halves: the hour and a quicker core are alike for both. First of all their losses have
to be the same to the bit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ship_ds.allocator import KEEP, installed_allocator
from ship_ds.console import log
from ship_ds.files import write_json
from ship_ds.monitor.machine import describe_machine, versions

RESULTS = Path(__file__).parent / "results" / "malloc.json"


def start(
    folder: Path, cores: list[int], keeps_system: bool, arguments: list[str]
) -> subprocess.Popen[str]:
    """One training in a process that runs on these cores alone."""
    surroundings = {name: value for name, value in os.environ.items() if name != KEEP}
    if keeps_system:
        surroundings[KEEP] = "1"
    return subprocess.Popen(
        [
            *("taskset", "-c", ",".join(map(str, cores)), sys.executable, "-m", "ship_ds.train"),
            *(*arguments, f"run.folder={folder}", f"training.threads={len(cores)}"),
            *("training.max_minutes=null", "evaluation.every_steps=0"),
            *("evaluation.ends_with_report=false", "checkpoint.every_steps=0"),
        ],
        env=surroundings,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def run_round(arguments: list[str], halves: list[list[int]]) -> dict[str, list[dict[str, Any]]]:
    """The metrics of each step under "system" and "scalable", on the first and second half.

    Raises:
        RuntimeError: a training failed, or another allocator was used than the one asked for.
    """
    with tempfile.TemporaryDirectory() as name:
        folders = {way: Path(name) / way for way in ("system", "scalable")}
        running = {
            way: start(folder, cores, way == "system", arguments)
            for (way, folder), cores in zip(folders.items(), halves, strict=True)
        }
        rows = {}
        for way, process in running.items():
            _, error = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{way}: {error[-2000:]}")
        for way, folder in folders.items():
            used = json.loads((folder / "starts.jsonl").read_text())["malloc"]
            if (used == "system") != (way == "system"):
                raise RuntimeError(f"{way}: the training ran under {used}")
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            rows[way] = [json.loads(line) for line in lines]
        return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of all steps and of one in the first and the last quarter; gigabytes at the end."""
    seconds = [row["speed/step_seconds"] for row in rows]
    quarter = max(1, len(seconds) // 4)
    return {
        "seconds": sum(seconds),
        "first_steps": statistics.mean(seconds[:quarter]),
        "last_steps": statistics.mean(seconds[-quarter:]),
        "gigabytes": rows[-1]["memory/gigabytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a recipe's name or a YAML file")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_intermixed_args()
    cores = sorted(os.sched_getaffinity(0))
    halves = [cores[: len(cores) // 2], cores[len(cores) // 2 :]]
    if installed_allocator() is None or not halves[0]:
        sys.exit("bench_malloc.py: needs two cores and jemalloc or tcmalloc; see ship-ds doctor")
    arguments = ["--config", args.config, *args.overrides, f"training.steps={args.steps}"]
    rounds = []
    for number in range(args.rounds):
        rows = run_round(arguments, halves[:: -1 if number % 2 else 1])
        losses = [[row["loss/total"] for row in one] for one in rows.values()]
        if losses[0] != losses[1]:
            raise RuntimeError(f"the losses differ: {losses}")
        rounds.append({way: summary(one) for way, one in rows.items()})
        log(json.dumps(rounds[-1]))
    ratios = {
        key: [one["system"][key] / one["scalable"][key] for one in rounds]
        for key in rounds[0]["system"]
    }
    write_json(
        args.out,
        {
            "machine": describe_machine(),
            "versions": versions(),
            "allocator": installed_allocator(),
            "arguments": arguments[1:2] + [one for one in args.overrides if "/" not in one],
            "steps": args.steps,
            "rounds": rounds,
            "system_over_scalable": ratios,
        },
    )


if __name__ == "__main__":
    main()
