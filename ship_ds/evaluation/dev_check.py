"""The evaluation between steps: what a checkpoint is chosen by, measured on a few tasks."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ship_ds.api import Ship
from ship_ds.config import Config
from ship_ds.data.task import Splits, spread
from ship_ds.evaluation.config import Part
from ship_ds.evaluation.measure import Outcome, measure_over_ranks
from ship_ds.evaluation.method import Setting
from ship_ds.evaluation.methods.ship import ShipMethod
from ship_ds.evaluation.metrics import LESS_IS_BETTER, metrics_to_show, score
from ship_ds.evaluation.questions import ask, tasks_of
from ship_ds.model.ship import ShipModel

_PARTS: tuple[Part, ...] = ("seen", "dev")
_TASKS_READ_BACK = 4
"""Of each part, whose instructions are read back out of z."""


@dataclass
class DevCheck:
    """What was measured.

    Attributes:
        scalars: for the log, by name.
        texts: instructions, and what the decoder made of their z.
        dev_score: deduction on dev by the metric that checkpoints are chosen by, more being better;
            None where there are no dev tasks, or where it is not finite.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    texts: list[tuple[str, str]] = field(default_factory=list)
    dev_score: float | None = None


def check_dev(
    model: ShipModel,
    config: Config,
    splits: Splits,
    folder: Path,
    raise_if_asked: Callable[[], None],
) -> DevCheck:
    """Deduction on a few seen and dev tasks, and a few reconstructions, a share of them on each
    rank.

    Args:
        model: as it is trained; it is left in evaluation mode.
        config: of the run; `evaluation` says how many tasks and which metric.
        splits: of the run.
        folder: of the run.
        raise_if_asked: called before each part; what it raises ends the evaluation there.

    Raises:
        RankError: another rank failed within a part.
    """
    model.eval()
    settings = config.evaluation
    method = ShipMethod(Setting(Ship(model, config, digest=""), splits, folder, None, seed=0))
    check = DevCheck()
    for part in _PARTS:
        raise_if_asked()
        tasks = tasks_of(splits, part, sys.maxsize)
        few = spread(tasks, settings.num_tasks)
        questions = [ask(task, 0, 0, settings.examples_per_task) for task in few]
        outcome = measure_over_ranks(method, "deduction", questions, model=model)
        metrics = tuple(dict.fromkeys((*metrics_to_show(few), settings.best_by)))
        check.scalars |= _scalars(outcome, part, metrics)
    if model.decodes:
        raise_if_asked()
        seen, dev = splits.seen[:_TASKS_READ_BACK], splits.dev[:_TASKS_READ_BACK]
        questions = [ask(task, 0, 0) for task in seen + dev]
        outcome = measure_over_ranks(method, "reconstruction", questions, model=model)
        check.texts = [(row["instruction"], row["said"]) for row in outcome.rows]
        for part, rows in (("seen", outcome.rows[: len(seen)]), ("dev", outcome.rows[len(seen) :])):
            if rows and "latent_gain" in outcome.metrics:
                gains = [row["latent_gain"] for row in rows]
                check.scalars[f"latent_gain/{part}"] = score(gains).value
    on_dev = check.scalars.get(_name(settings.best_by, "dev"))
    if on_dev is not None and math.isfinite(on_dev):
        check.dev_score = -on_dev if settings.best_by in LESS_IS_BETTER else on_dev
    return check


def _scalars(outcome: Outcome, part: str, metrics: Sequence[str]) -> dict[str, float]:
    return {
        _name(metric, part): score(outcome.values(metric)).value
        for metric in metrics
        if metric in outcome.metrics
    }


def _name(metric: str, part: str) -> str:
    """In the log: exact match is `deduction/PART`, any other metric `deduction_METRIC/PART`."""
    return f"deduction{'' if metric == 'exact_match' else '_' + metric}/{part}"
