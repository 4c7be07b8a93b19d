r"""Medians over runs that differ by their seed alone: every score of report.json and
evaluation/report.json.

    make quickstart
    for seed in 1 2; do
        torchrun --nproc-per-node 2 -m ship_ds.train --config quickstart \
            run.seed=$seed run.folder=runs/quickstart-$seed
    done
    ship-ds evaluate --run runs/quickstart --methods all
    for seed in 1 2; do ship-ds evaluate --run runs/quickstart-$seed --methods all \
        --seed $seed; done
    python tools/median_of_seeds.py runs/quickstart runs/quickstart-1 runs/quickstart-2 \
        --out tools/results/quickstart_seeds.json

One run is its own median: so the evaluation of a single run becomes tools/results/RECIPE.json,
with its intervals over tasks. `rows` has every score by its dotted path; `methods` and `paired` are
those of `ship-ds evaluate`, `methods.<name>.<direction>.<part>.<metric>`; of several runs the value
is the median, with `values` and `range` beside it.

A score that some of the runs lack is left out. Writes JSON, prints a line a score: median [lowest,
highest].
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from ship_ds.monitor.machine import describe_machine, versions

REPORTS = {"": "report.json", "evaluation.": "evaluation/report.json"}


def scores(report: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Every {"value": x, "ci95": ...} by its dotted path, and plain numbers of the top level."""
    for key, value in report.items():
        if isinstance(value, dict):
            if isinstance(value.get("value"), float | int):
                yield prefix + key, float(value["value"])
            else:
                yield from scores(value, f"{prefix}{key}.")
        elif key in ("steps", "train_seconds", "tokens_per_second"):
            yield prefix + key, float(value)


def scores_of(run: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for prefix, name in REPORTS.items():
        if (run / name).is_file():
            found |= scores(json.loads((run / name).read_text()), prefix)
    return found


def medians(of_runs: list[Any]) -> Any:
    """The first run's value with the median in place of every score that all runs have."""
    first = of_runs[0]
    if not isinstance(first, dict):
        return first
    if isinstance(first.get("value"), float | int):
        values = [score["value"] for score in of_runs if score.get("value") is not None]
        if len(of_runs) == 1 or len(values) < len(of_runs):
            return first
        of_all = {key: number for key, number in first.items() if key != "ci95"}
        spread = {"values": values, "range": [min(values), max(values)]}
        return {**of_all, "value": round(median(values), 4), **spread}
    common = [key for key in first if all(key in one for one in of_runs)]
    if len(of_runs) > 1:  # each run has one of its own, and no median
        common = [key for key in common if key != "commonest_text"]
    return {key: medians([one[key] for one in of_runs]) for key in common}


def evaluations(runs: list[Path]) -> dict[str, Any]:
    """`methods` and `paired` of the runs' evaluations; nothing where one has none."""
    paths = [run / REPORTS["evaluation."] for run in runs]
    if not all(path.is_file() for path in paths):
        return {}
    reports = [json.loads(path.read_text()) for path in paths]
    keys = ("methods", "paired", "setting", "command")
    return {
        "evaluation_command" if key == "command" else key: medians([one[key] for one in reports])
        for key in keys
        if all(key in one for one in reports)
    }


def has_report(run: Path) -> bool:
    return any((run / name).is_file() for name in REPORTS.values())


def seed_of(run: Path) -> int:
    seed: int = json.loads((run / "config.json").read_text())["run"]["seed"]
    return seed


def same_but_for_seed(runs: list[Path]) -> bool:
    configs = [json.loads((run / "config.json").read_text()) for run in runs]
    return all({**config, "run": None} == {**configs[0], "run": None} for config in configs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    missing = [run / "config.json" for run in args.runs if not (run / "config.json").is_file()]
    missing += [run / "report.json" for run in args.runs if not has_report(run)]
    if missing:
        parser.error(f"{missing[0]}: missing; train that run to its end or evaluate it first")
    if not same_but_for_seed(args.runs):
        parser.error(
            "the runs' config.json differ by more than `run`: their median would mean nothing"
        )
    of_runs = [scores_of(run) for run in args.runs]
    common = [name for name in of_runs[0] if all(name in found for found in of_runs)]
    values = {name: [found[name] for found in of_runs] for name in common}
    for name, row in values.items():
        print(f"{name:72} {median(row):9.3f}  [{min(row):.3f}, {max(row):.3f}]")
    done = {
        "command": f"python tools/median_of_seeds.py {' '.join(map(str, args.runs))} --out "
        f"{args.out}",
        "machine": describe_machine(),
        "versions": versions(),
        "seeds": [seed_of(run) for run in args.runs],
        "rows": {
            name: {"median": round(median(row), 4), "values": row} for name, row in values.items()
        },
        **evaluations(args.runs),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
