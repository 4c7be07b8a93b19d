"""What is left out of a supply, as functions of texts alone."""

from collections.abc import Sequence

from ship_ds.data.matching import exact_match
from ship_ds.data.task import Example
from ship_ds.evaluation.metrics import rouge_l


def is_new(text: str, known: Sequence[str], max_rouge: float) -> bool:
    """Whether the text's ROUGE-L with every known one is below `max_rouge` (Wang et al. 2023, arXiv
    2212.10560, section 2.2).

    Args:
        text: an instruction.
        known: those that it must not be like; where there are none, any is new.
        max_rouge: from 0 to 1; a copy is never below it.
    """
    return all(rouge_l(text, [other]) < max_rouge for other in known)


def agreed(
    inputs: Sequence[str], answers: Sequence[str | None], agreement: Sequence[float], least: float
) -> list[Example]:
    """Examples of the answers that end, say something, and that `least` of the samples give.

    Args:
        inputs: of one task.
        answers: one of each input; None: it did not end in time.
        agreement: the share of samples that give each of these answers, from 0 to 1.
        least: the smallest such share that is kept.
    """
    return [
        Example(text, answer)
        for text, answer, share in zip(inputs, answers, agreement, strict=True)
        if answer is not None and answer.strip() and share >= least
    ]


def is_trivial(examples: Sequence[Example]) -> bool:
    """Whether over half of the answers are the input, or all are one."""
    copies = sum(exact_match(e.target, [e.input]) for e in examples)
    return 2 * copies > len(examples) or len({e.target for e in examples}) < 2


def share_alike(answers: Sequence[str | None], examples: Sequence[Example]) -> float:
    """Of the answers, those that are the examples' own, 0 to 1."""
    alike = [exact_match(a, e.answers) for a, e in zip(answers, examples, strict=True)]
    return sum(alike) / len(alike)
