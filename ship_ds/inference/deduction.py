"""Answering for many tasks at once: under an adapter each, with the instruction in the prompt, or
by the bare base.

    answer_latents(model, latent_TZ, ["add 3", "reverse"], [["1 2"], ["3 4", "5"]], 20)
    -> [["4 5"], ["4 3", "5"]]

Everybody who wants answers in batches comes here.

Letters: T tasks, Z latent size.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.ship import ShipModel

_ROWS = 256
"""Inputs a batch."""
AnswersByTask = list[list[str | None]]
"""One row a task, one answer an input; None where no end of sequence came in time."""


def answer_latents(
    model: ShipModel,
    latent_TZ: Tensor,
    wordings: Sequence[str],
    inputs: Sequence[Sequence[str]],
    max_new_tokens: int,
    num_beams: int = 1,
    any_unfinished: Callable[[bool], bool] = bool,
) -> AnswersByTask:
    """Each task's inputs answered under the adapter of its own latent.

    Args:
        wordings: an instruction a task; they matter to a Task LLM that reads them too.
        inputs: one row a task, of any length.
        any_unfinished: `ranks.any_over_ranks` where the weights are sharded over the ranks: all of
            them then have to ask for the same tasks, and stay in step (see `continue_rows`).
    """

    def answer(tasks: Sequence[int]) -> list[str | None]:
        texts = [text for t in tasks for text in inputs[t]]
        instructions = [wordings[t] for t in tasks for _ in inputs[t]]
        adapter = model.adapt(latent_TZ[list(tasks)])
        return _answer(
            model, adapter, texts, instructions, max_new_tokens, num_beams, any_unfinished
        )

    return answer_by_size(inputs, answer)


def answer_stated(
    model: ShipModel,
    wordings: Sequence[str],
    inputs: Sequence[Sequence[str]],
    max_new_tokens: int,
    num_beams: int = 1,
) -> AnswersByTask:
    """The bare Task LLM's answers with each task's instruction in the prompt."""

    def answer(tasks: Sequence[int]) -> list[str | None]:
        texts = [text for t in tasks for text in inputs[t]]
        instructions = [wordings[t] for t in tasks for _ in inputs[t]]
        return _answer(model, None, texts, instructions, max_new_tokens, num_beams)

    return answer_by_size(inputs, answer)


def answer_bare(
    model: ShipModel, inputs: Sequence[Sequence[str]], max_new_tokens: int
) -> AnswersByTask:
    """The bare Task LLM's answers, with neither adapter nor instruction."""

    def answer(tasks: Sequence[int]) -> list[str | None]:
        return _answer(
            model, None, [text for t in tasks for text in inputs[t]], None, max_new_tokens
        )

    return answer_by_size(inputs, answer)


def _answer(
    model: ShipModel,
    adapter: Adapter | None,
    texts: Sequence[str],
    instructions: Sequence[str] | None,
    max_new_tokens: int,
    num_beams: int = 1,
    any_unfinished: Callable[[bool], bool] = bool,
) -> list[str | None]:
    if num_beams == 1:
        return model.answer(adapter, texts, max_new_tokens, instructions, any_unfinished)
    return model.answer_by_beams(adapter, texts, max_new_tokens, num_beams, instructions)


def answer_by_size(
    inputs: Sequence[Sequence[Any]], answer: Callable[[Sequence[int]], list[str | None]]
) -> AnswersByTask:
    """Each task's answers, from batches of at most 256 inputs.

    Tasks with equally many inputs share batches: an adapter's products want equal parts where
    prompts are padded.

    Args:
        inputs: one row a task, of any length: texts, or prompts as token ids.
        answer: the answers to all inputs of these tasks, task after task.
    """
    rows: AnswersByTask = [[] for _ in inputs]
    for size in sorted({len(row) for row in inputs} - {0}):
        tasks = [t for t, row in enumerate(inputs) if len(row) == size]
        step = max(1, _ROWS // size)
        for start in range(0, len(tasks), step):
            chunk = tasks[start : start + step]
            answers = answer(chunk)
            for i, t in enumerate(chunk):
                rows[t] = answers[i * size : (i + 1) * size]
    return rows
