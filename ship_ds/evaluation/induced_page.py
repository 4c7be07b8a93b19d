"""What was induced beside what is true: a page of tasks drawn at random, good and bad alike.

| task | true | induced | ROUGE-L | execution, encoder |
| task_137 | Given a review, say ... | You are given a text. ... | 0.41 | 0.80 |
"""

import random
from collections.abc import Sequence
from statistics import fmean

from ship_ds.evaluation.cells import Cell, Measured, TaskRow

NUM_DRAWN = 20
_SCORES = {
    "rouge_l": "ROUGE-L",
    "execution_accuracy_encoder": "execution, encoder",
    "execution_accuracy": "execution, prompt",
}


def page(cell: Cell, measured: Measured, seed: int) -> str:
    """Markdown of up to 20 tasks of a cell of induction, drawn at random.

    Args:
        cell: which.
        measured: its rows.
        seed: of the draw, which is the same whatever the texts are.
    """
    rows = sorted(measured.rows, key=lambda row: str(row["task"]))
    drawn = random.Random(f"{seed} induced").sample(rows, min(NUM_DRAWN, len(rows)))
    scores = [name for name in _SCORES if name in measured.metrics]
    titles = ["task", "true", "induced", *(_SCORES[name] for name in scores)]
    lines = [
        f"# Induced by `{cell.method}` from {cell.num_shown} examples, {cell.part} tasks",
        "",
        f"{len(drawn)} of {len(rows)} tasks, drawn at random with seed {seed}.",
        "",
        _line(titles),
        _line(["---"] * len(titles)),
        *(_line(_cells(row, scores)) for row in drawn),
    ]
    return "\n".join(lines) + "\n"


def _cells(row: TaskRow, scores: Sequence[str]) -> list[str]:
    values = [f"{fmean(row[name]):.2f}" if row[name] else "" for name in scores]
    return [str(row["task"]), row["instruction"], row["said"] or "", *values]


def _line(cells: Sequence[str]) -> str:
    """A row of a table; bars and line ends would end a cell."""
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
