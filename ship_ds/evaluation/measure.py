"""The one place where a method is asked and its answers are scored: for `ship-ds evaluate`, for the
report at the end of a run and for the curve while training.

    deduction         instruction -> answers
    induction         examples -> instruction
    reasoning         examples -> answers
    reconstruction    instruction -> latent -> instruction
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from ship_ds.data.labels import closed_labels
from ship_ds.data.matching import exact_match
from ship_ds.data.task import CutOff
from ship_ds.evaluation.cells import WORDINGS, TaskRow
from ship_ds.evaluation.config import Direction
from ship_ds.evaluation.judge import Columns, Judge
from ship_ds.evaluation.judges import metric_rows, one_line, paper_rows
from ship_ds.evaluation.method import (
    Deduces,
    Doubts,
    Induces,
    Predicts,
    ReadsLatents,
    Reasons,
    ReasonsOtherwise,
    Reconstructs,
)
from ship_ds.evaluation.metrics import (
    constant_label,
    label_match,
    normalised_match,
    rouge_l,
)
from ship_ds.evaluation.questions import Question
from ship_ds.inference.deduction import AnswersByTask
from ship_ds.model.ship import ShipModel
from ship_ds.model.turns import in_turn, shares_weights
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


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcomes of some questions after those of others. A metric that one of them lacks, since
    it applies to none of its tasks, has empty rows there."""
    metrics = list(dict.fromkeys(name for outcome in outcomes for name in outcome.metrics))
    nothing: dict[str, list[float]] = {name: [] for name in metrics}
    return Outcome(metrics, [nothing | row for outcome in outcomes for row in outcome.rows])


def measure(
    method: Any, direction: Direction, questions: Sequence[Question], judges: Sequence[Judge] = ()
) -> Outcome:
    """What a method answers to these questions and how well; on this rank alone.

    Args:
        method: of the protocol that the direction asks for.
        direction: what is asked: answers, or an instruction.
        questions: one a task.
        judges: of induced instructions, and some of answers.
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
            **_num_cut_off(output),
            **_other_wordings(direction, q),
            **{name: values[i] for name, values in columns.items()},
        }
        for i, (q, output) in enumerate(zip(questions, outputs, strict=True))
    ]
    return Outcome(list(columns), rows)


def _num_cut_off(output: Any) -> dict[str, int]:
    """How many of a task's answers never ended, where any did: as texts they look like others."""
    number = sum(isinstance(answer, CutOff) for answer in output) if type(output) is list else 0
    return {"cut_off": number} if number else {}


def _other_wordings(direction: Direction, question: Question) -> dict[str, list[str]]:
    """All right wordings, where an induced text is compared with more than the instruction."""
    texts = list(question.right_texts)
    return {WORDINGS: texts} if direction == "induction" and len(texts) > 1 else {}


def measure_over_ranks(
    method: Any,
    direction: Direction,
    questions: Sequence[Question],
    judges: Sequence[Judge] = (),
    model: ShipModel | None = None,
) -> Outcome:
    """As `measure`, each rank asking its share of the questions; all of them return the whole.

    Args:
        method: see `measure`, as the next one.
        direction: that the method is asked in.
        questions: the same on every rank.
        judges: see `measure`.
        model: that the method asks, where its weights may be sharded over the ranks: they then take
            its passes in turn (turns.py).

    Raises:
        RankError: on every other rank, what went wrong on one of them.
        UserError: likewise, for what a user can mend.
    """
    # every world_size-th question, so that turns of the gathered shares are in order
    share = questions[ranks.rank() :: ranks.world_size()]
    is_shared = model is not None and ranks.world_size() > 1 and shares_weights(model)

    def measure_share() -> Outcome:
        with in_turn(model, ranks.sum_over_ranks) if model and is_shared else nullcontext():
            return measure(method, direction, share, judges)

    shares: list[Outcome] = ranks.gather_results(measure_share, Outcome)
    rows = [
        row
        for turn in zip_longest(*(outcome.rows for outcome in shares))
        for row in turn
        if row is not None
    ]
    # a rank without a question knows no metrics
    return _in_use(Outcome(max((outcome.metrics for outcome in shares), key=len), rows))


def _in_use(outcome: Outcome) -> Outcome:
    """Without the metrics that apply to none of the tasks."""
    unused = {name for name in outcome.metrics if not any(map(len, outcome.values(name)))}
    return Outcome(
        [name for name in outcome.metrics if name not in unused],
        [{key: row[key] for key in row if key not in unused} for row in outcome.rows],
    )


Scored = tuple[Sequence[Any], Columns]
"""A method's outputs, one a question, and their scores."""


def _deduction(method: Deduces, questions: Sequence[Question], judges: Sequence[Judge]) -> Scored:
    wordings, inputs = [q.wording for q in questions], [q.inputs for q in questions]
    answers = method.deduce([q.task for q in questions], wordings, inputs)
    columns = _answer_columns(answers, questions, judges)
    if isinstance(method, Predicts):
        columns["answer_loss"] = method.answer_losses(
            [q.task for q in questions], wordings, [q.asked for q in questions]
        )
    if isinstance(method, Doubts):
        columns["agreement"] = method.agreement(wordings, inputs, answers)
    return answers, columns


def _induction(method: Induces, questions: Sequence[Question], judges: Sequence[Judge]) -> Scored:
    induced = method.induce([q.shown for q in questions])
    columns: Columns = {}
    for judge in judges:
        columns |= judge.columns(induced, questions)
    return induced, columns


def _reasoning(method: Reasons, questions: Sequence[Question], judges: Sequence[Judge]) -> Scored:
    shown, inputs = [q.shown for q in questions], [q.inputs for q in questions]
    answers = method.reason(shown, inputs)
    columns = _answer_columns(answers, questions, judges)
    if isinstance(method, ReasonsOtherwise):
        for name, others in method.reason_otherwise(shown, inputs).items():
            columns[f"exact_match_{name}"] = metric_rows(
                exact_match, others, [q.asked for q in questions]
            )
    return answers, columns


def _reconstruction(
    method: Reconstructs, questions: Sequence[Question], judges: Sequence[Judge]
) -> Scored:
    """Right where the text is the very instruction; spaces do not count. And whether the decoder
    reads the latent at all, which a text that it writes shows late (metrics.py)."""
    texts = method.reconstruct([q.wording for q in questions])
    pairs = [
        (one_line(text), one_line(q.wording)) for text, q in zip(texts, questions, strict=True)
    ]
    columns: Columns = {
        "exact_match": [[exact_match(text, [wording])] for text, wording in pairs],
        "normalised_match": [[normalised_match(text, [wording])] for text, wording in pairs],
        "rouge_l": [[rouge_l(text, [wording])] for text, wording in pairs],
    }
    if isinstance(method, ReadsLatents):
        losses, others = method.text_losses(
            [q.task for q in questions], [q.wording for q in questions]
        )
        columns["text_loss"] = [[loss] for loss in losses]
        columns["latent_gain"] = [
            [other - loss] for loss, other in zip(losses, others, strict=True)
        ]
    return texts, columns


_MEASURES: dict[Direction, Callable[[Any, Sequence[Question], Sequence[Judge]], Scored]] = {
    "deduction": _deduction,
    "induction": _induction,
    "reasoning": _reasoning,
    "reconstruction": _reconstruction,
}


def _answer_columns(
    answers: AnswersByTask, questions: Sequence[Question], judges: Sequence[Judge]
) -> Columns:
    columns = columns_of_answers(answers, questions)
    for judge in judges:
        columns |= judge.answer_columns(answers, questions)
    return columns


def columns_of_answers(answers: AnswersByTask, questions: Sequence[Question]) -> Columns:
    """Every metric of answers (metrics.py); one that does not apply to a task has an empty row."""
    asked = [q.asked for q in questions]
    labels = [closed_labels(q.task) for q in questions]
    return {
        "exact_match": metric_rows(exact_match, answers, asked),
        "normalised_match": metric_rows(normalised_match, answers, asked),
        "label_accuracy": [
            [label_match(answer, e.answers, names) for answer, e in zip(row, few, strict=True)]
            if names
            else []
            for row, few, names in zip(answers, asked, labels, strict=True)
        ],
        "constant_label": [
            constant_label(row, [e.answers for e in few], names)
            for row, few, names in zip(answers, asked, labels, strict=True)
        ],
        "rouge_l": metric_rows(rouge_l, answers, asked),
        "paper_metric": paper_rows(answers, asked, questions),
    }
