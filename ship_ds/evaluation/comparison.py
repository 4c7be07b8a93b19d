"""Several runs in one table: what each costs, how well it answers, and how far it is from the first
one, over the same tasks. `ship-ds compare` trains them (compare.py); here they are measured and
written.

    compare.json    rows.<n>.scores.<direction>.<part>.<metric>, and minus_first with the same keys
    compare.md      the tables
"""

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ship_ds.console import Log
from ship_ds.evaluation.cells import PROTOCOLS, Cell, Measured
from ship_ds.evaluation.config import Direction, HarnessConfig, Part
from ship_ds.evaluation.costs import INSTRUCTION_TOKENS, query_costs, sizes, training_costs
from ship_ds.evaluation.evaluate import evaluate_run
from ship_ds.evaluation.harness import Run
from ship_ds.evaluation.metrics import summary
from ship_ds.evaluation.questions import tasks_of
from ship_ds.evaluation.report import (
    LEADING,
    TITLES,
    markdown_table,
    paired_rows,
    value_and_interval,
)
from ship_ds.files import write_json, write_text
from ship_ds.monitor.machine import describe_machine, versions

PAGE = "compare.md"
IN_PROMPT = "instruction in the prompt"
_POOLED = "all"
"""In place of a seed."""
_SHIP, _PROMPTING = "ship", "prompting"
_EQUAL_TIME = 0.99
"""Of training.max_minutes: a run that took less was ended by its steps."""


@dataclass(frozen=True)
class ComparedRun:
    """A run that was measured, or the upper reference beside it.

    seed: None for the reference, `_POOLED` for several seeds together. facts: costs.py.
    cells: by direction and part. tasks: a digest of each part's tasks, by which two entries were
    asked the same. reference: what the answers with the instruction in the prompt depend on.
    """

    label: str
    seed: int | str | None
    folder: str
    facts: Mapping[str, Any]
    cells: Mapping[tuple[Direction, Part], Measured]
    tasks: Mapping[Part, str]
    metric: str = "exact_match"
    reference: str = ""
    in_prompt: Mapping[tuple[Direction, Part], Measured] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.label if self.seed is None else f"{self.label}, seed {self.seed}"


def measure(
    label: str,
    seed: int,
    run: Run,
    settings: HarnessConfig,
    arguments: Sequence[str],
    log: Log,
    beside: Sequence[ComparedRun] = (),
) -> ComparedRun:
    """Measure what is not measured of a run, and count what it costs.

    Args:
        label: of the run.
        seed: of the run.
        run: that was trained.
        settings: of the harness; its methods are SHIP and, where nothing in `beside` has the same
            base and tasks, the instruction in the prompt.
        arguments: of the command, for the run's own report.
        log: takes a line a cell.
        beside: the entries before this one.

    Raises:
        UserError: see `evaluate` and `training_costs`.
    """
    of_parts = {part: tasks_of(run.splits, part, settings.num_tasks) for part in settings.parts}
    digests = {part: _digest(tasks) for part, tasks in of_parts.items()}
    reference = _reference(run, digests)
    is_known = any(entry.reference == reference for entry in beside)
    methods = (_SHIP,) if is_known else (_SHIP, _PROMPTING)
    chosen = settings.model_copy(update={"methods": methods})
    _, cells = evaluate_run(run, chosen, arguments, log)
    asked = list(dict.fromkeys(task for tasks in of_parts.values() for task in tasks))
    facts = {**training_costs(run), **sizes(run.ship.model), **query_costs(run.ship.model, asked)}
    limit = run.ship.config.training.max_minutes
    return ComparedRun(
        label,
        seed,
        str(run.folder),
        facts | {"max_minutes": limit},
        _of_method(_SHIP, cells, chosen),
        digests,
        run.ship.config.evaluation.best_by,
        reference,
        {} if is_known else _of_method(_PROMPTING, cells, chosen),
    )


def _of_method(
    method: str, cells: Mapping[Cell, Measured], settings: HarnessConfig
) -> dict[tuple[Direction, Part], Measured]:
    """The cells that were asked for, with as many shown examples as the report's own."""
    return {
        (cell.direction, cell.part): measured
        for cell, measured in cells.items()
        if cell.method == method
        and cell.direction in settings.directions
        and cell.part in settings.parts
        and cell.num_shown in (None, settings.num_shown[0])
    }


def _digest(tasks: Iterable[Any]) -> str:
    """Of all that a method is shown and asked of the tasks. Not of their kind: why a task is unseen
    depends on what else was trained on."""
    told = [(task.task, task.train, task.test, task.held_out_paraphrases) for task in tasks]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _reference(run: Run, digests: Mapping[Part, str]) -> str:
    config = run.ship.config
    base = config.model.task_llm
    parts = (base.base, base.quantisation, config.model.system_message, str(run.ship.dtype))
    return repr((*parts, config.evaluation.max_new_tokens, sorted(digests.items())))


def build(
    entries: Sequence[ComparedRun],
    failures: Mapping[str, str],
    settings: HarnessConfig,
    arguments: Sequence[str],
) -> dict[str, Any]:
    """The comparison as JSON.

    Args:
        entries: in the order of the table, at least one; the others are compared with the first.
        failures: why a run is not among them, by its name.
        settings: of the harness.
        arguments: of the command.
    """
    rows = [*with_pooled(entries), *_references(entries)]
    notes = [*_unequal_time(entries), *_other_tasks(rows)]
    return {
        "first": entries[0].label,
        "metric": {**LEADING, "deduction": entries[0].metric},
        "rows": [_row(entry, rows) for entry in rows],
        "notes": notes,
        "failures": dict(failures),
        "command": shlex.join(["ship-ds", *arguments]),
        "setting": settings.model_dump(mode="json"),
        "machine": describe_machine(),
        "versions": versions(),
    }


def with_pooled(entries: Sequence[ComparedRun]) -> list[ComparedRun]:
    """Variants side by side, each followed by its seeds together where it has several: a task's
    score is then its mean over them, and the interval is over tasks alone."""
    rows: list[ComparedRun] = []
    for label in dict.fromkeys(entry.label for entry in entries):
        of_label = [entry for entry in entries if entry.label == label]
        rows += of_label
        if len(of_label) > 1 and all(entry.tasks == of_label[0].tasks for entry in of_label):
            cells = {
                key: _joined([entry.cells[key] for entry in of_label]) for key in of_label[0].cells
            }
            rows.append(replace(of_label[0], seed=_POOLED, facts={}, folder="", cells=cells))
    return rows


def _joined(cells: Sequence[Measured]) -> Measured:
    """Each task's values of all seeds in one row, in the metrics that all of them have."""
    metrics = [name for name in cells[0].metrics if all(name in cell.metrics for cell in cells)]
    rows = [
        {**of_task[0], **{name: [v for row in of_task for v in row[name]] for name in metrics}}
        for of_task in zip(*(cell.rows for cell in cells), strict=True)
    ]
    return replace(cells[0], metrics=metrics, rows=rows)


def _references(entries: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The instruction in the prompt: once for each base and tasks among the entries."""
    known = [entry for entry in entries if entry.in_prompt]
    return [
        ComparedRun(
            IN_PROMPT if len(known) == 1 else f"{IN_PROMPT} ({entry.label})",
            None,
            entry.folder,
            {"query_gigaflops": entry.facts["prompt_query_gigaflops"]},
            entry.in_prompt,
            entry.tasks,
        )
        for entry in known
    ]


def _partner(entry: ComparedRun, rows: Sequence[ComparedRun]) -> ComparedRun | None:
    """What an entry is compared with: the first variant with the same seed, or as it comes first;
    with several seeds together, likewise. None: it is the first variant."""
    if entry.label == rows[0].label:
        return None
    of_first = [row for row in rows if row.label == rows[0].label]
    wanted = _POOLED if entry.seed is None else entry.seed
    return next((row for row in of_first if row.seed == wanted), of_first[0])


def _row(entry: ComparedRun, rows: Sequence[ComparedRun]) -> dict[str, Any]:
    partner = _partner(entry, rows)
    scores: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for (direction, part), cell in entry.cells.items():
        scores.setdefault(direction, {})[part] = summary(cell.metrics, cell.rows)
        other = None if partner is None else partner.cells.get((direction, part))
        if other is not None and partner is not None and _same_tasks(entry, partner, part):
            metrics = [name for name in cell.metrics if name in other.metrics]
            paired = paired_rows(cell.rows, other.rows, metrics)
            differences.setdefault(direction, {})[part] = summary(metrics, paired)
    return {
        "label": entry.label,
        "seed": entry.seed,
        "folder": entry.folder,
        **entry.facts,
        "scores": scores,
        "minus_first": differences,
    }


def _same_tasks(entry: ComparedRun, other: ComparedRun, part: Part) -> bool:
    return entry.tasks[part] == other.tasks[part]


def _unequal_time(entries: Sequence[ComparedRun]) -> list[str]:
    """A line for each run that its steps ended before its time was up."""
    return [
        f"{entry.name}: took all its {entry.facts['steps']:,} steps in "
        f"{entry.facts['minutes']:.2f} of {limit:g} minutes: raise training.steps"
        for entry in entries
        if (limit := entry.facts["max_minutes"]) is not None
        and entry.facts["minutes"] < _EQUAL_TIME * limit
    ]


def _other_tasks(rows: Sequence[ComparedRun]) -> list[str]:
    """A line for each entry that was asked other tasks than the one it is compared with."""
    notes = []
    for entry in rows:
        partner = _partner(entry, rows)
        parts = [p for p in entry.tasks if partner and not _same_tasks(entry, partner, p)]
        if partner and parts:
            notes.append(
                f"{entry.name}: its {', '.join(parts)} tasks are not those of {partner.name}, so "
                "the scores are of other tasks and no difference is given"
            )
    return notes


def write(report: Mapping[str, Any], out: Path) -> None:
    """Write compare.json and compare.md."""
    write_json(out / "compare.json", report)
    write_text(out / PAGE, markdown(report))


def markdown(report: Mapping[str, Any]) -> str:
    """The comparison as a page."""
    limit = next((row["max_minutes"] for row in report["rows"] if row.get("max_minutes")), None)
    parts = [
        "# Comparison" if limit is None else f"# {limit:g} minutes of training each",
        f"    {report['command']}",
        "GFLOPs are by the formula of `ship_ds/flops.py`, of a question and an answer as long as "
        "those that are asked, for an instruction of so many tokens. Scores are means over tasks "
        "with their 95 % bootstrap interval over tasks; a difference is from "
        f"{report['first']}, task by task.",
    ]
    for title, rows in tables(report):
        parts += [f"## {title}", markdown_table(rows)]
    parts += [f"- {line}" for line in report["notes"]]
    parts += [f"- {name}: {reason}" for name, reason in report["failures"].items()]
    stack = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    where = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    return (
        "\n\n".join(
            [
                *parts,
                "## Machine and settings",
                where,
                stack,
                f"    {json.dumps(report['setting'])}",
            ]
        )
        + "\n"
    )


def show(report: Mapping[str, Any]) -> None:
    """Print the tables and what has to be said of them."""
    console = Console(width=150)
    for title, (header, *rows) in tables(report):
        printed = Table(title=title)
        for index, name in enumerate(header):
            printed.add_column(name, justify="right" if index else "left")
        for row in rows:
            printed.add_row(*row)
        console.print(printed)
    for line in report["notes"]:
        print(line)


def tables(report: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Each table's title, header and rows: costs, then one for each direction."""
    directions = [d for d in PROTOCOLS if any(d in row["scores"] for row in report["rows"])]
    return [
        ("Costs", _costs(report)),
        *(
            (f"{d.capitalize()}: {TITLES[report['metric'][d]]}", _scores(report, d))
            for d in directions
        ),
    ]


def _costs(report: Mapping[str, Any]) -> list[list[str]]:
    lengths = [f"{count:,}" for count in INSTRUCTION_TOKENS]
    header = [
        *("variant", "seed", "steps", "minutes", "seconds a step"),
        *("trained parameters", "numbers of an adapter"),
        *(f"GFLOPs a query, {length} tokens" for length in lengths),
        f"GFLOPs once an instruction, {' / '.join(lengths)} tokens",
    ]
    rows = [row for row in report["rows"] if row["seed"] != _POOLED]
    return [header, *map(_cost_row, rows)]


def _cost_row(row: Mapping[str, Any]) -> list[str]:
    once = row.get("deduction_gigaflops", {})
    return [
        row["label"],
        _seed(row),
        *(f"{row[key]:{form}}" if key in row else "" for key, form in _COST_FORMS.items()),
        *(f"{value:.3g}" for value in row["query_gigaflops"].values()),
        " / ".join(f"{value:.3g}" for value in once.values()),
    ]


_COST_FORMS = {
    "steps": ",",
    "minutes": ".2f",
    "seconds_a_step": ".3f",
    "trained_parameters": ",",
    "adapter_numbers": ",",
}


def _seed(row: Mapping[str, Any]) -> str:
    return "" if row["seed"] is None else str(row["seed"])


def _scores(report: Mapping[str, Any], direction: str) -> list[list[str]]:
    """A column for each part, and one for the difference where there is any."""
    metric, first = report["metric"][direction], report["first"]
    rows = [row for row in report["rows"] if direction in row["scores"]]
    columns = []
    for part in report["setting"]["parts"]:
        for kind, title in (("scores", part), ("minus_first", f"{part}, minus {first}")):
            cells = [row[kind].get(direction, {}).get(part, {}) for row in rows]
            texts = [value_and_interval(cell.get(metric)) for cell in cells]
            if any(texts):
                most = max(cell.get("n_tasks", 0) for cell in cells)
                columns.append([f"{title}, n={most}", *texts])
    names = [["variant", *(row["label"] for row in rows)], ["seed", *map(_seed, rows)]]
    return [list(line) for line in zip(*names, *columns, strict=True)]
