"""Several runs in one table, and the harness's methods beside them: what each costs, how well it
answers, and how far it is from the first run, over the same tasks. `ship-ds compare` trains them
(compare.py); here they are measured and written.

A method that asks SHIP is measured of every run; another once for each base and data, since it is
the same in all of them.

    compare.json    rows.<n>.scores.<direction>.<part>.<metric>, and minus_first with the same keys
    compare.md      the tables
"""

import hashlib
import json
import shlex
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ship_ds.config import lora_of
from ship_ds.console import Log
from ship_ds.errors import UserError, first_line
from ship_ds.evaluation.cells import PROTOCOLS, Cell, Measured
from ship_ds.evaluation.config import METHOD_NAMES, Direction, HarnessConfig, Part
from ship_ds.evaluation.costs import (
    INSTRUCTION_TOKENS,
    method_costs,
    query_costs,
    sizes,
    training_costs,
)
from ship_ds.evaluation.evaluate import evaluate_run
from ship_ds.evaluation.harness import Harness, Run
from ship_ds.evaluation.methods import METHODS, TRAINED_NAMES
from ship_ds.evaluation.metrics import summary
from ship_ds.evaluation.questions import tasks_of
from ship_ds.evaluation.report import (
    ABOUT,
    LEADING,
    TITLES,
    markdown_table,
    num_tasks,
    paired_rows,
    value_and_interval,
    with_count,
)
from ship_ds.files import write_json, write_text
from ship_ds.monitor.machine import describe_machine, versions

COMPARISON_PAGE = "compare.md"
IN_PROMPT = "instruction in the prompt"
_POOLED = "all"
"""In place of a seed."""
_SHIP, _PROMPTING = "ship", "prompting"
_OF_RUN = "_encoder"
"""What metrics of an induced text end with that take it through the run's own encoder."""
_LORA_METHODS = TRAINED_NAMES | {"lora_per_task"}
"""Those that take the LoRA and the step of a run's config."""
_EQUAL_TIME = 0.99
"""Of training.max_minutes: a run that took less was ended by its steps."""

Cells = Mapping[tuple[Direction, Part], Measured]
"""By direction and part."""


@dataclass(frozen=True)
class ComparedMethod:
    """A method that was measured beside SHIP. about: as the run's own report has it. facts:
    costs.py. once_for: what its scores depend on; "" where that is the run."""

    about: Mapping[str, Any]
    facts: Mapping[str, Any]
    cells: Cells
    once_for: str


@dataclass(frozen=True)
class ComparedRun:
    """A run that was measured, or a method beside it.

    seed: None for what is the same in several runs, `_POOLED` for several seeds together. facts:
    costs.py. tasks: a digest of each part's tasks, by which two entries were asked the same.
    taken: what trained baselines take of the run's config. beside: the methods that were measured
    with this run, by name. failures: why a method was not, by the names of method and run.
    """

    label: str
    seed: int | str | None
    folder: str
    facts: Mapping[str, Any]
    cells: Cells
    tasks: Mapping[Part, str]
    metric: str = "exact_match"
    method: str = _SHIP
    about: Mapping[str, Any] = field(default_factory=dict)
    taken: str = ""
    beside: Mapping[str, ComparedMethod] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.label if self.seed is None else f"{self.label}, seed {self.seed}"


def measure_run(
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
        settings: of the harness; SHIP is one of its methods. One that does not ask SHIP is measured
            where no entry of `beside` has the same base and data.
        arguments: of the command, for the run's own report.
        log: takes a line a cell.
        beside: the entries before this one.

    Raises:
        UserError: see `evaluate` and `training_costs`. What goes wrong with a method beside SHIP is
            among the `failures`.
    """
    of_parts = {part: tasks_of(run.splits, part, settings.num_tasks) for part in settings.parts}
    digests = {part: _digest(tasks) for part, tasks in of_parts.items()}
    keys = {name: _once_for(name, run, digests) for name in settings.methods}
    known = {(name, one.once_for) for e in beside for name, one in e.beside.items() if one.once_for}
    names = [name for name in settings.methods if (name, keys[name]) not in known]
    harness = Harness(run, settings, log)
    harness.measure([_SHIP])
    errors = {name: _attempt(harness, name) for name in names if name != _SHIP}
    failures = {name: reason for name, reason in errors.items() if reason is not None}
    measured = [name for name in names if name not in failures and harness.cells(name)]
    chosen = settings.model_copy(update={"methods": tuple(measured)})
    report, cells = evaluate_run(run, chosen, arguments, log)
    asked = list(dict.fromkeys(task for tasks in of_parts.values() for task in tasks))
    facts = {**training_costs(run), **sizes(run.ship.model), **query_costs(run.ship.model, asked)}
    others = {
        name: ComparedMethod(
            {key: report["methods"].get(name, {}).get(key) for key in ABOUT},
            {} if name in failures else method_costs(harness, name, facts),
            {} if name in failures else _of_method(name, cells, chosen),
            keys[name],
        )
        for name in names
        if name != _SHIP
    }
    config = run.ship.config
    return ComparedRun(
        label,
        seed,
        str(run.folder),
        facts | {"max_minutes": config.training.max_minutes},
        _of_method(_SHIP, cells, chosen),
        digests,
        config.evaluation.best_by,
        taken=_taken(run, settings),
        beside=others,
        failures={f"{name} ({label}, seed {seed})": why for name, why in failures.items()},
    )


def _attempt(harness: Harness, name: str) -> str | None:
    """Measure a method; why that was not possible."""
    try:
        harness.measure([name])
    # Whatever it is, the table is then of the others.
    except Exception as error:
        return why_unmeasured(error, harness.run.folder / f"measuring_{name}_failure.txt")
    return None


def why_unmeasured(error: Exception, trace: Path) -> str:
    """In one line; where it is no user's fault, it names the file that now has the traceback."""
    if isinstance(error, UserError):
        return str(error)
    write_text(trace, traceback.format_exc())
    return f"measuring it failed ({first_line(error)}); {trace} has the traceback"


def _of_method(name: str, cells: Mapping[Cell, Measured], settings: HarnessConfig) -> Cells:
    """The cells that were asked for, with as many shown examples as the report's own; of a method
    that does not ask SHIP without the metrics that do."""
    return {
        (cell.direction, cell.part): measured
        if METHODS[name].asks_ship
        else replace(measured, metrics=[m for m in measured.metrics if not m.endswith(_OF_RUN)])
        for cell, measured in cells.items()
        if cell.method == name
        and cell.direction in settings.directions
        and cell.part in settings.parts
        and cell.num_shown in (None, settings.num_shown[0])
    }


def _digest(tasks: Iterable[Any]) -> str:
    """Of all that a method is shown and asked of the tasks. Not of their kind: why a task is unseen
    depends on what else was trained on."""
    contents = [(task.task, task.train, task.test, task.held_out_paraphrases) for task in tasks]
    return hashlib.sha256(repr(contents).encode()).hexdigest()


def _once_for(name: str, run: Run, digests: Mapping[Part, str]) -> str:
    """Base and data that a method's scores depend on; "" where it asks SHIP. Of a baseline's LoRA
    and steps see `_taken`."""
    if METHODS[name].asks_ship:
        return ""
    config = run.ship.config
    base, limits = config.model.task_llm, config.evaluation
    parts = (base.base, base.quantisation, config.model.system_message, str(run.ship.dtype))
    lengths = (limits.max_new_tokens, limits.max_instruction_tokens)
    trained_on = map(_digest, (run.splits.seen, run.splits.dev)) if name in TRAINED_NAMES else ()
    return repr((*parts, *lengths, sorted(digests.items()), *trained_on))


def _taken(run: Run, settings: HarnessConfig) -> str:
    """What a trained baseline takes of the run's config beside base and data: its LoRA, its steps,
    and how many examples it may answer where that is the budget."""
    config = run.ship.config
    training, is_counted = config.training, settings.budget == "examples"
    step = training.tasks_per_step, training.examples_per_task, training.family_alpha
    parts = (lora_of(config.model.hypernetwork), *step, training.balances_labels)
    has_trained = any(name in TRAINED_NAMES for name in settings.methods)
    return repr((*parts, run.num_answered if is_counted and has_trained else None))


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
    rows = [*with_pooled(entries), *_methods(entries)]
    notes = [
        *_unequal_time(entries),
        *_over_time(rows, settings),
        *_other_tasks([row for row in rows if not _is_of_run(row)]),
        *_taken_from(entries),
        *_unasked(entries, rows, settings),
    ]
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


def _methods(entries: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The other methods in the order of the harness's tables: of every run those that ask SHIP, a
    variant's seeds together as well; others once for each base and data."""
    return [row for name in METHOD_NAMES for row in _of_every_run(name, entries)]


def _of_every_run(name: str, entries: Sequence[ComparedRun]) -> list[ComparedRun]:
    known = [entry for entry in entries if name in entry.beside and entry.beside[name].cells]
    title, rows = IN_PROMPT if name == _PROMPTING else name, []
    for entry in known:
        one = entry.beside[name]
        if not one.once_for:
            label, seed = f"{entry.label}: {title}", entry.seed
        else:
            label, seed = title if len(known) == 1 else f"{title} ({entry.label})", None
        if one.about["sees_labels"]:
            label += " (sees labels)"
        row = replace(entry, label=label, seed=seed, facts=one.facts, cells=one.cells, beside={})
        rows.append(replace(row, method=name, about=one.about))
    return with_pooled(rows) if METHODS[name].asks_ship else rows


def _is_of_run(row: ComparedRun) -> bool:
    """Whether it is a method that asks a run which has a row of its own."""
    return row.method != _SHIP and METHODS[row.method].asks_ship


def _partner(entry: ComparedRun, rows: Sequence[ComparedRun]) -> ComparedRun | None:
    """What an entry is compared with: the first variant with the same seed, or as it comes first;
    with several seeds together, likewise. None: it is the first variant."""
    # By the method as well: a variant may be called as one.
    first = (rows[0].label, rows[0].method)
    if (entry.label, entry.method) == first:
        return None
    of_first = [row for row in rows if (row.label, row.method) == first]
    seed = _POOLED if entry.seed is None else entry.seed
    return next((row for row in of_first if row.seed == seed), of_first[0])


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
        "method": entry.method,
        **entry.about,
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


def _over_time(rows: Sequence[ComparedRun], settings: HarnessConfig) -> list[str]:
    """A line for each baseline that took more than its minutes: what it begins it ends."""
    return [
        f"{row.label}: took {row.facts['minutes']:.2f} of {settings.minutes:g} minutes: its first "
        "oracles or a last step were longer than what was left"
        for row in rows
        if row.method in TRAINED_NAMES
        and settings.budget == "minutes"
        and row.facts.get("minutes", 0) * _EQUAL_TIME > settings.minutes
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


def _taken_from(entries: Sequence[ComparedRun]) -> list[str]:
    """A line for each run whose baselines others share though they have another LoRA or steps."""
    notes = []
    for entry in entries:
        names = [
            name for name in entry.beside if name in _LORA_METHODS and entry.beside[name].cells
        ]
        others = [
            other.name
            for other in entries
            if other.taken != entry.taken and not other.beside.keys() & names
        ]
        if names and others:
            notes.append(
                f"{', '.join(names)}: with the LoRA and steps of {entry.name}; those of "
                f"{'; '.join(others)} are others"
            )
    return notes


def _unasked(
    entries: Sequence[ComparedRun], rows: Sequence[ComparedRun], settings: HarnessConfig
) -> list[str]:
    """A line on the methods that there is no row of though nothing went wrong."""
    failed = {name.partition(" ")[0] for entry in entries for name in entry.failures}
    absent = {*settings.methods} - {row.method for row in rows} - failed
    names = [name for name in settings.methods if name in absent]
    why = "none of the directions asked for on any task of these parts"
    return [f"{', '.join(names)}: {why}"] if names else []


def write(report: Mapping[str, Any], out: Path) -> None:
    """Write compare.json and compare.md."""
    write_json(out / "compare.json", report)
    write_text(out / COMPARISON_PAGE, markdown(report))


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
        *_about_methods(report),
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


def _about_methods(report: Mapping[str, Any]) -> list[str]:
    """What each method is, and what the trained ones might spend."""
    about = {row["method"]: row["about"] for row in report["rows"] if "about" in row}
    setting, trained = report["setting"], [name for name in about if name in TRAINED_NAMES]
    spent = {
        "minutes": f"for {setting['minutes']:g} minutes",
        "examples": "on as many answered examples as the run that they were measured with",
        "until_dev_stops": f"until {setting['patience']} looks at dev in a row had no gain",
    }[setting["budget"]]
    return [
        *filter(None, ["\n".join(f"- {name}: {text}." for name, text in about.items())]),
        *([f"Trained {spent} each: {', '.join(trained)}."] if trained else []),
    ]


def print_comparison(report: Mapping[str, Any]) -> None:
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
    once, lengths = row.get("deduction_gigaflops", {}), map(str, INSTRUCTION_TOKENS)
    return [
        row["label"],
        _seed(row),
        *(f"{row[key]:{form}}" if key in row else "" for key, form in _COST_FORMS.items()),
        *(f"{row['query_gigaflops'][n]:.3g}" if "query_gigaflops" in row else "" for n in lengths),
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
            if any(value_and_interval(cell.get(metric)) for cell in cells):
                most = max(num_tasks(cell, metric) for cell in cells if metric in cell)
                texts = [with_count(cell, metric, most, value_and_interval) for cell in cells]
                columns.append([f"{title}, n={most}", *texts])
    names = [["variant", *(row["label"] for row in rows)], ["seed", *map(_seed, rows)]]
    return [list(line) for line in zip(*names, *columns, strict=True)]
