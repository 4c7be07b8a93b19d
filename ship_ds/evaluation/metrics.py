"""Scores with their uncertainty: exact match as defined for SHIP, ROUGE-L, and bootstrap intervals
over tasks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

_NUMBERS = r"-?(?:0|[1-9]\d*)(?:[\s,]+-?(?:0|[1-9]\d*))*"
_LIST = re.compile(rf"{_NUMBERS}|\[\s*(?:{_NUMBERS})?\s*\]")
_NUMBER = re.compile(r"-?\d+")
_NUM_RESAMPLES = 2000


def exact_match(answer: str | None, references: Sequence[str]) -> bool:
    """Equal to any reference: as parsed lists where both are lists of integers, else as stripped
    strings.

    None, an answer that never ended, is wrong.
    """
    return answer is not None and any(
        _equal(answer.strip(), reference.strip()) for reference in references
    )


def _equal(answer: str, reference: str) -> bool:
    if _LIST.fullmatch(answer) and _LIST.fullmatch(reference):
        return [int(n) for n in _NUMBER.findall(answer)] == [
            int(n) for n in _NUMBER.findall(reference)
        ]
    return answer == reference


def rouge_l(answer: str | None, references: Sequence[str]) -> float:
    """The best F-measure of the longest common subsequence of words (Lin 2004) with any reference,
    0 to 1.

    An exact match is 1 whatever its script: the scorer sees no words in an empty list or in
    Chinese.
    """
    if answer is None:
        return 0.0
    if exact_match(answer, references):
        return 1.0
    return max(
        (_scorer().score(reference, answer)["rougeL"].fmeasure for reference in references),
        default=0.0,
    )


@cache
def _scorer() -> Any:
    # Here: it brings nltk and scikit-learn along, two seconds of every verb that scores nothing.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


@dataclass(frozen=True)
class Score:
    """The mean over tasks of the mean over each task's examples, with a 95 % bootstrap interval
    over tasks."""

    value: float
    ci95: tuple[float, float]
    num_tasks: int
    num_examples: int

    def interval(self) -> dict[str, Any]:
        """For JSON, which has no NaN: null where there was no task."""
        if not self.num_tasks:
            return {"value": None, "ci95": None}
        return {"value": round(self.value, 4), "ci95": [round(bound, 4) for bound in self.ci95]}

    def as_json(self) -> dict[str, Any]:
        return {
            "exact_match": self.interval(),
            "n_tasks": self.num_tasks,
            "n_examples": self.num_examples,
        }


def score(results: Sequence[Sequence[float]]) -> Score:
    """`results` holds one row a task; no task at all gives NaN and zero counts."""
    if not results:
        return Score(float("nan"), (float("nan"), float("nan")), 0, 0)
    means = np.array([np.mean(row) for row in results])
    picks = np.random.default_rng(0).integers(0, len(means), (_NUM_RESAMPLES, len(means)))
    low, high = np.quantile(means[picks].mean(1), [0.025, 0.975])
    return Score(
        float(means.mean()), (float(low), float(high)), len(means), sum(len(row) for row in results)
    )
