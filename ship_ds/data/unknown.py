"""Letters that a tokenizer has no token for: T5's vocabulary knows neither braces nor line breaks,
and what it is not told of it cannot learn.

Tokenizers of bytes know every text, and are not asked for one.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ship_ds.data.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "\u2603\U0001f9ff{\u0d9e}\n\u4e2d"
"""Few vocabularies of words and their pieces have all of these."""
_CHUNK = 4096
_NUM_SHOWN = 5


def unknown_texts(tasks: Sequence[Task], tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """How many distinct texts of each field hold letters that the tokenizer reads as its unknown
    token, by a line that shows the most frequent of these letters; empty where none does."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in _ids([_PROBE], tokenizer)["input_ids"][0]:
        return {}
    fields: dict[str, Iterable[str]] = {
        "instruction": (w for task in tasks for w in (task.instruction, *task.paraphrases)),
        "input": (example.input for task in tasks for example in task.examples),
        "target": (a for task in tasks for example in task.examples for a in example.answers),
    }
    counts: dict[str, int] = {}
    for field, texts in fields.items():
        letters, num_texts = _unknown(list(dict.fromkeys(texts)), tokenizer, unknown)
        if num_texts:
            order = sorted(letters, key=lambda letter: (-letters[letter], letter))
            most = ", ".join(map(repr, order[:_NUM_SHOWN]))
            counts[f"{field} with {most}"] = num_texts
    return counts


def _unknown(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", unknown: int
) -> tuple[Counter[str], int]:
    """What is unknown in them by how many texts have it, and how many have any."""
    letters: Counter[str] = Counter()
    num_texts = 0
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        encoded = _ids(chunk, tokenizer)
        for text, ids, spans in zip(
            chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            # A unigram model makes one token of all unknown letters in a row.
            text_letters = {
                letter
                for token, (first, last) in zip(ids, spans, strict=True)
                if token == unknown
                for letter in text[first:last].strip(" ")
            }
            letters.update(text_letters)
            num_texts += bool(text_letters)
    return letters, num_texts


def _ids(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> Any:
    return tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
