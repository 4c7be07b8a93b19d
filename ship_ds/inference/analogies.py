"""Instructions that the known ones imply: where several differ in one word alone, the same with
another word of that kind.

From "remove every 3", "remove every 5" and "remove every 8" beside "put 3 at the end", "put 4 at
the end" and so on follows "remove every 4". Nothing is known here of what words mean, and what
follows need not make sense; it is tested on examples.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

MIN_WORDS = 3
MIN_OVERLAP = 0.5
MOST = 20_000


def analogies(instructions: Sequence[str]) -> list[str]:
    """Those that are not among `instructions`, each once.

    A slot that at least `MIN_WORDS` words fill takes those of every such slot with which it shares
    at least half of the words that fill the one or the other (Jaccard index). Words are parted by
    single spaces in what follows. At most the first `MOST`; time grows with the square of the
    number of different sets of words that fill slots.
    """
    befores, afters = _Interned(), _Interned()
    fillers: dict[tuple[int, int], set[str]] = defaultdict(set)
    seen_in: dict[tuple[int, int], tuple[list[str], int]] = {}
    for words in map(str.split, instructions):
        slots = zip(befores.of_all(words), reversed(afters.of_all(words[::-1])), strict=True)
        for i, slot in enumerate(slots):
            fillers[slot].add(words[i])
            seen_in.setdefault(slot, (words, i))
    open_slots = {
        slot: frozenset(words) for slot, words in fillers.items() if len(words) >= MIN_WORDS
    }
    distinct = set(open_slots.values())
    kinds: dict[frozenset[str], list[str]] = {}
    known = {" ".join(text.split()) for text in instructions}
    found: dict[str, None] = {}
    for slot, filled_by in open_slots.items():
        if filled_by not in kinds:
            kinds[filled_by] = sorted(_kind(filled_by, distinct))
        found |= dict.fromkeys(
            text
            for word in kinds[filled_by]
            if (text := _filled(*seen_in[slot], word)) not in known
        )
        if len(found) >= MOST:
            break
    return list(found)[:MOST]


class _Interned:
    """Numbers for the beginnings of texts: equal ones have the same, and none is kept as text."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, str], int] = {}

    def of_all(self, words: Sequence[str]) -> list[int]:
        """Of words[:0], words[:1] and so on, all but the whole."""
        numbers = [0] if words else []
        for word in words[:-1]:
            numbers.append(self._numbers.setdefault((numbers[-1], word), len(self._numbers) + 1))
        return numbers


def _filled(words: Sequence[str], i: int, word: str) -> str:
    return " ".join((*words[:i], word, *words[i + 1 :]))


def _kind(words: frozenset[str], others: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(
        *(other for other in others if len(words & other) >= MIN_OVERLAP * len(words | other))
    )
