"""Descents of many tasks at once, and the texts that the decoder reads out of what they find.

Letters: C candidates, H hidden size, M examples of a task, S padded length, T tasks, Z latent size.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ship_ds.data.task import Reading
from ship_ds.inference.config import DESCENTS, InductionConfig
from ship_ds.inference.gradient import (
    NEUTRAL_INSTRUCTION,
    Descent,
    Schedule,
    descend_on_instructions,
    descend_on_latent,
    neutral_embeddings,
)
from ship_ds.inference.proposals import (
    likeliest_texts,
    sample_texts,
    views,
)
from ship_ds.inference.results import Candidate
from ship_ds.inference.scoring import Examples, fit_of_latents
from ship_ds.inference.search_state import DescentResult, Proposal, SearchState
from ship_ds.model import budget
from ship_ds.model.drawing import draw_seed
from ship_ds.model.ship import ShipModel

_SHARE_FROM_TEXT = 4
"""A descent from an induced text takes one step where one from scratch takes four."""


class _Start(NamedTuple):
    """Start number `number` of a task."""

    search: SearchState
    number: int


class _Refinement(NamedTuple):
    """A candidate whose latent is refined, the `number`-th best of its task."""

    search: SearchState
    number: int
    candidate: Candidate


_Item = TypeVar("_Item", _Start, _Refinement)


def descend_from_scratch(
    model: ShipModel, searches: Sequence[SearchState], config: InductionConfig, seed: int
) -> list[DescentResult]:
    """`direct` from the prior's mean and from draws of it; `indirect` from the neutral instruction,
    bare and disturbed.

    Args:
        model: with its trained weights.
        searches: one a task.
        config: the method, how many starts, and the steps of each.
        seed: of the draws.

    Returns:
        A result for each start of each task.
    """
    starts = [_Start(search, i) for search in searches for i in range(config.num_restarts)]
    descend = _descend_directly if config.method == "direct" else _descend_indirectly
    results = []
    for chunk in _chunks(model, starts):
        descent = descend(model, chunk, config, seed)
        results += measured(model, chunk, descent.latent_CZ, [""] * len(chunk))
    return results


def _descend_directly(
    model: ShipModel, starts: Sequence[_Start], config: InductionConfig, seed: int
) -> Descent:
    start_CZ = torch.stack(
        [_start_on_latent(model, start, seed, config.starts_from_draw) for start in starts]
    )
    if not config.starts_from_draw:
        firsts = [i for i, start in enumerate(starts) if start.number == 0]
        searches = [starts[i].search for i in firsts]
        latent_TZ = read_examples(model, searches, config.num_read and 1, seed)
        if len(latent_TZ):
            start_CZ[firsts] = latent_TZ.to(start_CZ)
    examples, wordings = [start.search.examples for start in starts], [""] * len(starts)
    return descend_on_latent(model, start_CZ, wordings, examples, _schedule(config))


def _schedule(config: InductionConfig, share_of_steps: int = 1) -> Schedule:
    """Of a method's descent, or of one with a part of the steps."""
    return Schedule(
        max(1, config.steps // share_of_steps),
        config.direct_lr if config.method == "direct" else config.indirect_lr,
        config.prior,
        config.min_steps // share_of_steps,
        config.patience,
    )


def _start_on_latent(model: ShipModel, start: _Start, seed: int, from_draw: bool = False) -> Tensor:
    """The prior's mean first, then points half way from it to a draw of the prior: nearer to where
    instructions lie than the draw itself. from_draw: the draw itself, as published."""
    mean_Z = model.prior.mean(1)[0]
    if start.number == 0 and not from_draw:
        return mean_Z
    draw_Z = model.prior.sample(1, _generator(start, seed))[0]
    if from_draw:
        return draw_Z
    return mean_Z + 0.5 * (draw_Z - mean_Z)


def _descend_indirectly(
    model: ShipModel, starts: Sequence[_Start], config: InductionConfig, seed: int
) -> Descent:
    neutral_SH = neutral_embeddings(model).cpu()
    spread = 0.5 * float(neutral_SH.std())
    offsets = [
        spread * torch.randn(neutral_SH.shape, generator=_generator(start, seed))
        if start.number
        else None
        for start in starts
    ]
    texts, examples = [NEUTRAL_INSTRUCTION] * len(starts), [s.search.examples for s in starts]
    return descend_on_instructions(model, texts, examples, _schedule(config), offsets)


def _generator(start: _Start, seed: int) -> torch.Generator:
    key = draw_seed(seed, start.search.key, "restart", start.number)
    return torch.Generator().manual_seed(key)


def descend_from_best(
    model: ShipModel, searches: Sequence[SearchState], config: InductionConfig
) -> list[DescentResult]:
    """A few steps from the latents of each task's best candidates, on all examples; these latents
    themselves where `refine_steps` is zero.

    Args:
        model: with its trained weights.
        searches: one a task, with tested candidates.
        config: how many of each task's best, and the steps from each.

    Returns:
        A result for each of these candidates of each task.
    """
    refinements = [
        _Refinement(search, number, candidate)
        for search in searches
        for number, candidate in enumerate(search.best[: config.num_refined])
    ]
    if not config.refine_steps:
        return [
            DescentResult(
                one.search,
                one.number,
                torch.tensor(one.candidate.latent),
                one.candidate.num_right,
                one.candidate.loss,
            )
            for one in refinements
        ]
    results = []
    for chunk in _chunks(model, refinements):
        wordings = [refined.candidate.instruction for refined in chunk]
        descent = descend_on_latent(
            model,
            torch.tensor([refined.candidate.latent for refined in chunk]),
            wordings,
            [refined.search.examples for refined in chunk],
            Schedule(config.refine_steps, config.refine_lr, config.prior),
            hold_back=False,
        )
        results += measured(model, chunk, descent.latent_CZ, wordings)
    return results


def descend_from_texts(
    model: ShipModel, searches: Sequence[SearchState], config: InductionConfig
) -> list[DescentResult]:
    """As `descend_from_scratch`, once more from each task's best text, by a quarter of the steps:
    from its latent, or from its embeddings. Our own: the authors' code has a descent from the
    induced text (`iterative_inference`), one epoch ten times, which nothing calls.

    Args:
        model: with its trained weights.
        searches: one a task, with tested candidates.
        config: the method, and the steps of which a quarter is taken.

    Returns:
        A result for each task.
    """
    refinements = [_Refinement(search, 0, search.best[0]) for search in searches]
    schedule, results = _schedule(config, _SHARE_FROM_TEXT), []
    for chunk in _chunks(model, refinements):
        texts = [refined.candidate.instruction for refined in chunk]
        wordings, examples = [""] * len(chunk), [refined.search.examples for refined in chunk]
        if config.method == "direct":
            start_CZ = torch.tensor([refined.candidate.latent for refined in chunk])
            descent = descend_on_latent(model, start_CZ, wordings, examples, schedule)
        else:
            descent = descend_on_instructions(model, texts, examples, schedule)
        results += measured(model, chunk, descent.latent_CZ, wordings)
    return results


def latents_of(
    model: ShipModel, search: SearchState, latent_CZ: Tensor, wording: str
) -> list[DescentResult]:
    """Latents that were found elsewhere, as descents of this task.

    Args:
        model: explains the examples.
        search: of the task; it keeps the results.
        latent_CZ: the latents.
        wording: for a Task LLM that reads an instruction too.
    """
    starts = [_Start(search, i) for i in range(len(latent_CZ))]
    return measured(model, starts, latent_CZ, [wording] * len(starts))


def measured(
    model: ShipModel,
    starts: Sequence[_Start | _Refinement],
    latent_CZ: Tensor,
    wordings: Sequence[str],
) -> list[DescentResult]:
    """How each latent explains all of its task's examples; also kept with the task.

    Args:
        model: explains the examples.
        starts: where each descent came from, with its task.
        latent_CZ: where each ended.
        wordings: one each, for a Task LLM that reads an instruction too.
    """
    examples = [start.search.examples for start in starts]
    # Descents make adapters of z alone, whatever text they began at.
    fit = fit_of_latents(model, latent_CZ, wordings, examples, [""] * len(starts))
    results = [
        DescentResult(
            start.search, start.number, latent_Z, int(right_M.sum()), float(loss_M.mean())
        )
        for start, latent_Z, right_M, loss_M in zip(
            starts, latent_CZ, fit.right_CM, fit.loss_CM, strict=True
        )
    ]
    for result in results:
        result.search.descents.append(result)
    return results


def decode_descents(
    model: ShipModel,
    results: Sequence[DescentResult],
    config: InductionConfig,
    seed: int,
    round_number: int,
) -> list[Proposal]:
    """Texts that the decoder reads out of each latent, beside examples where it was trained to.

    `direct` and `indirect` decode the latent alone unless `num_shown` says otherwise; section 3.3
    of arXiv 2502.02315 shows the decoder an example.

    Args:
        model: whose decoder writes.
        results: of descents, a latent each.
        config: how many beams and samples, and whether examples are shown.
        seed: of the draws.
        round_number: tells draws of this round from those of others.
    """
    latent_CZ = torch.stack([result.latent_Z for result in results])
    shown: list[Examples] = [()] * len(results)
    most = model.config.decoder.max_examples
    if config.method in DESCENTS:
        most = min(most, config.num_shown)
    if most:
        shown = [
            _views(result.search, most, 1, seed, (round_number, result.start))[0]
            for result in results
        ]
    beams = likeliest_texts(model, shown, latent_CZ, config.num_beams, config.max_new_tokens)
    seeds = [draw_seed(seed, r.search.key, "refined", round_number, r.start) for r in results]
    samples = sample_texts(
        model,
        shown,
        latent_CZ,
        config.num_samples,
        config.temperature,
        seeds,
        config.max_new_tokens,
    )
    return [
        Proposal(result.search, text, "refined")
        for result, texts, more in zip(results, beams, samples, strict=True)
        for text in (*texts, *more)
    ]


def read_examples(
    model: ShipModel, searches: Sequence[SearchState], count: int, seed: int
) -> Tensor:
    """What the encoder makes of `count` choices of each task's examples, without an instruction.

    Args:
        model: whose encoder reads.
        searches: one a task.
        count: choices of examples a task.
        seed: of the choices.

    Returns:
        Latents, (tasks x count, latent size); none of a run whose encoder was not trained to.
    """
    encoder = model.config.encoder
    if not count or not searches or not encoder.reads_examples_alone:
        return torch.empty(0, model.config.latent_size)
    chosen = [
        view
        for search in searches
        for view in _views(search, encoder.max_examples, count, seed, "read")
    ]
    return model.encode([Reading(None, tuple(view)) for view in chosen])


def task_views(
    model: ShipModel, search: SearchState, count: int, seed: int, occasion: object
) -> list[Examples]:
    """Views of a task's examples for the decoder.

    Args:
        model: says how many examples its decoder takes.
        search: of the task.
        count: views.
        seed: of the run.
        occasion: tells one draw from another.
    """
    return _views(search, model.config.decoder.max_examples, count, seed, occasion)


def _views(
    search: SearchState, size: int, count: int, seed: int, occasion: object
) -> list[Examples]:
    key = draw_seed(seed, search.key, "views", occasion)
    return list(views(search.examples, size, count, key))


def _chunks(model: ShipModel, starts: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    """Descents that share a forward, with what that keeps for the backward pass, in order."""
    at_once = max(1, budget.bytes_free(model.device) // max(map(partial(_bytes, model), starts)))
    return (starts[i : i + at_once] for i in range(0, len(starts), at_once))


def _bytes(model: ShipModel, start: _Start | _Refinement) -> int:
    """What one descent needs: its examples' states, its adapter and the adapter's gradient."""
    wording = start.candidate.instruction if isinstance(start, _Refinement) else ""
    costs, total = model.task_llm.language_model.costs, 2 * model.adapter_bytes
    for example in start.search.examples:
        num_labels = len(model.prompts.target(example.target))
        width = len(model.question(example.input, wording)) + num_labels
        total += costs.trained_row(model.num_virtual_tokens + width, num_labels)
    return total
