"""The report that a run ends with: SHIP's deduction beside its controls, and reconstruction, as
report.json and one table.

It is a run of the harness (measure.py) on the model as it was trained, with six of its methods;
here is which, on which rules, and where their scores stand.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ship_ds.api import Ship
from ship_ds.data.labels import closed_labels
from ship_ds.data.task import Splits, SplitTask
from ship_ds.evaluation.cells import SHOWS_EXAMPLES
from ship_ds.evaluation.collapse import collapse_warning, commonest_text
from ship_ds.evaluation.config import Direction, HarnessConfig, Part
from ship_ds.evaluation.measure import Outcome, measure_over_ranks
from ship_ds.evaluation.method import Method, Setting
from ship_ds.evaluation.methods import METHODS
from ship_ds.evaluation.metrics import metrics_to_show, summary
from ship_ds.evaluation.questions import PARTS, ask, tasks_of
from ship_ds.evaluation.report import TITLES, value_and_interval
from ship_ds.evaluation.within_time import Group, TimedCell, evenly, measure_within
from ship_ds.files import write_json
from ship_ds.monitor.progress import ProgressLine

_NUM_CONTROL_TASKS = 114
"""Seen rules in the controls: as many as there are unseen ones in the generated world."""
_NUM_NEAREST_TASKS = 57
"""Of each part in nearest_known, which tries many known adapters; the other controls take
seconds."""
_SHARES = (0.7, 0.5, 1.0)
"""Of the time that is left for deduction with its controls, then of the rest for the nearest known
instruction, then of the rest for reconstruction."""
_NUM_SHOWN, _SEED = HarnessConfig().num_shown[0], HarnessConfig().seed
"""As `ship-ds evaluate` has them by default: a control is shown the same examples in both."""
_COLUMNS = ("seen", "dev", "unseen")


class _Section(NamedTuple):
    """Cells of one method. key: in report.json, which has kept its keys since the first version;
    everywhere else a control goes by its method's name."""

    key: str
    method: str
    direction: Direction
    parts: tuple[Part, ...]
    max_tasks: int = sys.maxsize
    """Of each part."""


_SECTIONS = (
    _Section("deduction", "ship", "deduction", ("seen", "dev", "unseen", "unseen_paraphrase")),
    _Section("controls.bare_base", "bare_base", "deduction", ("seen", "unseen")),
    _Section(
        "controls.shuffled_instruction", "shuffled_instruction", "deduction", ("seen", "unseen")
    ),
    _Section("controls.instruction_in_prompt", "prompting", "deduction", ("seen", "unseen")),
    _Section(
        "controls.nearest_seen_rule",
        "nearest_known",
        "reasoning",
        ("seen", "unseen"),
        _NUM_NEAREST_TASKS,
    ),
    _Section("controls.majority_label", "majority_label", "deduction", ("seen", "dev", "unseen")),
    _Section("reconstruction", "ship", "reconstruction", ("seen", "dev", "unseen")),
)


def measure_run(
    ship: Ship, splits: Splits, folder: Path, seconds: float | None = None
) -> dict[str, Any]:
    """Every cell of the report, the same on all ranks, each of which answers a share of the tasks.

    Args:
        ship: the run; its weights may be sharded over the ranks.
        splits: the data that the run was trained on.
        folder: of the run.
        seconds: that it may take, beside the least number of tasks of every cell
            (`evaluation.min_final_tasks`); None: all tasks.

    Returns:
        `deduction.<part>`, `controls.<control>.<part>` and `reconstruction.<part>`, each
        `{"exact_match": {"value": 0.5, "ci95": [0.4, 0.6]}, "n_tasks": 114, "n_examples": 570}`
        with every other metric of metrics.py that applies; in reconstruction also
        `commonest_text` (collapse.py); `tables`, the metrics that `show`
        prints; `left_out`, how many tasks of which cell there was no time for.
    """
    started = time.perf_counter()
    setting = Setting(ship, splits, folder / "evaluation" / "methods", None, _SEED)
    sections = [
        section
        for section in _sections(splits)
        if ship.model.decodes or section.direction != "reconstruction"
    ]
    methods: dict[str, Method] = {s.method: METHODS[s.method](setting) for s in sections}
    for method in methods.values():
        method.prepare()
    cells = _cells(sections, methods, ship, splits)
    groups = [
        Group(share, [cell for (key, _), cell in cells.items() if _group_of(key) == number])
        for number, share in enumerate(_SHARES)
    ]
    with ProgressLine("report", sum(len(cell.tasks) for cell in cells.values())) as progress:
        measure_within(groups, seconds, ship.config.evaluation.min_final_tasks, progress)
    report: dict[str, Any] = {}
    for (key, part), cell in cells.items():
        _cells_at(report, key).update(_scores(key, part, cell.outcome))
    return report | {
        "left_out": {
            f"{key}.{part}": cell.num_left for (key, part), cell in cells.items() if cell.num_left
        },
        "tables": metrics_to_show(splits.tasks),
        "evaluation_seconds": round(time.perf_counter() - started, 1),
    }


def _cells(
    sections: Sequence[_Section], methods: Mapping[str, Method], ship: Ship, splits: Splits
) -> dict[tuple[str, Part], TimedCell]:
    """By section and part; other wordings have one only where there are any."""
    most = ship.config.evaluation.num_final_tasks
    return {
        (section.key, part): _cell(methods[section.method], section, part, tasks, ship)
        for section in sections
        for part in section.parts
        if (tasks := _tasks(splits, section, part, most)) or part != "unseen_paraphrase"
    }


def _group_of(key: str) -> int:
    """Deduction with its controls, the dear control, reconstruction: as `_SHARES` has them."""
    return 2 if key == "reconstruction" else 1 if key == "controls.nearest_seen_rule" else 0


def _sections(splits: Splits) -> Sequence[_Section]:
    """The majority label is there where some task's answers are labels: a closed set of texts."""
    tasks = splits.tasks
    has_labels = "label_accuracy" in metrics_to_show(tasks) and any(map(closed_labels, tasks))
    return [s for s in _SECTIONS if has_labels or s.method != "majority_label"]


def _tasks(splits: Splits, section: _Section, part: Part, most: int) -> Sequence[SplitTask]:
    """At most so many tasks of a part, in the order in which they are measured; of some sections
    the first ones, so that these are among SHIP's own."""
    tasks = evenly(tasks_of(splits, part, most))
    if part == "seen" and section.key.startswith("controls."):
        tasks = tasks[:_NUM_CONTROL_TASKS]
    return tasks[: section.max_tasks]


def _cell(
    method: Method, section: _Section, part: Part, tasks: Sequence[SplitTask], ship: Ship
) -> TimedCell:
    num_shown = _NUM_SHOWN if section.direction in SHOWS_EXAMPLES else 0
    num_asked = ship.config.evaluation.examples_per_task

    def measured(some: Sequence[SplitTask]) -> Outcome:
        questions = [ask(task, num_shown, _SEED, num_asked, part) for task in some]
        return measure_over_ranks(method, section.direction, questions, model=ship.model)

    return TimedCell(f"{_title(section)}, {part.replace('_', ' ')}", tasks, measured)


def _scores(key: str, part: Part, outcome: Outcome) -> dict[str, Any]:
    """The score of the part and, of SHIP's unseen rules, one for each reason why they are."""
    by_part: dict[str, Outcome] = {part: outcome}
    if key == "deduction" and part == "unseen":
        for kind in sorted({row["kind"] for row in outcome.rows if row["kind"]}):
            by_part[f"unseen_{kind}"] = outcome.of_kind(kind)
    scores = {name: summary(some.metrics, some.rows) for name, some in by_part.items()}
    if key == "reconstruction":
        scores[part] |= commonest_text("reconstruction", outcome.rows)
    return scores


def _cells_at(report: dict[str, Any], key: str) -> dict[str, Any]:
    for name in key.split("."):
        report = report.setdefault(name, {})
    return report


def write(report: dict[str, Any], folder: Path) -> Path:
    """RUN/report.json, whole or as it was; its path."""
    write_json(folder / "report.json", report)
    return folder / "report.json"


def show(report: dict[str, Any]) -> None:
    """Print a table a metric: a row a measurement, seen beside dev (what recipes are chosen by) and
    unseen."""
    console = Console(width=130)
    for metric in report["tables"]:
        rows = [row for row in _rows(report, metric) if any(row[1:])]
        if rows:
            console.print(_table(f"{TITLES[metric]}, value [95 % interval over tasks]", rows))
    for direction in ("deduction", "reconstruction"):
        for part, cell in _cells_at(report, direction).items():
            # A run whose tables are of lists has no labels, though a rule's few answers look so.
            shown = {
                k: v for k, v in cell.items() if k != "constant_label" or k in report["tables"]
            }
            if part in PARTS and (line := collapse_warning(f"{direction}, {part}", shown)):
                console.print(line)
    if report["left_out"]:
        console.print(
            f"{len(report['left_out'])} cells are of fewer tasks than there are, for lack of time "
            "(left_out in report.json): evaluation.final_share sets it, `ship-ds evaluate` "
            "measures more."
        )
    console.print(
        f"{report['train_seconds']:.0f} s of training, {report['tokens_per_second']:.0f} tokens/s, "
        f"{report['world_size']} rank(s), seed {report['seed']}"
    )


def _rows(report: dict[str, Any], metric: str) -> Iterator[list[str]]:
    """A title and the score of each part."""
    for section in _SECTIONS:
        cells = _cells_at(report, section.key)
        yield [_title(section), *(_text(cells.get(part), metric) for part in _COLUMNS)]
    for name, cell in report["deduction"].items():
        if name not in _COLUMNS:
            column = "seen" if "paraphrase" in name else "unseen"
            texts = (_text(cell if part == column else None, metric) for part in _COLUMNS)
            yield [f"deduction, {name.replace('_', ' ')}", *texts]


def _table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for column in ("", *_COLUMNS):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _title(section: _Section) -> str:
    if section.key.startswith("controls."):
        return f"control: {section.method.replace('_', ' ')}"
    return "deduction (SHIP)" if section.key == "deduction" else section.key


def _text(cell: dict[str, Any] | None, metric: str) -> str:
    """Empty where the metric does not apply, or is not finite."""
    if cell is None:
        return ""
    if not cell["n_tasks"]:
        return "no tasks"
    text = value_and_interval(cell.get(metric))
    return text and f"{text} n={cell[metric].get('n_tasks', cell['n_tasks'])}"
