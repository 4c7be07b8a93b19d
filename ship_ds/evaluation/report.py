"""The report of the harness, from its measured cells: report.json, report.md and the rows of every
task as JSON lines."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ship_ds.evaluation.cells import Cell, Measured, TaskRow
from ship_ds.evaluation.collapse import collapse_warning, commonest_text
from ship_ds.evaluation.metrics import summary
from ship_ds.evaluation.questions import PARTS
from ship_ds.files import write_json, write_text
from ship_ds.inference.confidence import auc, share_is_done

TITLES = {
    "exact_match": "exact match",
    "normalised_match": "normalised match",
    "label_accuracy": "label accuracy",
    "constant_label": "one label for all of a task's inputs, less is better",
    "paper_metric": "the paper's metric",
    "rouge_l": "ROUGE-L",
    "similarity": "similarity",
    "execution_accuracy": "execution, text in the prompt",
    "execution_accuracy_encoder": "execution, through the encoder",
    "execution_paper_metric": "the paper's execution accuracy, text in the prompt",
    "published_execution": "the paper's execution accuracy in the paper's prompt",
    "execution_paper_metric_encoder": "the paper's execution accuracy, through the encoder",
    "judged_equivalence": "judged the same",
    "judged_right": "judged right",
    "exact_match_found": "exact match by the latent found",
    "exact_match_stated": "exact match, induced text in the prompt",
    "exact_match_read": "exact match, by the examples alone",
    "agreement": "agreement of samples",
    "answer_loss": "loss of the right answer in nats a token, less is better",
    "text_loss": "loss of the instruction in nats a token, less is better",
    "latent_gain": "gain by its own latent, nats a token",
}
LEADING = {
    "deduction": "exact_match",
    "induction": "execution_accuracy",
    "reasoning": "exact_match",
    "reconstruction": "exact_match",
}
"""The score of a direction where one has to stand for it, as in the tables task by task."""
ABOUT = ("instruction_in_query", "sees_labels", "about")
"""What a report says of each method, beside its scores."""
_SHIP = "ship"
_ABOUT_METHOD = ("method", "instruction in query")
_KINDS = ("parameter", "composition", "family")
_KIND_PARTS = tuple(f"{part}_{kind}" for part in PARTS for kind in _KINDS)


@dataclass(frozen=True)
class Provenance:
    """What has to be known to make the report again."""

    run: str
    command: str
    versions: Mapping[str, str]
    setting: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    """Of each method in the report, in the order of the tables: `instruction_in_query`,
    `sees_labels`, and `about`, what its row is."""
    leading_num_shown: int


def build(measured: Mapping[Cell, Measured], provenance: Provenance) -> dict[str, Any]:
    """`methods.<name>.<direction>.<part>`; of an unseen part each kind as well, and other numbers
    of shown examples. `paired` has the same layout: SHIP minus that method."""
    methods: dict[str, Any] = {name: dict(about) for name, about in provenance.methods.items()}
    for cell, scores in measured.items():
        direction = methods[cell.method].setdefault(cell.direction, {})
        # A part's own scores are of the leading number; the others stand in `by_num_shown` alone,
        # for which `setdefault` makes the part where its leading cell comes later.
        if cell.num_shown in (None, provenance.leading_num_shown):
            direction[cell.part] = direction.get(cell.part, {}) | summary(
                scores.metrics, scores.rows
            )
            for kind in sorted({row["kind"] for row in scores.rows} & set(_KINDS)):
                direction[f"{cell.part}_{kind}"] = summary(
                    scores.metrics, [row for row in scores.rows if row["kind"] == kind]
                )
            direction[cell.part] |= commonest_text(cell.direction, scores.rows)
        if "agreement" in scores.metrics:
            direction[cell.part]["confidence"] = confidence(scores.rows)
        if cell.num_shown is not None:
            by_number = direction.setdefault(cell.part, {}).setdefault("by_num_shown", {})
            by_number[str(cell.num_shown)] = summary(scores.metrics, scores.rows)
    return {
        "methods": methods,
        "paired": differences(measured, provenance.leading_num_shown),
        "run": provenance.run,
        "command": provenance.command,
        "versions": dict(provenance.versions),
        "setting": dict(provenance.setting),
        "seconds": {cell.name: scores.seconds for cell, scores in measured.items()},
        "prepare_seconds": {
            name: max(
                scores.prepare_seconds for cell, scores in measured.items() if cell.method == name
            )
            for name in methods
        },
    }


def confidence(rows: Sequence[TaskRow]) -> dict[str, float | None]:
    """How well agreement tells right from wrong, as the area under the ROC curve (0.5 is chance):
    `auc_tasks`, of tasks of which half or more is answered exactly; `auc_answers`, of single
    answers. None where all are right, or all wrong."""
    done = [share_is_done(fmean(row["exact_match"])) for row in rows]
    by_task = auc([fmean(row["agreement"]) for row in rows], done)
    right = [bool(value) for row in rows for value in row["exact_match"]]
    by_answer = auc([value for row in rows for value in row["agreement"]], right)
    return {
        name: None if math.isnan(value) else value
        for name, value in (("auc_tasks", by_task), ("auc_answers", by_answer))
    }


def differences(measured: Mapping[Cell, Measured], num_shown: int) -> dict[str, Any]:
    """SHIP minus every other method, over the tasks that both were asked:
    `<method>.<direction>.<part>.<metric>`, each with its bootstrap interval over tasks."""
    by_method: dict[str, Any] = {}
    for cell, other in measured.items():
        ship = measured.get(replace(cell, method=_SHIP))
        if cell.method == _SHIP or ship is None or cell.num_shown not in (None, num_shown):
            continue
        metrics = [metric for metric in ship.metrics if metric in other.metrics]
        rows = paired_rows(ship.rows, other.rows, metrics)
        if rows:
            of_method = by_method.setdefault(cell.method, {}).setdefault(cell.direction, {})
            of_method[cell.part] = summary(metrics, rows)
    return by_method


def paired_rows(
    rows: Sequence[TaskRow], other: Sequence[TaskRow], metrics: Sequence[str]
) -> list[TaskRow]:
    """One row a task that both have: the means of `rows` minus those of `other`, in each metric
    that applies.

    Args:
        rows: of one method, one a task.
        other: of another method.
        metrics: to compare by.
    """
    others = {row["task"]: row for row in other}
    return [
        {
            metric: [fmean(row[metric]) - fmean(others[row["task"]][metric])]
            if row[metric] and others[row["task"]][metric]
            else []
            for metric in metrics
        }
        for row in rows
        if row["task"] in others
    ]


def write(report: Mapping[str, Any], measured: Mapping[Cell, Measured], folder: Path) -> Path:
    """Write tasks.jsonl, report.md and report.json.

    Args:
        report: as `build` made it.
        measured: the cells of which it was made.
        folder: takes the three files.

    Returns:
        The path of report.md.
    """
    lines = [
        json.dumps(
            {
                "method": cell.method,
                "direction": cell.direction,
                "part": cell.part,
                "num_shown": cell.num_shown,
                **row,
            }
        )
        for cell, scores in measured.items()
        for row in scores.rows
    ]
    write_text(folder / "tasks.jsonl", "".join(line + "\n" for line in lines))
    write_text(folder / "report.md", markdown(report, measured))
    write_json(folder / "report.json", report)
    return folder / "report.md"


def markdown(report: Mapping[str, Any], measured: Mapping[Cell, Measured]) -> str:
    """The report as a page: a table a direction, seconds, and a table a direction task by task."""
    setting, directions = report["setting"], {cell.direction: None for cell in measured}
    shown = setting["num_shown"][0]
    parts = [
        f"# Evaluation of {report['run']}",
        f"    {report['command']}",
        "Every score is the mean over tasks with its 95 % bootstrap interval over tasks. Methods "
        f"see {shown} examples in induction and reasoning, none in deduction and reconstruction. A "
        "method with the instruction in its query pays for it in every query.",
        "\n".join(f"- {name}: {about['about']}." for name, about in report["methods"].items()),
    ]
    for direction in directions:
        rows = summary_rows(report, direction, PARTS, tuple(TITLES), value_and_interval)
        kinds = summary_rows(
            report, direction, _KIND_PARTS, (LEADING[direction],), value_and_interval
        )
        parts += [
            f"## {direction.capitalize()}",
            markdown_table(rows),
            *warnings(report, direction),
        ]
        if len(kinds[0]) > len(_ABOUT_METHOD):
            parts += ["By the reason why a task is unseen:", markdown_table(kinds)]
        if any(direction in method for method in report["paired"].values()):
            parts += [
                "SHIP minus each, over the same tasks:",
                markdown_table(_differences(report, direction)),
            ]
    parts += ["## Seconds", markdown_table(_seconds(report, measured))]
    for direction in directions:
        title = f"## {direction.capitalize()}, task by task: {TITLES[LEADING[direction]]}"
        parts += [title, markdown_table(_by_task(measured, direction, shown))]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        "\n\n".join([*parts, "## Versions and settings", versions, f"    {json.dumps(setting)}"])
        + "\n"
    )


def summary_rows(
    report: Mapping[str, Any],
    direction: str,
    parts: Sequence[str],
    metrics: Sequence[str],
    cell_text: Callable[[Any], str],
) -> list[list[str]]:
    """Header and one row a method; a column for each part and metric that some method has.

    Args:
        report: as `build` made it.
        direction: of the table.
        parts, metrics: of the columns, in this order.
        cell_text: makes the text of a cell.
    """
    methods = {
        name: method[direction] for name, method in report["methods"].items() if direction in method
    }
    counts: dict[tuple[str, str], int] = {}
    for cells in methods.values():
        for part, cell in cells.items():
            for metric in metrics:
                if metric in cell:
                    key = part, metric
                    counts[key] = max(counts.get(key, 0), num_tasks(cell, metric))
    columns = [(part, metric) for part in parts for metric in metrics if (part, metric) in counts]
    header = [
        *_ABOUT_METHOD,
        *(f"{part}, n={counts[part, metric]}: {TITLES[metric]}" for part, metric in columns),
    ]
    return [
        header,
        *(
            [
                name + (" (sees labels)" if report["methods"][name]["sees_labels"] else ""),
                "yes" if report["methods"][name]["instruction_in_query"] else "no",
                *(
                    with_count(cells.get(part, {}), metric, counts[part, metric], cell_text)
                    for part, metric in columns
                ),
            ]
            for name, cells in methods.items()
        ),
    ]


def warnings(report: Mapping[str, Any], direction: str) -> list[str]:
    """A line for each method and part whose texts hardly tell tasks apart, or its labels inputs;
    none of controls, some of which do it on purpose, nor of a part that was not measured at the
    leading number of shown examples."""
    lines = [
        collapse_warning(f"{name}, {direction}, {part}", method[direction][part])
        for name, method in report["methods"].items()
        for part in PARTS
        if "n_tasks" in method.get(direction, {}).get(part, {})
        and not method["about"].startswith("control")
    ]
    return [line for line in lines if line]


def num_tasks(cell: Mapping[str, Any], metric: str) -> int:
    """Tasks that a metric was measured on; its own number where it applies to some alone."""
    number: int = cell[metric].get("n_tasks", cell["n_tasks"])
    return number


def with_count(
    cell: Mapping[str, Any], metric: str, usual: int, cell_text: Callable[[Any], str]
) -> str:
    """The text of a cell, with its number of tasks where that is not the header's.

    Args:
        cell: a part's scores by metric.
        metric: the one to write.
        usual: the header's number of tasks.
        cell_text: makes the text of a cell.
    """
    text = cell_text(cell.get(metric))
    is_usual = not text or num_tasks(cell, metric) == usual
    return text if is_usual else f"{text} (n={num_tasks(cell, metric)})"


def _differences(report: Mapping[str, Any], direction: str) -> list[list[str]]:
    """As `summary_rows`, of the differences."""
    methods = {
        name: {**report["methods"][name], direction: pairs[direction]}
        for name, pairs in report["paired"].items()
        if direction in pairs
    }
    return summary_rows({"methods": methods}, direction, PARTS, tuple(TITLES), value_and_interval)


def value_alone(interval: Mapping[str, Any] | None) -> str:
    """ "0.123"; empty where nothing was measured."""
    if interval is None or interval["value"] is None:
        return ""
    return f"{interval['value']:.3f}"


def value_and_interval(interval: Mapping[str, Any] | None) -> str:
    """ "0.123 [0.100, 0.150]"; empty where nothing was measured."""
    if interval is None or interval["value"] is None:
        return ""
    low, high = interval["ci95"]
    return f"{interval['value']:.3f} [{low:.3f}, {high:.3f}]"


def _seconds(report: Mapping[str, Any], measured: Mapping[Cell, Measured]) -> list[list[str]]:
    rows = [
        [f"{name}, before its cells", f"{seconds:.1f}", ""]
        for name, seconds in report["prepare_seconds"].items()
    ]
    rows += [
        [cell.name, f"{scores.seconds:.1f}", str(scores.num_ranks)]
        for cell, scores in measured.items()
    ]
    return [["cell", "seconds", "ranks"], *rows]


def _by_task(measured: Mapping[Cell, Measured], direction: str, num_shown: int) -> list[list[str]]:
    """Header and one row a task: each method's mean over its examples."""
    tasks: dict[tuple[str, str, str], dict[str, str]] = {}
    names: dict[str, None] = {}
    metric = LEADING[direction]
    for cell, scores in measured.items():
        if (
            cell.direction == direction
            and cell.num_shown in (None, num_shown)
            and metric in scores.metrics
        ):
            names[cell.method] = None
            for row in scores.rows:
                values = row[metric]
                scores_of_task = tasks.setdefault((cell.part, row["task"], row["instruction"]), {})
                scores_of_task[cell.method] = f"{sum(values) / len(values):.2f}"
    rows = [
        [part, instruction, *(values.get(name, "") for name in names)]
        for (part, _, instruction), values in tasks.items()
    ]
    return [["part", "task", *names], *rows]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the header."""
    lines = [
        "| " + " | ".join(" ".join(text.replace("|", "\\|").split()) for text in row) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
