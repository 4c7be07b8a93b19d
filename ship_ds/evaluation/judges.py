"""Judges: each reads induced instructions beside the tasks that they should name, or answers beside
the right ones, and adds columns of its own.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ship_ds.api import Ship
from ship_ds.console import log
from ship_ds.data.matching import exact_match
from ship_ds.data.task import Example
from ship_ds.evaluation.config import Direction, EndpointConfig, JudgeName
from ship_ds.evaluation.endpoint import EndpointJudge
from ship_ds.evaluation.judge import Columns, Judge
from ship_ds.evaluation.metrics import paper_score, rouge_l
from ship_ds.evaluation.questions import Question
from ship_ds.evaluation.similarity import SentenceEncoder, SimilarityJudge
from ship_ds.inference.deduction import AnswersByTask, answer_read, answer_stated


class ExactMatchJudge(Judge):
    """Equal, word for word, to any wording of the task."""

    def columns(self, induced: Sequence[str], questions: Sequence[Question]) -> Columns:
        return {
            "exact_match": [
                [exact_match(one_line(text), [one_line(wording) for wording in q.right_texts])]
                for text, q in zip(induced, questions, strict=True)
            ]
        }


class RougeJudge(Judge):
    """ROUGE-L to the wording of the task that is closest."""

    def columns(self, induced: Sequence[str], questions: Sequence[Question]) -> Columns:
        return {
            "rouge_l": [
                [rouge_l(text, q.right_texts)] for text, q in zip(induced, questions, strict=True)
            ]
        }


class ExecutionJudge(Judge):
    """Held-out inputs answered rightly with the text in the Task LLM's prompt, and with the adapter
    of the text.

    The second takes the text through encoder and hypernetwork: a text can smuggle a latent that it
    does not say. Where the format's paper scores answers in a way of its own, so do two columns
    more.
    """

    def __init__(self, ship: Ship) -> None:
        self.model, self.max_new_tokens = ship.model, ship.config.evaluation.max_new_tokens

    def columns(self, induced: Sequence[str], questions: Sequence[Question]) -> Columns:
        inputs = [[example.input for example in q.checked] for q in questions]
        length = self.max_new_tokens
        stated = answer_stated(self.model, induced, inputs, length, keeps_cut_off=True)
        through = answer_read(self.model, induced, induced, inputs, length, keeps_cut_off=True)
        checked = [q.checked for q in questions]
        return {
            "execution_accuracy": metric_rows(exact_match, stated, checked),
            "execution_accuracy_encoder": metric_rows(exact_match, through, checked),
            "execution_paper_metric": paper_rows(stated, checked, questions),
            "execution_paper_metric_encoder": paper_rows(through, checked, questions),
        }


class PublishedExecutionJudge(Judge):
    """Execution accuracy as the paper of instruction induction has it (Honovich et al. 2022): the
    bare base, in that paper's prompt, scored by that paper's metric; tasks of other formats by
    exact match."""

    def __init__(self, ship: Ship) -> None:
        self.model, self.max_new_tokens = ship.model, ship.config.evaluation.max_new_tokens

    def columns(self, induced: Sequence[str], questions: Sequence[Question]) -> Columns:
        inputs = [[example.input for example in q.checked] for q in questions]
        prompt = self.model.prompts.published_task_prompt
        answers = answer_stated(
            self.model, induced, inputs, self.max_new_tokens, prompt=prompt, keeps_cut_off=True
        )
        checked = [q.checked for q in questions]
        exact, paper = (
            metric_rows(exact_match, answers, checked),
            paper_rows(answers, checked, questions),
        )
        # By emptiness: a paper's row of zeros is a score, and an empty row no metric of a paper's.
        return {"published_execution": [a or b for a, b in zip(paper, exact, strict=True)]}


def one_line(text: str) -> str:
    """The same words, one space between them."""
    return " ".join(text.split())


def metric_rows(
    metric: Callable[[str | None, Sequence[str]], float],
    answers: AnswersByTask,
    asked: Sequence[Sequence[Example]],
) -> list[list[float]]:
    """The metric of every answer to these examples.

    Args:
        metric: of an answer and every right one.
        answers: one row a task.
        asked: the examples that they answer.
    """
    return [
        [metric(answer, example.answers) for answer, example in zip(row, examples, strict=True)]
        for row, examples in zip(answers, asked, strict=True)
    ]


def paper_rows(
    answers: AnswersByTask, asked: Sequence[Sequence[Example]], questions: Sequence[Question]
) -> list[list[float]]:
    """The metric of the format's paper, where a task has one; else an empty row.

    Args:
        answers: one row a task.
        asked: the examples that they answer.
        questions: one a task; the task says which metric, or none.

    Returns:
        One row a task, one number an answer, from 0 to 1.
    """
    return [
        metric_rows(partial(paper_score, q.task.task.paper_metric), [row], [examples])[0]
        if q.task.task.paper_metric
        else []
        for row, examples, q in zip(answers, asked, questions, strict=True)
    ]


def judges_of(direction: Direction, names: Sequence[JudgeName]) -> list[JudgeName]:
    """Those of these judges that score anything in a direction: texts, or answers."""
    if direction == "induction":
        return list(names)
    return [name for name in names if name in _OF_ANSWERS and direction != "reconstruction"]


_OF_ANSWERS: tuple[JudgeName, ...] = ("similarity", "endpoint")


def build_judges(
    names: Sequence[JudgeName], ship: Ship, endpoint: EndpointConfig, folder: Path
) -> list[Judge]:
    """The judges of these names, and exact match, which is always there.

    Args:
        names: those that are wanted beside it.
        ship: the run, which executes texts.
        endpoint: of a judge that is asked for its word.
        folder: where its replies are kept.
    """
    makers: dict[JudgeName, Callable[[], Judge]] = {
        "execution": lambda: ExecutionJudge(ship),
        "published-execution": lambda: PublishedExecutionJudge(ship),
        "rouge": RougeJudge,
        "similarity": lambda: SimilarityJudge(SentenceEncoder.from_wheel(log)),
        "endpoint": lambda: EndpointJudge(endpoint, folder),
    }
    return [ExactMatchJudge(), *(makers[name]() for name in names)]
