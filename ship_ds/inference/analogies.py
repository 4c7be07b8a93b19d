"""Instructions that the known ones imply: where several differ in one word alone, the same with another word of that kind.

From "remove every 3", "remove every 5" and "remove every 8" beside "put 3 at the end", "put 4 at the end" and so on follows
"remove every 4". Nothing is known here of what words mean, and what follows need not make sense; it is tested on examples.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

Slot = tuple[tuple[str, ...], tuple[str, ...]]
"""The words before and after one that is left out."""
MIN_WORDS = 3
MIN_OVERLAP = 0.5


def analogies(instructions: Sequence[str]) -> list[str]:
    """Those that are not among `instructions`, each once.

    A slot that at least `MIN_WORDS` words fill takes those of every such slot with which it shares at least half of the words
    that fill the one or the other (Jaccard index). Words are parted by single spaces in what follows.
    """
    fillers: dict[Slot, set[str]] = defaultdict(set)
    for words in map(str.split, instructions):
        for i, word in enumerate(words):
            fillers[tuple(words[:i]), tuple(words[i + 1 :])].add(word)
    open_slots = {slot: frozenset(words) for slot, words in fillers.items() if len(words) >= MIN_WORDS}
    kinds = {words: _kind(words, open_slots.values()) for words in set(open_slots.values())}
    found = (
        " ".join((*before, word, *after)) for (before, after), words in open_slots.items() for word in sorted(kinds[words])
    )
    known = {" ".join(text.split()) for text in instructions}
    return [text for text in dict.fromkeys(found) if text not in known]


def _kind(words: frozenset[str], others: Iterable[frozenset[str]]) -> frozenset[str]:
    alike = (other for other in set(others) if len(words & other) >= MIN_OVERLAP * len(words | other))
    return frozenset().union(*alike)
