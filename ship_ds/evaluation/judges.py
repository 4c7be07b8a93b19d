"""Judges of induced instructions: each reads the texts beside the tasks that they should name and
adds columns of its own.

Letters: T tasks, Z latent size.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from ship_ds.api import Ship
from ship_ds.evaluation.config import EndpointConfig, JudgeName
from ship_ds.evaluation.endpoint import EndpointJudge
from ship_ds.evaluation.metrics import exact_match, rouge_l
from ship_ds.evaluation.questions import Question
from ship_ds.inference.deduction import AnswersByTask, answer_latents, answer_stated

Columns = dict[str, list[list[float]]]
"""A metric's name -> one row a task, each value from 0 to 1."""


class Judge(Protocol):
    """Scores induced instructions, one column of numbers for each metric."""

    def columns(self, induced: Sequence[str], questions: Sequence[Question]) -> Columns: ...


class ExactMatchJudge:
    """Equal, word for word, to any wording of the task."""

    def columns(self, induced: Sequence[str], questions: Sequence[Question]) -> Columns:
        return {
            "exact_match": [
                [exact_match(one_line(text), [one_line(wording) for wording in q.right_texts])]
                for text, q in zip(induced, questions, strict=True)
            ]
        }


class RougeJudge:
    """ROUGE-L to the wording of the task that is closest."""

    def columns(self, induced: Sequence[str], questions: Sequence[Question]) -> Columns:
        return {
            "rouge_l": [
                [rouge_l(text, q.right_texts)] for text, q in zip(induced, questions, strict=True)
            ]
        }


class ExecutionJudge:
    """Held-out inputs answered rightly with the text in the Task LLM's prompt, and with the adapter
    of the text.

    The second takes the text through encoder and hypernetwork: a text can smuggle a latent that it
    does not say.
    """

    def __init__(self, ship: Ship) -> None:
        self.model, self.max_new_tokens = ship.model, ship.config.evaluation.max_new_tokens

    def columns(self, induced: Sequence[str], questions: Sequence[Question]) -> Columns:
        inputs = [[example.input for example in q.checked] for q in questions]
        latent_TZ = self.model.encode(induced)
        stated = answer_stated(self.model, induced, inputs, self.max_new_tokens)
        through = answer_latents(self.model, latent_TZ, induced, inputs, self.max_new_tokens)
        return {
            "execution_accuracy": _right(stated, questions),
            "execution_accuracy_encoder": _right(through, questions),
        }


def one_line(text: str) -> str:
    """The same words, one space between them."""
    return " ".join(text.split())


def _right(answers: AnswersByTask, questions: Sequence[Question]) -> list[list[float]]:
    return [
        [
            exact_match(answer, example.answers)
            for answer, example in zip(row, q.checked, strict=True)
        ]
        for row, q in zip(answers, questions, strict=True)
    ]


def build_judges(
    names: Sequence[JudgeName], ship: Ship, endpoint: EndpointConfig, folder: Path
) -> list[Judge]:
    """Exact match needs no judge and is always there."""
    makers: dict[JudgeName, Callable[[], Judge]] = {
        "execution": lambda: ExecutionJudge(ship),
        "rouge": RougeJudge,
        "endpoint": lambda: EndpointJudge(endpoint, folder),
    }
    return [ExactMatchJudge(), *(makers[name]() for name in names)]
