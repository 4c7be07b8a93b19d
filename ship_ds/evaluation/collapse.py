"""Whether a method's texts tell its tasks apart, and its answers a task's inputs.

A decoder that does not read its latent (posterior collapse) still writes fluent instructions, one
and the same for nearly all tasks, and that text alone has a ROUGE-L far above zero: 0.234 on 78
unseen tasks of Super-NaturalInstructions. So scores of texts are read beside these numbers. An
adapter that has learnt what a task's labels look like, and nothing of what they depend on, gives
one of them to every input (`metrics.constant_label`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ship_ds.evaluation.cells import WORDINGS, TaskRow
from ship_ds.evaluation.config import Direction
from ship_ds.evaluation.judges import one_line
from ship_ds.evaluation.metrics import rouge_l

_STATING: tuple[Direction, ...] = ("induction", "reconstruction")
"""The directions whose answers are instructions."""
KEY = "commonest_text"
"""Where the numbers stand in a cell of a report."""
_MIN_TASKS = 4
"""Of fewer tasks a text that comes twice says nothing."""
_MANY = 0.5
_LEAST_SHARE = 0.1
"""Of a cell's tasks: some few rules about lists have answers that may be taken for labels."""
_LITTLE_GAIN = 0.1
"""Nats a token: a run that wrote one text for half of its tasks had 0.01, the quickstart's, which
reads its instructions back, 3.3."""


def commonest_text(direction: Direction, rows: Sequence[TaskRow]) -> dict[str, Any]:
    """What the text that most tasks got amounts to, to be added to their cell of a report.

    Args:
        direction: that was measured.
        rows: one a task.

    Returns:
        Under `KEY`: `text`, the one that most tasks got (of several the first); `n_tasks`, how many
        got it; `n_texts`, how many different ones there are; `rouge_l`, 0 to 1, the mean over *all*
        tasks of this one text beside what the method's own ROUGE-L compares with (the instruction,
        and in induction its other wordings), which a method has to beat. Empty without rows, and in
        directions whose answers are no instructions.
    """
    if direction not in _STATING or not rows:
        return {}
    texts = Counter(one_line(row["said"] or "") for row in rows)
    text, number = texts.most_common(1)[0]
    right = [row.get(WORDINGS, [row["instruction"]]) for row in rows]
    alone = fmean(rouge_l(text, list(map(one_line, wordings))) for wordings in right)
    return {
        KEY: {
            "text": text,
            "n_tasks": number,
            "n_texts": len(texts),
            "rouge_l": round(alone, 4),
        }
    }


def collapse_warning(where: str, cell: Mapping[str, Any]) -> str:
    """One line where half of a cell's tasks or more got one text, where the decoder takes next to
    nothing from the latent, or where half of the tasks with labels got one each; else "".

    Args:
        where: what the line begins with, such as "ship, induction, unseen".
        cell: of a report: `n_tasks`, and `commonest_text` where its answers are texts, and
            `latent_gain` and `constant_label` (metrics.py) where they were measured.
    """
    constant = cell.get("constant_label", {"value": None})
    number = constant.get("n_tasks", cell["n_tasks"])
    counts = number >= max(_MIN_TASKS, _LEAST_SHARE * cell["n_tasks"])
    if counts and constant["value"] is not None and constant["value"] >= _MANY:
        return (
            f"{where}: {constant['value']:.0%} of {number} tasks with labels got one label for all "
            "inputs, right for some of them at most: read label accuracy beside majority_label's"
        )
    if cell["n_tasks"] < _MIN_TASKS:
        return ""
    reasons, common = [], cell.get(KEY)
    if common and common["n_tasks"] >= _MANY * cell["n_tasks"]:
        reasons.append(
            f"{common['n_tasks']} of {cell['n_tasks']} tasks got the same text, which alone "
            f"has ROUGE-L {common['rouge_l']:.3f} with their instructions"
        )
    gain = cell.get("latent_gain", {}).get("value")
    if gain is not None and gain < _LITTLE_GAIN:
        reasons.append(
            f"beside its own latent a token of an instruction is likelier by {gain:.3f} nats than "
            "beside another task's"
        )
    if not reasons:
        return ""
    return f"{where}: {' and '.join(reasons)}: these texts hardly tell tasks apart"
