"""Deduction beside its controls, and reconstruction: what the final report and the curve of a run
show.

Everything takes this rank's tasks and returns one row of right and wrong a task; nothing here
communicates.

Letters: T tasks, M examples, Z latent, C candidate rules.
"""

from collections.abc import Callable, Sequence

from ship_ds.data.task import SplitTask
from ship_ds.evaluation.metrics import exact_match
from ship_ds.inference.bank import Bank
from ship_ds.inference.scoring import fit_of_latents
from ship_ds.model.adapters import Adapter
from ship_ds.model.ship import ShipModel

Rows = list[list[bool]]
_CHUNK = 48
_SHORTLIST = 48
_SHOWN = 5


def _chunks(tasks: Sequence[SplitTask]) -> list[Sequence[SplitTask]]:
    return [tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK)]


def deduction(
    model: ShipModel,
    tasks: Sequence[SplitTask],
    wordings: Sequence[str],
    num_examples: int,
    max_new_tokens: int,
    any_unfinished: Callable[[bool], bool] = bool,
) -> Rows:
    """Answers under the adapter of each task's given wording, which the prompt itself states only
    if the model's config says.

    any_unfinished: see `greedy`; an all-reduce where the model's weights are sharded.
    """
    rows: Rows = []
    for start, chunk in zip(range(0, len(tasks), _CHUNK), _chunks(tasks), strict=True):
        said = wordings[start : start + len(chunk)]
        rows += _answer(
            model,
            model.adapt(model.encode(said)),
            chunk,
            num_examples,
            max_new_tokens,
            said,
            any_unfinished,
        )
    return rows


def bare_base(
    model: ShipModel, tasks: Sequence[SplitTask], num_examples: int, max_new_tokens: int
) -> Rows:
    return [
        row
        for chunk in _chunks(tasks)
        for row in _answer(model, None, chunk, num_examples, max_new_tokens, None)
    ]


def instruction_in_prompt(
    model: ShipModel, tasks: Sequence[SplitTask], num_examples: int, max_new_tokens: int
) -> Rows:
    """The upper reference: the bare base with the instruction in every query."""
    return [
        row
        for chunk in _chunks(tasks)
        for row in _answer(
            model, None, chunk, num_examples, max_new_tokens, [t.task.instruction for t in chunk]
        )
    ]


def _answer(
    model: ShipModel,
    adapter: Adapter | None,
    tasks: Sequence[SplitTask],
    num_examples: int,
    max_new_tokens: int,
    wordings: Sequence[str] | None,
    any_unfinished: Callable[[bool], bool] = bool,
) -> Rows:
    """Tasks with fewer than `num_examples` test examples repeat them in the batch and count them
    once."""
    asked = [[task.test[i % len(task.test)] for i in range(num_examples)] for task in tasks]
    said = None if wordings is None else [text for text in wordings for _ in range(num_examples)]
    answers = model.answer(
        adapter, [e.input for row in asked for e in row], max_new_tokens, said, any_unfinished
    )
    right = [
        exact_match(answer, e.answers)
        for answer, e in zip(answers, (e for row in asked for e in row), strict=True)
    ]
    return [
        right[t * num_examples : t * num_examples + min(num_examples, len(task.test))]
        for t, task in enumerate(tasks)
    ]


def shuffled_wordings(tasks: Sequence[SplitTask]) -> list[str]:
    """For each task another one's instruction: half the list away, so of another family where
    families are adjacent."""
    half = len(tasks) // 2
    return [tasks[(i + half) % len(tasks)].task.instruction for i in range(len(tasks))]


def nearest_seen(
    model: ShipModel, tasks: Sequence[SplitTask], seen: Sequence[SplitTask]
) -> list[str]:
    """For each task the seen instruction, not its own, whose adapter gives five of its examples the
    least loss.

    The first example alone makes the shortlist; the five decide among its 48 candidates.
    """
    bank = Bank.build(model, [task.task.instruction for task in seen])
    places = {task.id: bank.instructions.index(task.task.instruction) for task in seen}
    shown = [task.train[:_SHOWN] for task in tasks]
    shortlists = bank.shortlist(
        model, shown, _SHORTLIST, [places.get(task.id, -1) for task in tasks]
    )
    chosen = []
    for examples, shortlist in zip(shown, shortlists, strict=True):
        texts = [bank.instructions[c] for c in shortlist]
        losses_C = fit_of_latents(
            model, bank.latent_CZ[shortlist], texts, [examples] * len(texts)
        ).loss_CM.sum(1)
        chosen.append(texts[int(losses_C.argmin())])
    return chosen


def reconstruction(
    model: ShipModel,
    tasks: Sequence[SplitTask],
    max_new_tokens: int,
    on_text: Callable[[str, str], None] | None = None,
    any_unfinished: Callable[[bool], bool] = bool,
) -> Rows:
    """Instruction -> z (the mean) -> text; right when the text is the very instruction, without
    examples."""
    rows: Rows = []
    for chunk in _chunks(tasks):
        truths = [task.task.instruction for task in chunk]
        texts = model.decode(model.encode(truths), max_new_tokens, any_unfinished)
        for truth, text in zip(truths, texts, strict=True):
            rows.append([text.split() == truth.split()])
            if on_text is not None:
                on_text(truth, text)
    return rows
