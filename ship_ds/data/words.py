"""Words of any script: Thai, Chinese and others put no spaces between theirs, so there a letter
stands for one."""

import re
import unicodedata
from collections.abc import Iterator

# As a regular expression has them between brackets: Thai and Lao, Burmese, Khmer, kana; Han
_ALPHABETS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
_IDEOGRAPHS = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED = _ALPHABETS + _IDEOGRAPHS
_LETTER, _HAN = re.compile(f"[{_UNSPACED}]"), re.compile(f"[{_IDEOGRAPHS}]")
_SOUNDS = re.compile(f"[{_ALPHABETS}]+")
_PART = re.compile(rf"[{_UNSPACED}][^{_UNSPACED}\w\s]*\s?|[^{_UNSPACED}\s]+\s?")
# CJK punctuation and full-width forms of ASCII's
_WIDE_MARK = re.compile("[\u3001-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]")
_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")
_MARKS = ".,:;!?\"'()"
"""Of ASCII: other signs may be what an instruction is about, such as "-1" and "#"."""


def spaced(text: str) -> str:
    """The text with spaces around each letter of a script that has none between words."""
    return _LETTER.sub(r" \g<0> ", text)


def parted(text: str) -> list[str]:
    """Its words, each with the marks and the space behind it: joined, they are the text with single
    spaces. A letter of a script without spaces is a word."""
    return _PART.findall(" ".join(text.split()))


def stands_alone(letter: str) -> bool:
    """Whether a letter is a word, or a mark of those scripts."""
    return _LETTER.match(letter) is not None or _WIDE_MARK.match(letter) is not None


def plain_words(text: str) -> list[str]:
    """Lower-case words by which two wordings are compared, however they are encoded (NFKC).

    Punctuation around a word is not part of it, in any script. A sign of its own ("=") is a word;
    beyond ASCII, where a mark is often parted from its word, only what is no punctuation. Of
    scripts without spaces each Han letter is a word, and each three letters in a row of the others.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    # Splits of ASCII texts are those of earlier versions: runs go on with no others.
    if text.isascii():
        return [word.strip(_MARKS) or word for word in text.split()]
    marks = _MARKS + "".join(c for c in set(text) if not c.isascii() and is_punctuation(c))
    words = _SOUNDS.sub(_threes, _HAN.sub(r" \g<0> ", text)).split()
    return [kept for word in words if (kept := word.strip(marks))] or words


def words_and_marks(text: str) -> Iterator[str]:
    """Lower-case words and single marks, however they are encoded (NFKC): by which examples are
    compared, where "?" and "(a)" say as much of a task as words do."""
    text = spaced(unicodedata.normalize("NFKC", text)).lower()
    return (match[0] for match in _WORD_OR_MARK.finditer(text))


def _threes(run: re.Match[str]) -> str:
    """Its letters, three at a time: by single ones any two long texts of an alphabet are alike."""
    parts = "".join(" " if is_punctuation(c) else c for c in run[0]).split()
    threes = (part[i : i + 3] for part in parts for i in range(max(1, len(part) - 2)))
    return f" {' '.join(threes)} "


def is_punctuation(letter: str) -> bool:
    """Whether Unicode calls it so, in any script."""
    return unicodedata.category(letter).startswith("P")
