"""The signature of a judge (judges.py has them)."""

from collections.abc import Sequence

from ship_ds.evaluation.questions import Question
from ship_ds.inference.deduction import AnswersByTask

Columns = dict[str, list[list[float]]]
"""A metric's name -> one row a task, each value from 0 to 1; an empty row where it does not
apply."""


class Judge:
    """Scores induced instructions, answers or both, one column of numbers for each metric."""

    def columns(self, induced: Sequence[str], questions: Sequence[Question]) -> Columns:
        """Of instructions, one a question."""
        return {}

    def answer_columns(self, answers: AnswersByTask, questions: Sequence[Question]) -> Columns:
        """Of the answers to what each question asks."""
        return {}
