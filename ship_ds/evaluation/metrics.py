"""Scores of answers and texts with their uncertainty: what each metric is, and the interval over
tasks.

    exact_match         the very answer; lists of integers as lists (data/matching.py)
    normalised_match    SQuAD's: case, punctuation, articles and white space do not count
    label_accuracy      where a task's answers are a closed set: the nearest label is the right one
    constant_label      of such a task: all inputs got one label, which is not right for all of them
    rouge_l             words in common, in order
    paper_metric        what the paper of the task's format scores it by
    answer_loss         nats a token of the right answer: no answer is generated, and less is better
    text_loss           nats a token of an instruction beside its own latent: likewise
    latent_gain         nats a token by which that is less than beside another task's latent

What scores an answer compares it with every right one and takes the best. An answer that never
ended is wrong in the first two; of a `CutOff` the others score what was written. Letters are
compared as NFC has them (`composed`), but for paper_metric.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ship_ds.data.labels import label_form, nearest_label
from ship_ds.data.matching import exact_match, has_ended, is_list, lowered
from ship_ds.data.task import PaperMetric, SplitTask
from ship_ds.data.words import is_punctuation, spaced

_NUM_RESAMPLES = 2000
_GROUPS = re.compile(r"-?[1-9]\d{0,2}(?:,\d{3})+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
ANSWER_METRICS = (
    *("exact_match", "normalised_match", "label_accuracy", "constant_label", "paper_metric"),
    *("rouge_l", "answer_loss"),
)
"""Of answers, in the order of the tables."""
LESS_IS_BETTER = ("constant_label", "answer_loss")
_MIN_INPUTS = 4


def normalised_match(answer: str | None, references: Sequence[str]) -> bool:
    """Equal to any reference in normal form; lists of integers as lists, where a sign counts, and
    "1,234" as 1234 as well: a list to exact match, it may be a number in groups of three.

    A text of articles alone keeps them ("A." is "a"), and one of punctuation alone all of it.
    """
    if exact_match(answer, references):
        return True
    return has_ended(answer) and any(_are_alike(answer, reference) for reference in references)


def _are_alike(answer: str, reference: str) -> bool:
    answer, reference = _ungrouped(answer), _ungrouped(reference)
    if is_list(answer) and is_list(reference):
        return exact_match(answer, [reference])
    forms = [
        normal_form(text) or " ".join(_unpunctuated(text).split()) or lowered(text.strip())
        for text in (answer, reference)
    ]
    return forms[0] == forms[1]


def _ungrouped(text: str) -> str:
    return text.replace(",", "") if _GROUPS.fullmatch(text.strip()) else text


def normal_form(text: str) -> str:
    """Lower case, without punctuation and English articles, one space between words.

    As SQuAD's evaluation does it (Rajpurkar et al. 2016), and as MLQA's for the punctuation of
    every script (Lewis et al. 2020). Signs are taken out, not replaced: "3.5" becomes "35".
    """
    return " ".join(_ARTICLES.sub(" ", _unpunctuated(text)).split())


def _unpunctuated(text: str) -> str:
    return "".join(letter for letter in lowered(text) if not _is_punctuation(letter))


def _is_punctuation(letter: str) -> bool:
    return letter in string.punctuation or is_punctuation(letter)


def label_match(answer: str | None, references: Sequence[str], labels: Sequence[str]) -> bool:
    """Whether the label that is nearest to the answer is a right one.

    Args:
        answer: None: it never ended.
        references: the right labels.
        labels: all of the task.
    """
    nearest = nearest_label(answer, labels)
    return nearest is not None and label_form(nearest) in map(label_form, references)


def constant_label(
    answers: Sequence[str | None], references: Sequence[Sequence[str]], labels: Sequence[str]
) -> list[float]:
    """Whether the answers to all inputs of a task with labels mean one label, or none at all.

    Args:
        answers: one an input; None for one that never ended.
        references: every right answer of each input.
        labels: of the task (`labels.closed_labels`).

    Returns:
        1 or 0 for the whole task; nothing where it has no labels or fewer than four inputs, which
        chance may well answer alike, and where one label is right for all of them, which a method
        is right to give.
    """
    right = [set(map(label_form, one)) for one in references]
    if not labels or len(answers) < _MIN_INPUTS or set.intersection(*right):
        return []
    return [float(len({nearest_label(answer, labels) for answer in answers}) == 1)]


def metrics_to_show(tasks: Iterable[SplitTask]) -> tuple[str, ...]:
    """The metrics that say something of these tasks' answers: exact match alone where all of them
    are lists of integers, the empty one among them."""
    targets = (example.target.strip() for task in tasks for example in task.test)
    has_text = any(target and not is_list(target) for target in targets)
    return ANSWER_METRICS if has_text else ANSWER_METRICS[:1]


def majority_label(task: SplitTask) -> str:
    """The most frequent target of the task's training examples, the first of equally frequent
    ones."""
    return Counter(example.target for example in task.train).most_common(1)[0][0]


def rouge_l(answer: str | None, references: Sequence[str]) -> float:
    """The best F-measure of the longest common subsequence of words (Lin 2004) with any reference,
    0 to 1.

    An exact match is 1, also where neither has a word, as empty lists. Of an answer that never
    ended, what was written counts, as where a benchmark cuts answers at a length.
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

    return RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """The scorer's own words for ASCII; beyond it the same of every script.

    Its own tokenizer takes letters outside a-z for spaces: texts in Chinese would have no words.
    """

    def tokenize(self, text: str) -> list[str]:
        """Runs of letters, digits and what is written over them, in lower case; of scripts without
        spaces every letter is a word (as mT5's multilingual ROUGE has it)."""
        text = lowered(text)
        if text.isascii():
            return _ASCII_WORD.findall(text)
        kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in spaced(text))
        return "".join(kept).split()


_ASCII_WORD = re.compile("[a-z0-9]+")


def paper_score(metric: PaperMetric, answer: str | None, references: Sequence[str]) -> float:
    """The best score with any reference by what the paper of the task's format calls its metric.

    Those of instruction induction (Honovich et al. 2022): each compares texts in that paper's
    normal form. `exact`: equal; `set`: the same words; `contains`: the reference stands in the
    answer as whole words; `f1`: of the words in common.

    Args:
        metric: its name.
        answer: None: it never ended, which scores 0.
        references: every right answer.

    Returns:
        From 0 to 1.
    """
    if answer is None:
        return 0.0
    form = _paper_form(answer)
    return max(
        (_PAPER_METRICS[metric](form, _paper_form(reference)) for reference in references),
        default=0.0,
    )


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _paper_form(text: str) -> str:
    """The first sentence of the first line in lower case, without punctuation and "and"."""
    for left_out in (" and ", "Sentence 1:", "Sentence 2:"):
        text = text.replace(left_out, " ")
    sentence = text.strip().split("\n")[0].split(".")[0]
    return sentence.lower().replace("-", " ").translate(_NO_PUNCTUATION)


def _exact(answer: str, reference: str) -> float:
    return float(answer == reference)


def _same_words(answer: str, reference: str) -> float:
    return float(set(answer.split()) == set(reference.split()))


def _contains(answer: str, reference: str) -> float:
    return float(re.search(rf"\b({re.escape(reference)})\b", answer) is not None)


def _f1(answer: str, reference: str) -> float:
    ours, theirs = answer.split(), reference.split()
    num_common = (Counter(ours) & Counter(theirs)).total()
    return 2 * num_common / (len(ours) + len(theirs)) if num_common else 0.0


_PAPER_METRICS: dict[str, Callable[[str, str], float]] = {
    "exact": _exact,
    "set": _same_words,
    "contains": _contains,
    "f1": _f1,
}


@dataclass(frozen=True)
class Score:
    """The mean over tasks of the mean over each task's examples, with a 95 % bootstrap interval
    over tasks."""

    value: float
    ci95: tuple[float, float]
    num_tasks: int
    num_examples: int

    def interval(self) -> dict[str, Any]:
        """For JSON, which has no NaN: null where there was no task, or a loss was not finite."""
        if not math.isfinite(self.value):
            return {"value": None, "ci95": None}
        return {"value": round(self.value, 4), "ci95": [round(bound, 4) for bound in self.ci95]}


def score(results: Sequence[Sequence[float]]) -> Score:
    """`results` holds one row a task; tasks with an empty row are not counted, and no task at all
    gives NaN."""
    results = [row for row in results if len(row)]
    if not results:
        return Score(float("nan"), (float("nan"), float("nan")), 0, 0)
    means = np.array([np.mean(row) for row in results])
    picks = np.random.default_rng(0).integers(0, len(means), (_NUM_RESAMPLES, len(means)))
    with np.errstate(invalid="ignore"):  # a loss may be infinite
        low, high = np.quantile(means[picks].mean(1), [0.025, 0.975])
    return Score(
        float(means.mean()), (float(low), float(high)), len(means), sum(len(row) for row in results)
    )


def summary(metrics: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each metric of the rows, one a task, as {value, ci95}, beside n_tasks and n_examples.

    A metric that applies to some of the tasks alone has its own n_tasks, and one that applies to
    none is left out, but exact match; n_examples counts the items of the metric that has most.
    """
    scores = {metric: score([row[metric] for row in rows]) for metric in metrics}
    summed: dict[str, Any] = {"exact_match": score([]).interval()} if not rows else {}
    for metric, result in scores.items():
        if result.num_tasks:
            partly = {"n_tasks": result.num_tasks} if result.num_tasks < len(rows) else {}
            summed[metric] = result.interval() | partly
    return {
        **summed,
        "n_tasks": len(rows),
        "n_examples": max((result.num_examples for result in scores.values()), default=0),
    }
