"""Answering under many instructions at once: a batch in which every task has its own adapter.

Letters: T tasks, M inputs of each, Z latent.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from ship_ds.model.adapters import Adapter
from ship_ds.model.ship import ShipModel

_ROWS = 256
"""Inputs a batch."""
Answers = list[str | None]


def answer_latents(
    model: ShipModel,
    latent_TZ: Tensor,
    wordings: Sequence[str],
    inputs: Sequence[Sequence[str]],
    max_new_tokens: int,
    num_beams: int = 1,
) -> list[Answers]:
    """Each task's inputs under its own latent's adapter. `wordings` matter to a Task LLM that reads
    them too."""

    def answer(tasks: Sequence[int]) -> Answers:
        texts = [text for t in tasks for text in inputs[t]]
        said = [wordings[t] for t in tasks for _ in inputs[t]]
        return _answer(
            model, model.adapt(latent_TZ[list(tasks)]), texts, said, max_new_tokens, num_beams
        )

    return _by_size(inputs, answer)


def answer_stated(
    model: ShipModel,
    wordings: Sequence[str],
    inputs: Sequence[Sequence[str]],
    max_new_tokens: int,
    num_beams: int = 1,
) -> list[Answers]:
    """The bare Task LLM with each task's instruction in the prompt."""

    def answer(tasks: Sequence[int]) -> Answers:
        texts = [text for t in tasks for text in inputs[t]]
        return _answer(
            model,
            None,
            texts,
            [wordings[t] for t in tasks for _ in inputs[t]],
            max_new_tokens,
            num_beams,
        )

    return _by_size(inputs, answer)


def _answer(
    model: ShipModel,
    adapter: Adapter | None,
    texts: Sequence[str],
    said: Sequence[str],
    max_new_tokens: int,
    num_beams: int,
) -> Answers:
    if num_beams == 1:
        return model.answer(adapter, texts, max_new_tokens, said)
    return model.answer_by_beams(adapter, texts, max_new_tokens, num_beams, said)


def _by_size(
    inputs: Sequence[Sequence[str]], answer: Callable[[Sequence[int]], Answers]
) -> list[Answers]:
    """Tasks with equally many inputs share batches: an adapter's products want equal parts where
    prompts are padded."""
    found: list[Answers] = [[] for _ in inputs]
    for size in sorted({len(own) for own in inputs} - {0}):
        tasks = [t for t, own in enumerate(inputs) if len(own) == size]
        step = max(1, _ROWS // size)
        for start in range(0, len(tasks), step):
            chunk = tasks[start : start + step]
            answers = answer(chunk)
            for i, t in enumerate(chunk):
                found[t] = answers[i * size : (i + 1) * size]
    return found
