"""The one place where a method is asked and its answers are scored: for `ship-ds evaluate`, for the
report at the end of a run and for the curve while training.

    deduction         instruction -> answers
    induction         examples -> instruction
    reasoning         examples -> answers
    reconstruction    instruction -> latent -> instruction
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from ship_ds.evaluation.cells import Direction, TaskRow
from ship_ds.evaluation.judges import Columns, Judge, one_line
from ship_ds.evaluation.method import Deduces, Induces, Reasons, ReasonsOtherwise, Reconstructs
from ship_ds.evaluation.metrics import exact_match, rouge_l
from ship_ds.evaluation.questions import Question
from ship_ds.inference.deduction import AnswersByTask
from ship_ds.runtime import ranks


@dataclass(frozen=True)
class Outcome:
    """One row a question, each with a list of values for every metric."""

    metrics: list[str]
    rows: list[TaskRow]

    def values(self, metric: str) -> list[list[float]]:
        """One list a task, as `metrics.score` takes them."""
        return [row[metric] for row in self.rows]

    def of_kind(self, kind: str) -> "Outcome":
        """The rows of the tasks that are unseen for this reason (`SplitTask.kind`)."""
        return Outcome(self.metrics, [row for row in self.rows if row["kind"] == kind])


def measure(
    method: Any, direction: Direction, questions: Sequence[Question], judges: Sequence[Judge] = ()
) -> Outcome:
    """What a method answers to these questions and how well; on this rank alone.

    Args:
        method: of the protocol that the direction asks for.
        judges: of induced instructions.
    """
    if not questions:
        return Outcome([], [])
    outputs, columns = _MEASURES[direction](method, questions, judges)
    rows = [
        {
            "task": q.task.id,
            "kind": q.task.kind,
            "instruction": q.task.task.instruction,
            "said": output,
            **{name: values[i] for name, values in columns.items()},
        }
        for i, (q, output) in enumerate(zip(questions, outputs, strict=True))
    ]
    return Outcome(list(columns), rows)


def measure_over_ranks(
    method: Any, direction: Direction, questions: Sequence[Question], judges: Sequence[Judge] = ()
) -> Outcome:
    """As `measure`, each rank asking its share of the questions; all of them return the whole.

    The weights have to be whole on each rank, since shares differ in what they call.
    """
    # every world_size-th question, so that turns of the gathered shares are in order
    share = questions[ranks.rank() :: ranks.world_size()]
    shares = ranks.gather_objects(measure(method, direction, share, judges))
    rows = [
        row
        for turn in zip_longest(*(outcome.rows for outcome in shares))
        for row in turn
        if row is not None
    ]
    # a rank without a question knows no metrics
    return Outcome(max((outcome.metrics for outcome in shares), key=len), rows)


Scored = tuple[Sequence[Any], Columns]
"""A method's outputs, one a question, and their scores."""


def _deduction(method: Deduces, questions: Sequence[Question], judges: Sequence[Judge]) -> Scored:
    answers = method.deduce(
        [q.task for q in questions], [q.wording for q in questions], [q.inputs for q in questions]
    )
    return answers, _answer_columns(answers, questions)


def _induction(method: Induces, questions: Sequence[Question], judges: Sequence[Judge]) -> Scored:
    induced = method.induce([q.shown for q in questions])
    columns: Columns = {}
    for judge in judges:
        columns |= judge.columns(induced, questions)
    return induced, columns


def _reasoning(method: Reasons, questions: Sequence[Question], judges: Sequence[Judge]) -> Scored:
    shown, inputs = [q.shown for q in questions], [q.inputs for q in questions]
    answers = method.reason(shown, inputs)
    columns = _answer_columns(answers, questions)
    if isinstance(method, ReasonsOtherwise):
        for name, others in method.reason_otherwise(shown, inputs).items():
            columns[f"exact_match_{name}"] = _answer_columns(others, questions)["exact_match"]
    return answers, columns


def _reconstruction(
    method: Reconstructs, questions: Sequence[Question], judges: Sequence[Judge]
) -> Scored:
    """Right where the text is the very instruction; spaces do not count."""
    texts = method.reconstruct([q.wording for q in questions])
    pairs = [
        (one_line(text), one_line(q.wording)) for text, q in zip(texts, questions, strict=True)
    ]
    return texts, {
        "exact_match": [[text == wording] for text, wording in pairs],
        "rouge_l": [[rouge_l(text, [wording])] for text, wording in pairs],
    }


_MEASURES: dict[Direction, Callable[[Any, Sequence[Question], Sequence[Judge]], Scored]] = {
    "deduction": _deduction,
    "induction": _induction,
    "reasoning": _reasoning,
    "reconstruction": _reconstruction,
}


def _answer_columns(answers: AnswersByTask, questions: Sequence[Question]) -> Columns:
    pairs = [
        list(zip(row, q.asked, strict=True)) for row, q in zip(answers, questions, strict=True)
    ]
    return {
        "exact_match": [
            [exact_match(answer, example.answers) for answer, example in row] for row in pairs
        ],
        "rouge_l": [[rouge_l(answer, example.answers) for answer, example in row] for row in pairs],
    }
