"""What a file or folder of tasks holds, for `ship-ds data`: before texts are cut, which needs a
tokenizer."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ship_ds.data.filters import FilterConfig, apply_filters
from ship_ds.data.labels import MOST_LABELS, label_forms, num_by_label
from ship_ds.data.readers import detect_format, read_tasks, usual_min_examples
from ship_ds.data.splits import SplitConfig, can_be_tested, split_tasks
from ship_ds.data.task import DataError, Splits, Task, spread

NUM_SHOWN_TASKS = 3
_WIDTH = 100


def describe(
    path: Path,
    format: str = "auto",
    filters: FilterConfig | None = None,
    split: SplitConfig | None = None,
) -> dict[str, Any]:
    """Counts before the filters, what the reader and the filters leave out by reason and what then
    stays, tasks with labels among it, and three of these tasks with an example; the parts of a
    split and the weight of its seen tasks, where one is given.

    Args:
        path: a file or folder.
        format: of `FORMATS`; "auto" finds it out.
        filters: which tasks and examples are left out; None: what the defaults leave out.
        split: how tasks are parted; None: nothing is said of parts.

    Returns:
        A description, as `ship-ds data --json` prints it: `path`, `format`, `tasks`, `examples`,
        `families`, `filtered`, `kept` and `samples`; with a split also `seen_weight` and `parts`,
        which is a text where the tasks cannot be parted.

    Raises:
        DataError: there is nothing, or what is there is not as its format says.
    """
    unread: Counter[str] = Counter()
    tasks = read_tasks(path, format, unread)
    kept, filtered = apply_filters(
        tasks, filters or FilterConfig(), usual_min_examples(path, format)
    )
    return {
        "path": str(path),
        "format": detect_format(path) if format == "auto" else format,
        **_counts_of(tasks),
        "filtered": {**unread, **filtered},
        "kept": _kept(kept),
        **({} if split is None else _parts(kept, split)),
        **_samples(kept),
    }


def describe_splits(splits: Splits, name: str) -> dict[str, Any]:
    """The same of tasks that are in no file, and parted already.

    Args:
        splits: of which nothing is left out.
        name: in place of a path.
    """
    tasks = [one.task for one in splits.tasks]
    return {
        "path": name,
        "format": "generated",
        **_counts_of(tasks),
        "filtered": {},
        "kept": _kept(tasks),
        **_parts_of(splits),
        **_samples(tasks),
    }


def nothing_before_reading(name: str) -> dict[str, Any]:
    """Of a source that says nothing of its tasks before they are read."""
    return {"path": name}


def _counts_of(tasks: Sequence[Task]) -> dict[str, int]:
    return {
        "tasks": len(tasks),
        "examples": sum(len(task.examples) for task in tasks),
        "families": len({task.family for task in tasks if task.family}),
    }


def _kept(tasks: Sequence[Task]) -> dict[str, Any]:
    return {
        "tasks": len(tasks),
        "examples": sum(len(task.examples) for task in tasks),
        "never_tested": sum(not can_be_tested(task) for task in tasks),
        "labels": _labels(tasks),
    }


def _samples(tasks: Sequence[Task]) -> dict[str, Any]:
    picked = spread([task for task in tasks if task.examples], NUM_SHOWN_TASKS)
    return {
        "samples": [
            {
                "id": task.id,
                "instruction": task.instruction,
                "input": task.examples[0].input,
                "target": task.examples[0].target,
            }
            for task in picked
        ]
    }


def _labels(tasks: Sequence[Task]) -> dict[str, Any]:
    """Of the tasks whose answers are a closed set: how many they are, and the share of a task's
    examples that its most frequent label has, mean over tasks."""
    shares = []
    for task in tasks:
        if forms := label_forms(task.examples):
            [(_, most)] = num_by_label(task.examples, forms).most_common(1)
            shares.append(most / len(task.examples))
    return {"tasks": len(shares), "most_frequent": sum(shares) / len(shares) if shares else None}


def _parts(tasks: Sequence[Task], config: SplitConfig) -> dict[str, Any]:
    """Tasks of each part, or why there are none; the sum of the weights of those that are seen."""
    try:
        splits = split_tasks(tasks, config)
    except DataError as error:
        return {"parts": str(error), "seen_weight": 0.0}
    return _parts_of(splits)


def _parts_of(splits: Splits) -> dict[str, Any]:
    return {"parts": counts(splits), "seen_weight": sum(task.weight for task in splits.seen)}


def counts(splits: Splits) -> dict[str, int]:
    """Tasks of each part."""
    return {part: len(getattr(splits, part)) for part in ("seen", "dev", "unseen")}


def description_text(description: dict[str, Any]) -> str:
    """The description as lines for a terminal."""
    title = [_title(description)] if "weight" in description else []
    if "kept" not in description:
        return "\n".join([*title, "nothing is said of it before its tasks are read"])
    kept = description["kept"]
    untested = kept["never_tested"]
    lines = [
        *title,
        f"format {description['format']}: {description['tasks']} tasks, {description['examples']} "
        "examples, "
        f"{description['families']} families",
        *(f"left out: {reason}: {count}" for reason, count in description["filtered"].items()),
        f"kept: {kept['tasks']} tasks, {kept['examples']} examples"
        + (f"; {untested} tasks of one input are never tested" if untested else ""),
    ]
    labels = kept["labels"]
    if labels["tasks"]:
        lines.append(
            f"labels: {labels['tasks']} tasks have 2 to {MOST_LABELS} distinct answers, each twice "
            "on average or oftener; the most frequent one is that of "
            f"{labels['most_frequent']:.0%} of a task's examples (mean)"
        )
    if "parts" in description:
        parts = description["parts"]
        lines.append(
            parts
            if isinstance(parts, str)
            else ", ".join(f"{count} {part}" for part, count in parts.items()) + " tasks"
        )
    if "share_of_draws" in description:
        lines.append(f"{description['share_of_draws']:.1%} of the draws")
    for sample in description["samples"]:
        lines += ["", *(f"  {key:<12} {_short(str(value))}" for key, value in sample.items())]
    return "\n".join(lines)


def _title(description: dict[str, Any]) -> str:
    """Of a source of a mixture: its name, where it is another than the last part of its path."""
    path, name = description["path"], description["name"]
    place = path if Path(path).name == name else f"{name}: {path}"
    return f"{place}, weight {description['weight']:g}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else line[: _WIDTH - 3] + "..."
