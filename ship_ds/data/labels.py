"""Tasks whose answers are a closed set, their labels: which tasks those are, which label a text
means, and draws in which each label is as frequent as the others.
"""

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

from ship_ds.data.matching import composed, lowered
from ship_ds.data.task import Example, SplitTask

_WORD = re.compile(r"(?:(?<!\w)[+-](?=\d))?\w+(?:[-'.]\w+)*")
"""A word of a label: with its sign before a number, and with what stands within it."""
MOST_LABELS = 10
"""Distinct answers of a task that count as a closed set, at most."""


def label_forms(examples: Sequence[Example]) -> dict[str, str]:
    """The form (`label_form`) of every target of a task's training examples, in their order, where
    these are a closed set; empty where they are not.

    They are one where they have 2 to 10 distinct forms, each of them twice on average.
    """
    forms: dict[str, str] = {}
    distinct_forms: set[str] = set()
    for example in examples:
        if example.target not in forms:
            forms[example.target] = label_form(example.target)
            distinct_forms.add(forms[example.target])
            if len(distinct_forms) > MOST_LABELS:
                return {}
    return forms if 2 <= len(distinct_forms) <= len(examples) // 2 else {}


def closed_labels(task: SplitTask) -> tuple[str, ...]:
    """The task's labels, each as it is first written; none where its training examples are no
    closed set (`label_forms`), or a test target is not among it."""
    labels: dict[str, str] = {}
    for target, form in label_forms(task.train).items():
        labels.setdefault(form, target)
    if any(label_form(example.target) not in labels for example in task.test):
        return ()
    return tuple(labels.values())


def num_by_label(examples: Sequence[Example], forms: Mapping[str, str]) -> Counter[str]:
    """How many examples of a task each of its labels has, by form."""
    return Counter(forms[example.target] for example in examples)


def sample_by_label(
    examples: Sequence[Example], count: int, forms: Mapping[str, str], rng: random.Random
) -> list[Example]:
    """Examples without repeats, each label as often as the others or once more, until it runs out.

    Args:
        examples: of one task.
        count: at most as many as there are.
        forms: of their targets (`label_forms`).
        rng: decides which, and the order of the labels in each round of them.
    """
    left: dict[str, list[Example]] = {}
    for example in rng.sample(examples, len(examples)):
        left.setdefault(forms[example.target], []).append(example)
    drawn: list[Example] = []
    while len(drawn) < count:
        # Anew in each round: with one order for all, the last labels of it would be drawn less.
        labels = [label for label, some in left.items() if some]
        rng.shuffle(labels)
        drawn += [left[label].pop() for label in labels]
    return drawn[:count]


def label_form(text: str) -> str:
    """Words in lower case, without the punctuation around them: "(B)." is "b". What makes a label
    another one stays: a sign before a number, a point within one, "A" where SQuAD's form sees an
    article; of signs alone ("+", "-") all."""
    return lowered(_words(text)) or _plain(text).strip()


def _plain(text: str) -> str:
    """Without the selectors that ask for an emoji's picture, or for its letter."""
    return composed(text).replace("\ufe0e", "").replace("\ufe0f", "")


def _words(text: str) -> str:
    """The words, one space between them."""
    text = _plain(text)
    return " ".join(text[slice(*word.span())] for word in _WORD.finditer(_as_letters(text)))


def _signs(text: str) -> str:
    """What stands between the words, which each leave a place behind."""
    return _WORD.sub("\0", _as_letters(_plain(text)))


def _as_letters(text: str) -> str:
    """The text with a letter for every vowel sign and accent that stands behind one: to `re` they
    are no part of a word, which would make one of हाँ, हूँ and है."""
    if text.isascii():
        return text
    letters: list[str] = []
    for letter in text:
        is_mark = unicodedata.category(letter) in ("Mn", "Mc")
        letters.append("x" if is_mark and letters and letters[-1].isalnum() else letter)
    return "".join(letters)


def nearest_label(answer: str | None, labels: Sequence[str]) -> str | None:
    """The label that an answer means, by the first of these rules that finds one (`label_form`):
    the equal one; the one that stands first in the answer as whole words, in its own case if any
    does ("It is a B" means "B"), the longer of two at one place; of those without words the one
    that stands first among the answer's signs ("It is <=." means "<="); the one most alike letter
    by letter (difflib's ratio). None: no letter in common.
    """
    if answer is None:
        return None
    answer_form, forms = label_form(answer), [label_form(label) for label in labels]
    if answer_form in forms:
        return labels[forms.index(answer_form)]
    words = [f" {_words(text)} " for text in (answer, *labels)]
    named = words[1:]
    signs = [form if not name.strip() else "" for form, name in zip(forms, named, strict=True)]
    for text, names in (
        (words[0], named),
        (lowered(words[0]), [lowered(name) for name in named]),
        (_signs(answer), signs),
    ):
        # A label without words is in every text as words, and one with them as signs.
        places = [(text.find(name), -len(name), i) for i, name in enumerate(names) if name.strip()]
        within = [place for place in places if place[0] >= 0]
        if within:
            return labels[min(within)[2]]
    likeness = [SequenceMatcher(None, answer_form, form, autojunk=False).ratio() for form in forms]
    best = max(range(len(labels)), key=likeness.__getitem__)
    return labels[best] if likeness[best] else None
