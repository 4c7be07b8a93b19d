r"""How many steps a generated adapter saves as the start of ordinary LoRA training.

    python tools/score_tuning.py --run RUN --part unseen --num-tasks 24 --lr 1e-3 3e-3 \
        --out tools/results/tuning.json

Each task's LoRA is trained on its training examples as `ship-ds tune --fresh` does, from the
adapter of its instruction and from where `peft` starts one, on the same examples in the same order.
By learning rate and start: the loss of the held-out examples before the first and after the last
step, with its interval over tasks. Then each start at the rate where its mean last loss is lowest:
how far apart they end, task by task, and by which step the generated start is where the fresh one
ends.

Writes JSON, prints it as lines.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ship_ds.api import Ship
from ship_ds.cli.checks import check_positive
from ship_ds.console import log, no_log
from ship_ds.data.source import source_of
from ship_ds.errors import UserError
from ship_ds.evaluation.metrics import score
from ship_ds.evaluation.questions import PARTS, tasks_of
from ship_ds.evaluation.tuning import Curve, Recipe, tune
from ship_ds.files import write_json
from ship_ds.monitor.machine import describe_machine, versions
from ship_ds.runtime import ranks

STARTS = ("generated", "fresh")
HELD_OUT, MIN_EXAMPLES = 0.25, 8
Curves = dict[str, list[Curve]]
"""By start, one a task."""


def curves_of(run: Path, part: Any, num_tasks: int, recipes: Sequence[Recipe]) -> list[Curves]:
    """The curves of every recipe, over the same tasks."""
    ship = Ship.from_run(run)
    splits = source_of(ship.config.data).read(ship.model.prompts.tokenizer, no_log)
    tasks = [one for one in tasks_of(splits, part, num_tasks) if len(one.train) >= MIN_EXAMPLES]
    if not tasks:
        raise UserError(f"--part {part}: {run} has no task there with {MIN_EXAMPLES} examples")
    found: list[Curves] = [{start: [] for start in STARTS} for _ in recipes]
    for number, task in enumerate(tasks, 1):
        pairs = list(dict.fromkeys((one.input, one.target) for one in task.train))
        for recipe, curves in zip(recipes, found, strict=True):
            tuned = tune(ship, task.task.instruction, pairs, recipe, with_fresh=True)
            assert tuned.fresh is not None
            curves["generated"].append(tuned.curve)
            curves["fresh"].append(tuned.fresh)
        log(f"{number} of {len(tasks)} tasks")
    return found


def ends(curves: Sequence[Curve]) -> dict[str, Any]:
    """Losses before and after, over tasks."""
    return {
        "first": score([[curve.first] for curve in curves]).interval(),
        "last": score([[curve.last] for curve in curves]).interval(),
    }


def compared(generated: Sequence[Curve], fresh: Sequence[Curve], steps: int) -> dict[str, Any]:
    """Where the two end, and when the one is where the other ends; never counts as all steps."""
    pairs = list(zip(generated, fresh, strict=True))
    reached = [one.steps_to(other.last) for one, other in pairs]
    needed = [steps if one is None else one for one in reached]
    return {
        "last_minus_fresh": score([[one.last - other.last] for one, other in pairs]).interval(),
        "share_that_reaches_it": sum(one is not None for one in reached) / len(reached),
        "steps_to_it": statistics.median(needed),
        "steps_saved": score([[float(steps - one)] for one in needed]).interval(),
        "n_tasks": len(pairs),
    }


def measure(run: Path, part: str, num_tasks: int, steps: int, rates: list[float]) -> dict[str, Any]:
    """All of it, for JSON."""
    recipes = [Recipe(steps, rate, HELD_OUT, 0) for rate in rates]
    found = curves_of(run, part, num_tasks, recipes)
    by_rate = {
        f"{rate:g}": {start: ends(curves[start]) for start in STARTS}
        for rate, curves in zip(rates, found, strict=True)
    }
    best = {
        start: min(range(len(rates)), key=lambda n: _mean_last(found[n][start])) for start in STARTS
    }
    chosen = [found[best[start]][start] for start in STARTS]
    return {
        "run": run.name,
        "part": part,
        "steps": steps,
        "by_lr": by_rate,
        "best_lr": {start: rates[best[start]] for start in STARTS},
        "at_best_lr": compared(chosen[0], chosen[1], steps),
        "machine": describe_machine(),
        "versions": versions(),
    }


def _mean_last(curves: Sequence[Curve]) -> float:
    return statistics.mean(curve.last for curve in curves)


def main(arguments: list[str]) -> int:
    """Measure, print, and write where --out says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--part", default="unseen", choices=PARTS)
    parser.add_argument("--num-tasks", type=int, default=24)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    ranks.quiet_libraries()
    try:
        for option, values in (("--lr", given.lr), ("--steps", [given.steps])):
            for value in values:
                check_positive(option, value)
        found = measure(given.run, given.part, given.num_tasks, given.steps, given.lr)
    except UserError as error:
        print(f"score_tuning: {error}", file=sys.stderr)
        return 2
    for rate, starts in found["by_lr"].items():
        for start, one in starts.items():
            said = " to ".join(f"{one[end]['value']:.3f} {one[end]['ci95']}" for end in one)
            print(f"lr {rate}, {start} start: held-out loss {said}")
    both = found["at_best_lr"]
    print(
        f"at the best rate of each ({found['best_lr']}): generated minus fresh "
        f"{both['last_minus_fresh']['value']:+.3f} {both['last_minus_fresh']['ci95']}; "
        f"{100 * both['share_that_reaches_it']:.0f} % of {both['n_tasks']} tasks reach the fresh "
        f"one's last loss, by step {both['steps_to_it']:g} of {found['steps']} (median)"
    )
    if given.out is not None:
        write_json(given.out, found, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
