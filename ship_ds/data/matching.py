"""Whether an answer is a right one: exact match, which all that counts right answers goes by."""

import re
import unicodedata
from collections.abc import Sequence
from typing import TypeGuard

from ship_ds.data.task import CutOff

_NUMBERS = r"-?(?:0|[1-9]\d*)(?:[\s,]+-?(?:0|[1-9]\d*))*"
_LIST = re.compile(rf"{_NUMBERS}|\[\s*(?:{_NUMBERS})?\s*\]")
_NUMBER = re.compile(r"-?\d+")


def exact_match(answer: str | None, references: Sequence[str]) -> bool:
    """Equal to any reference: as parsed lists where both are lists of integers, else as stripped
    strings, however Unicode writes their letters (`composed`).

    None and `CutOff`, answers that never ended, are wrong.
    """
    return has_ended(answer) and any(
        _equal(answer.strip(), reference.strip()) for reference in references
    )


def has_ended(answer: str | None) -> TypeGuard[str]:
    """Whether it is an answer at all."""
    return answer is not None and not isinstance(answer, CutOff)


def _equal(answer: str, reference: str) -> bool:
    if is_list(answer) and is_list(reference):
        return integers(answer) == integers(reference)
    return composed(answer) == composed(reference)


def composed(text: str) -> str:
    """The text with each accent in its letter where there is such a letter (Unicode's NFC): many
    tokenizers write "e" and an accent as "é". No more is made equal: "x²" is not "x2"."""
    return unicodedata.normalize("NFC", text)


def lowered(text: str) -> str:
    """In lower case, each accent in its letter (`composed`)."""
    return composed(text.lower())


def is_list(text: str) -> bool:
    """Whether it reads as integers: "3 1", "[3, 1]", "-4"."""
    return _LIST.fullmatch(text.strip()) is not None


def integers(text: str) -> list[str]:
    """The numbers of such a list, as texts: Python makes no number of thousands of digits."""
    # None begins with a zero, but for zero itself.
    return [number.replace("-0", "0") for number in _NUMBER.findall(text)]
