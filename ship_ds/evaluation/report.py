"""The report a run ends with: deduction with all its controls and reconstruction, as report.json
and one table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ship_ds.config import EvaluationConfig
from ship_ds.data.task import Splits, SplitTask
from ship_ds.evaluation import deduction as measure
from ship_ds.evaluation.metrics import score
from ship_ds.files import write_json
from ship_ds.model.ship import ShipModel
from ship_ds.runtime import ranks

_NUM_CONTROL_TASKS = 114
"""Seen rules in the controls: as many as there are unseen ones in the generated world; the
nearest-rule search is the cost."""


def evaluate(model: ShipModel, splits: Splits, config: EvaluationConfig) -> dict[str, Any]:
    """Every cell of the report; each rank answers its share of the tasks and all ranks return the
    whole."""
    seen = _spread(splits.seen, config.num_final_tasks)
    some_seen = _spread(seen, _NUM_CONTROL_TASKS)
    few, tokens = config.examples_per_task, config.max_new_tokens
    parts = {"seen": seen, "dev": splits.dev, "unseen": splits.unseen}
    controls = {"seen": some_seen, "unseen": splits.unseen}

    def deduce(tasks: Sequence[SplitTask], wordings: Sequence[str]) -> measure.Rows:
        return measure.deduction(model, tasks, wordings, few, tokens)

    rows: dict[str, measure.Rows] = {}
    shuffled = {
        part: dict(zip((task.id for task in tasks), measure.shuffled_wordings(tasks), strict=True))
        for part, tasks in controls.items()
    }
    for part, tasks in parts.items():
        rows[f"deduction.{part}"] = deduce(_mine(tasks), [t.task.instruction for t in _mine(tasks)])
        rows[f"reconstruction.{part}"] = measure.reconstruction(
            model, _mine(tasks), config.max_instruction_tokens
        )
    held_out = [task for task in seen if task.held_out_paraphrases]
    if held_out:
        rows["deduction.unseen_paraphrase"] = deduce(
            _mine(held_out), [t.held_out_paraphrases[0] for t in _mine(held_out)]
        )
    for kind in sorted({task.kind for task in splits.unseen if task.kind}):
        own = [task for task in splits.unseen if task.kind == kind]
        rows[f"deduction.unseen_{kind}"] = deduce(
            _mine(own), [t.task.instruction for t in _mine(own)]
        )
    for part, tasks in controls.items():
        mine = _mine(tasks)
        rows[f"controls.bare_base.{part}"] = measure.bare_base(model, mine, few, tokens)
        rows[f"controls.shuffled_instruction.{part}"] = deduce(
            mine, [shuffled[part][task.id] for task in mine]
        )
        rows[f"controls.instruction_in_prompt.{part}"] = measure.instruction_in_prompt(
            model, mine, few, tokens
        )
        rows[f"controls.nearest_seen_rule.{part}"] = deduce(
            mine, measure.nearest_seen(model, mine, splits.seen)
        )
    report: dict[str, Any] = {}
    for share in zip(*[list(piece.items()) for piece in ranks.gather_objects(rows)], strict=True):
        whole = [row for _, piece in share for row in piece]
        *sections, last = share[0][0].split(".")
        section = report
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = score(whole).as_json()
    return report


def _spread(tasks: Sequence[SplitTask], count: int) -> Sequence[SplitTask]:
    """At most `count` tasks, evenly spaced, so that every family stays."""
    if count >= len(tasks):
        return tasks
    return [tasks[i * len(tasks) // count] for i in range(count)]


def _mine(tasks: Sequence[SplitTask]) -> Sequence[SplitTask]:
    return tasks[ranks.rank() :: ranks.world_size()]


def write(report: dict[str, Any], folder: Path) -> Path:
    path = folder / "report.json"
    write_json(path, report, indent=2)
    return path


def show(report: dict[str, Any]) -> None:
    """One table: a row a measurement, seen beside dev (what recipes are chosen by) and unseen."""
    table = Table(title="exact match, value [95 % interval over tasks]")
    for column in ("", "seen", "dev", "unseen"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {"deduction (SHIP)": report["deduction"]}
    rows |= {
        f"control: {name.replace('_', ' ')}": cell for name, cell in report["controls"].items()
    }
    rows |= {"reconstruction": report["reconstruction"]}
    for name, cells in rows.items():
        table.add_row(
            name,
            *(_cell(cells[part]) if part in cells else "" for part in ("seen", "dev", "unseen")),
        )
    for name, cell in report["deduction"].items():
        if name not in ("seen", "dev", "unseen"):
            columns = (_cell(cell), "", "") if "paraphrase" in name else ("", "", _cell(cell))
            table.add_row(f"deduction, {name.replace('_', ' ')}", *columns)
    console = Console(width=130)
    console.print(table)
    console.print(
        f"{report['train_seconds']:.0f} s of training, {report['tokens_per_second']:.0f} tokens/s, "
        f"{report['world_size']} rank(s), seed {report['seed']}"
    )


def _cell(cell: dict[str, Any]) -> str:
    exact = cell["exact_match"]
    if not cell["n_tasks"]:
        return "no tasks"
    return (
        f"{exact['value']:.3f} [{exact['ci95'][0]:.3f}, {exact['ci95'][1]:.3f}] n={cell['n_tasks']}"
    )
