"""Answers for many tasks with as many inputs each as they have, in batches that a machine can hold.

Letters: T tasks, Z latent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ship_ds.evaluation.method import Answers
from ship_ds.model.ship import ShipModel

_ROWS = 480
_TEXTS = 256


def encode_all(model: ShipModel, texts: Sequence[str]) -> Tensor:
    """Posterior means (T, Z) of any number of texts."""
    return torch.cat([model.encode(texts[start : start + _TEXTS]) for start in range(0, len(texts), _TEXTS)])


def answer_tasks(
    model: ShipModel, latent_TZ: Tensor | None, inputs: Sequence[Sequence[str]], max_new_tokens: int,
    wordings: Sequence[str] | None = None,
) -> Answers:
    """Greedy answers, one row a task, under the adapters of `latent_TZ` or, for None, by the bare base.

    wordings: one a task, for `ShipModel.answer`. Adapters take equally many rows each: a task with fewer inputs than its
    batch's longest repeats them.
    """
    answers: Answers = []
    for start, stop in _batches([len(row) for row in inputs]):
        width = max(len(row) for row in inputs[start:stop])
        asked = [row[i % len(row)] for row in inputs[start:stop] for i in range(width)]
        said = None if wordings is None else [text for text in wordings[start:stop] for _ in range(width)]
        adapter = None if latent_TZ is None else model.adapt(latent_TZ[start:stop])
        flat = model.answer(adapter, asked, max_new_tokens, said)
        answers += [flat[t * width : t * width + len(row)] for t, row in enumerate(inputs[start:stop])]
    return answers


def _batches(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Spans of tasks whose rows, padded to the longest, are at most `_ROWS`; one task alone may have more."""
    spans, start = [], 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or max(lengths[start : stop + 1]) * (stop + 1 - start) > _ROWS:
            spans.append((start, stop))
            start = stop
    return spans
