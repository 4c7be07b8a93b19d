r"""How far SHIP, or another method, of one run is from the methods of another, over the same tasks.

    ship-ds evaluate --run FUSED --methods ship --directions deduction --parts unseen
    ship-ds evaluate --run BEFORE --methods ship,sft --directions deduction --parts unseen
    python tools/pair_runs.py FUSED BEFORE --methods ship,sft --parts unseen --out pairs.json

`ship-ds evaluate` pairs the methods of one run. This takes the answers that two runs have stored,
or one run's own: by method and part the mean over tasks of the first one's score minus the other's
with its bootstrap interval over tasks, `<method>.<part>.difference.<metric>`, beside the scores of
both. Runs that were asked other tasks, or in another way, are refused. --tasks labels keeps the
tasks whose answers are a closed set, --tasks texts the others.

Writes JSON, prints a line a score.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ship_ds.errors import UserError
from ship_ds.evaluation.cells import Cell, CellStore, Measured
from ship_ds.evaluation.metrics import summary
from ship_ds.evaluation.report import paired_rows
from ship_ds.files import write_json

ASKED_ALIKE = ("data", "dtype", "harness", "seed")
"""Of a cell's fingerprint: which tasks and inputs, in which numbers, scored by which version."""
KINDS = ("all", "labels", "texts")


def stored(run: Path, method: str, part: Any, kind: str = "all") -> Measured:
    """A cell of deduction that the run has, with the tasks of one of the `KINDS`. Raises UserError
    where it has none."""
    cell = Cell(method, "deduction", part, None)
    measured = CellStore(run / "evaluation" / "cells").read(cell)
    if measured is None:
        raise UserError(
            f"{run}: {cell.name} is not measured; `ship-ds evaluate --run {run} --methods {method} "
            f"--directions deduction --parts {part}` does it"
        )
    if kind == "all":
        return measured
    rows = [row for row in measured.rows if bool(row.get("label_accuracy")) == (kind == "labels")]
    if not rows:
        raise UserError(f"{run}: {cell.name}: has no task of --tasks {kind}; leave that out")
    return replace(measured, rows=rows)


def pair(first: Measured, other: Measured, names: tuple[str, str]) -> dict[str, Any]:
    """Scores of both and of their difference, by metric. Raises UserError where the two were not
    asked alike."""
    for key in ASKED_ALIKE:
        then, now = (one.fingerprint.get(key) for one in (first, other))
        if then != now:
            raise UserError(
                f"{names[0]} and {names[1]}: were asked with another {key} ({then} and {now}): "
                "evaluate both alike"
            )
    metrics = [metric for metric in first.metrics if metric in other.metrics]
    rows = paired_rows(first.rows, other.rows, metrics)
    if not rows:
        raise UserError(f"{names[0]} and {names[1]}: have no task in common; give both --num-tasks")
    return {
        "difference": summary(metrics, rows),
        "first": summary(first.metrics, first.rows),
        "other": summary(other.metrics, other.rows),
    }


def pairs(
    first: Path,
    other: Path,
    methods: list[str],
    parts: list[str],
    method_of_first: str = "ship",
    kind: str = "all",
) -> dict[str, Any]:
    """`pair` of a method of the first run with each method of the other, by method and part, over
    the tasks of one of the `KINDS`."""
    return {
        method: {
            "of_first": method_of_first,
            **{
                part: pair(
                    stored(first, method_of_first, part, kind),
                    stored(other, method, part, kind),
                    (f"{first}: {method_of_first}", f"{other}: {method}"),
                )
                for part in parts
            },
        }
        for method in methods
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--of-first", default="ship", help="the method of the first run")
    parser.add_argument("--methods", default="ship", help="those of the other run")
    parser.add_argument("--parts", default="unseen")
    parser.add_argument("--tasks", choices=KINDS, default="all", help="with or without labels")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    try:
        methods, parts = given.methods.split(","), given.parts.split(",")
        found = pairs(given.first, given.other, methods, parts, given.of_first, given.tasks)
    except UserError as error:
        print(f"pair_runs: {error}", file=sys.stderr)
        return 2
    for method, of_parts in found.items():
        for part in parts:
            for metric, score in of_parts[part]["difference"].items():
                if isinstance(score, dict):
                    low, high = score["ci95"]
                    said = f"{score['value']:+.3f} [{low:.3f}, {high:.3f}]"
                    print(f"{given.of_first} - {method}, {part}, {metric}: {said}")
    if given.out is not None:
        write_json(given.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
