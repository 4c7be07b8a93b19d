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
MAX_ANALOGIES = 20_000


def analogies(instructions: Sequence[str]) -> list[str]:
    """Instructions that follow from the given ones and are not among them, each once.

    A slot that at least `MIN_WORDS` words fill takes those of every such slot with which it shares
    at least half of the words that fill the one or the other (Jaccard index). Time grows with the
    square of the number of different sets of words that fill slots.

    Args:
        instructions: the known ones; blanks and line ends between words make no difference.

    Returns:
        At most the first `MAX_ANALOGIES`, with single spaces between words.
    """
    fillers: dict[_Slot, set[str]] = defaultdict(set)
    first_use: dict[_Slot, tuple[list[str], int]] = {}
    for words, slots in _slots(instructions):
        for i, slot in enumerate(slots):
            fillers[slot].add(words[i])
            first_use.setdefault(slot, (words, i))
    open_slots = {
        slot: frozenset(words) for slot, words in fillers.items() if len(words) >= MIN_WORDS
    }
    distinct = set(open_slots.values())
    words_of_kind: dict[frozenset[str], list[str]] = {}
    known = {" ".join(text.split()) for text in instructions}
    new: dict[str, None] = {}
    for slot, filled_by in open_slots.items():
        if filled_by not in words_of_kind:
            # Sorted: the order of a set of texts differs from one process to the next.
            words_of_kind[filled_by] = sorted(_kind(filled_by, distinct))
        new |= dict.fromkeys(
            text
            for word in words_of_kind[filled_by]
            if (text := _filled(*first_use[slot], word)) not in known
        )
        if len(new) >= MAX_ANALOGIES:
            break
    return list(new)[:MAX_ANALOGIES]


def share_in_slots(instructions: Sequence[str]) -> float:
    """The share of instructions that differ from at least two others in one word alone.

    Where it is large the texts are made by a grammar, and what changes or joins them is often an
    instruction too. Of the quickstart's rules 0.79 do, of 773 definitions of
    Super-NaturalInstructions 0.03, of 225 descriptions of BIG-bench's list functions 0.06.
    """
    fillers: dict[_Slot, set[str]] = defaultdict(set)
    texts = _slots(dict.fromkeys(instructions))
    for words, slots in texts:
        for word, slot in zip(words, slots, strict=True):
            fillers[slot].add(word)
    inside = [any(len(fillers[slot]) >= MIN_WORDS for slot in slots) for _, slots in texts]
    return sum(inside) / max(1, len(inside))


_Slot = tuple[int, int]
"""What stands before a word and after it, whatever the word is."""


def _slots(instructions: Iterable[str]) -> list[tuple[list[str], list[_Slot]]]:
    """The words of each instruction, and the slot of each word."""
    befores, afters = _Interned(), _Interned()
    return [
        (
            words,
            list(zip(befores.of_all(words), reversed(afters.of_all(words[::-1])), strict=True)),
        )
        for words in map(str.split, instructions)
    ]


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
    """The words of every slot that is filled much as this one, its own among them."""
    return frozenset().union(
        *(other for other in others if len(words & other) >= MIN_OVERLAP * len(words | other))
    )
