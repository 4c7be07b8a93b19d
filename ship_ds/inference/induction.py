"""Induction: examples -> instruction, for many tasks at once.

Methods: `direct` and `indirect` descend to a latent and decode it (arXiv 2502.02315, section 3.3);
`bank` looks among the known instructions; `propose` lets the decoder read the examples and tests
what it writes; `union`, the default, does the last two together, and looks among what follows from
the known instructions by analogy. Every candidate is tested on the given examples in both ways it
will be used: through the encoder, as an adapter, and as text in the prompt. Where no candidate
explains everything, the best are refined: their latents by gradient, their texts by single tokens
and by splicing one to another; what comes out is tested likewise.

Letters: T tasks, C candidates, M examples, Z latent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ship_ds.errors import UserError
from ship_ds.inference.bank import THOROUGH, Bank, encode_all
from ship_ds.inference.config import InductionConfig as InductionConfig
from ship_ds.inference.gradient import (
    NEUTRAL_INSTRUCTION,
    descend_on_instruction,
    descend_on_latent,
    neutral_embeddings,
)
from ship_ds.inference.proposals import beams, edits, key_of, sampled, splices, views
from ship_ds.inference.scoring import Examples, Fit, fit_in_prompt, fit_of_latents
from ship_ds.model.ship import ShipModel


@dataclass(frozen=True)
class Candidate:
    """An instruction and how it explains the given examples: how many greedy decoding answers
    exactly, and the mean loss in nats, each through the encoder (its adapter) and as text in the
    prompt. `latent` is its posterior mean."""

    instruction: str
    num_right: int
    loss: float
    num_right_in_prompt: int
    loss_in_prompt: float
    latent: tuple[float, ...]
    origin: str


@dataclass(frozen=True)
class Induction:
    """candidates: best first. latent: the point whose adapter explains the examples best, found or
    encoded."""

    instruction: str
    candidates: tuple[Candidate, ...]
    latent: tuple[float, ...]
    num_right: int
    num_examples: int

    @property
    def that_fit(self) -> tuple[Candidate, ...]:
        """The distinct candidates that answer every example, through the encoder or in the prompt:
        more than one means that the examples do not tell them apart."""
        return tuple(
            c
            for c in self.candidates
            if max(c.num_right, c.num_right_in_prompt) == self.num_examples
        )


@dataclass
class _Task:
    """What is known of a task so far: each tested text, and the latents found without a text."""

    examples: Examples
    tested: dict[str, Candidate]
    found: list[tuple[int, float, Tensor]]
    """(examples right, loss, latent), one of each descent."""
    screened: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of every text that was tried, also of those that were not tested on all examples: how it did
    on the first few, as (- examples right, loss in nats), both ways of using it together."""

    @property
    def key(self) -> str:
        """What the task's draws are keyed by: the same in any company, so on any number of
        ranks."""
        return repr(self.examples)

    def best(self) -> list[Candidate]:
        return sorted(self.tested.values(), key=_order)

    def parents(self, count: int) -> list[str]:
        """The best on the first few examples; rounded, since losses in other company differ in
        their last bits."""
        return sorted(
            self.screened,
            key=lambda text: (self.screened[text][0], round(self.screened[text][1], 2), text),
        )[:count]

    @property
    def is_explained(self) -> bool:
        """One way of using a text is enough: going on until both work picks texts that suit an
        adapter's mistakes."""
        return any(
            max(c.num_right, c.num_right_in_prompt) == len(self.examples)
            for c in self.tested.values()
        )


def _order(candidate: Candidate) -> tuple[int, float]:
    """Exactly right first, both ways together; then the loss."""
    return -(
        candidate.num_right + candidate.num_right_in_prompt
    ), candidate.loss + candidate.loss_in_prompt


def widened(
    model: ShipModel,
    induction: Induction,
    examples: Examples,
    latent_CZ: Tensor,
    config: InductionConfig,
    seed: int,
) -> Induction:
    """The same with what the decoder reads out of further latents, tested on the examples."""
    task = _Task(tuple(examples), {c.instruction: c for c in induction.candidates}, [])
    found: Found = [[]]
    _note(
        model,
        [task],
        [0] * len(latent_CZ),
        latent_CZ,
        [induction.instruction] * len(latent_CZ),
        found,
    )
    _test(
        model,
        [task],
        _decode_found(model, [task], found, config, seed, config.num_rounds + 1),
        config,
    )
    return _result(model, task)


Texts = list[list[tuple[str, str]]]
"""For each task (instruction, origin)."""
Say = Callable[[str], None]


def silent(text: str) -> None:
    """Progress that nobody wants to see."""


def induce_many(
    model: ShipModel,
    bank: Bank,
    tasks: Sequence[Examples],
    config: InductionConfig,
    seed: int = 0,
    say: Say = silent,
) -> list[Induction]:
    """One induction a task; every draw is keyed by (seed, the task's examples). Raises UserError
    for a task without examples."""
    if any(not examples for examples in tasks):
        raise UserError(
            "induce: a task has no examples; give at least one line with input and target"
        )
    running = [_Task(tuple(examples), {}, []) for examples in tasks]
    for group in _groups(running):
        _induce(model, bank, group, config, seed, say)
    return [_result(model, task) for task in running]


def _groups(tasks: Sequence[_Task]) -> list[list[_Task]]:
    """Tasks with equally many examples go through the models together."""
    sizes = sorted({len(task.examples) for task in tasks})
    return [[task for task in tasks if len(task.examples) == size] for size in sizes]


def _induce(
    model: ShipModel, bank: Bank, tasks: list[_Task], config: InductionConfig, seed: int, say: Say
) -> None:
    if config.method in ("direct", "indirect"):
        _test(
            model,
            tasks,
            _decode_found(model, tasks, _descended(model, tasks, config, seed), config, seed, 0),
            config,
        )
        _fall_back(model, tasks, config)
        return
    texts: Texts = [[] for _ in tasks]
    if config.method in ("bank", "union"):
        _extend(texts, _known(model, bank, tasks, config, say))
    if config.method in ("propose", "union"):
        say(f"{len(tasks)} tasks: the decoder proposes")
        _extend(texts, _proposed(model, tasks, config, seed))
    say(f"{len(tasks)} tasks: testing {sum(len(dict(own)) for own in texts)} candidates")
    _test(model, tasks, texts, config)
    _fall_back(model, tasks, config)
    for turn in range(1, config.num_rounds + 1 if config.method != "bank" else 0):
        open_tasks = [task for task in tasks if not task.is_explained]
        if open_tasks:
            say(f"{len(open_tasks)} tasks not explained: refining, round {turn}")
            _refine(model, open_tasks, config, seed, turn)


def _fall_back(model: ShipModel, tasks: Sequence[_Task], config: InductionConfig) -> None:
    """A decoder that has hardly been trained may propose no text at all; an induction still has to
    answer."""
    _test(
        model,
        tasks,
        [[] if task.tested else [(NEUTRAL_INSTRUCTION, "neutral")] for task in tasks],
        config,
    )


def _known(
    model: ShipModel, bank: Bank, tasks: Sequence[_Task], config: InductionConfig, say: Say
) -> Texts:
    if not len(bank):
        raise UserError(
            "induce: the bundle knows no instructions of its training; use method "
            "propose, direct or indirect"
        )
    goes_further = config.analogies and config.method == "union"
    wider = bank.with_analogies(model) if goes_further else bank
    more = f" and {len(wider) - len(bank)} that follow by analogy" if goes_further else ""
    say(f"{len(tasks)} tasks: looking among {len(bank)} known instructions{more}")
    examples = [task.examples for task in tasks]
    if config.tries_all_known:
        chosen = wider.shortlist_of_all(model, examples, config.num_known)
    else:
        chosen = wider.shortlist(model, examples, config.num_known, walk=THOROUGH)
    return [
        [(wider.instructions[c], "known" if c < len(bank) else "analogy") for c in own]
        for own in chosen
    ]


def _proposed(
    model: ShipModel, tasks: Sequence[_Task], config: InductionConfig, seed: int
) -> Texts:
    """From the examples alone; a decoder that reads none proposes nothing."""
    if not model.config.decoder.max_examples:
        return [[] for _ in tasks]
    shown = [_views(model, task, config.num_views, seed, 0) for task in tasks]
    flat = [view for own in shown for view in own]
    keys = [
        key_of(seed, task.key, "proposal", i) for task in tasks for i in range(config.num_views)
    ]
    found: Texts = [[] for _ in tasks]
    if config.num_samples:
        drawn = sampled(
            model, flat, None, config.num_samples, config.temperature, keys, config.max_new_tokens
        )
        _extend(found, _regroup(drawn, config.num_views, "sampled"))
    likeliest = beams(model, flat, None, config.num_beams, config.max_new_tokens)
    _extend(found, _regroup(likeliest, config.num_views, "beam"))
    return found


def _views(model: ShipModel, task: _Task, count: int, seed: int, turn: object) -> list[Examples]:
    return list(
        views(
            task.examples,
            model.config.decoder.max_examples,
            count,
            key_of(seed, task.key, "views", turn),
        )
    )


def _refine(
    model: ShipModel, tasks: Sequence[_Task], config: InductionConfig, seed: int, turn: int
) -> None:
    """Edit and splice the best texts; descend from the best latents and let the decoder read what
    it finds; test all."""
    texts: Texts = [[] for _ in tasks]
    best = [task.best() for task in tasks]
    edited = [(t, c) for t, own in enumerate(best) for c in own[: config.num_edited]]
    shown = [_views(model, tasks[t], 1, seed, turn)[0] for t, _ in edited]
    latent_CZ = torch.tensor([c.latent for _, c in edited])
    changed = edits(model, shown, [c.instruction for _, c in edited], config.num_edits, latent_CZ)
    for (t, _), own in zip(edited, changed, strict=True):
        texts[t] += [(text, "edit") for text in own]
    for task, wanted in zip(tasks, texts, strict=True):
        known = {*task.screened, *(text for text, _ in wanted)}
        spliced = splices(
            model,
            task.parents(config.num_parents),
            config.num_splices,
            config.max_new_tokens,
            known,
        )
        wanted += [(text, "splice") for text in spliced]
    if config.refine_steps:
        starts = [(t, c) for t, own in enumerate(best) for c in own[: config.num_refined]]
        found = _descend_from(model, tasks, starts, config)
        _extend(texts, _decode_found(model, tasks, found, config, seed, turn))
    _test(model, tasks, texts, config)


Found = list[list[Tensor]]
"""For each task the latents (Z,) that descents found."""


def _descend_from(
    model: ShipModel,
    tasks: Sequence[_Task],
    starts: Sequence[tuple[int, Candidate]],
    config: InductionConfig,
) -> Found:
    found: Found = [[] for _ in tasks]
    for start in range(0, len(starts), 48):
        chunk = starts[start : start + 48]
        examples, said = [tasks[t].examples for t, _ in chunk], [c.instruction for _, c in chunk]
        descent = descend_on_latent(
            model,
            torch.tensor([c.latent for _, c in chunk]),
            said,
            examples,
            config.refine_steps,
            config.refine_lr,
            config.prior,
            hold_back=False,
        )
        _note(model, tasks, [t for t, _ in chunk], descent.latent_CZ, said, found)
    return found


def _descended(
    model: ShipModel, tasks: Sequence[_Task], config: InductionConfig, seed: int
) -> Found:
    """`direct` from the prior's mean and from draws of it; `indirect` from the neutral instruction,
    bare and disturbed."""
    found: Found = [[] for _ in tasks]
    rows = [(t, restart) for t in range(len(tasks)) for restart in range(config.num_restarts)]
    for start in range(0, len(rows), 48):
        chunk = rows[start : start + 48]
        examples, said = [tasks[t].examples for t, _ in chunk], [""] * len(chunk)
        if config.method == "direct":
            points = torch.stack(
                [
                    _noise((model.config.latent_size,), seed, tasks[t], restart)
                    for t, restart in chunk
                ]
            )
            descent = descend_on_latent(
                model, points, said, examples, config.steps, config.direct_lr, config.prior
            )
        else:
            neutral_NH = neutral_embeddings(model).cpu()
            spread, shape = float(neutral_NH.std()), tuple(neutral_NH.shape)
            points_NH = [
                neutral_NH + spread * _noise(shape, seed, tasks[t], restart) for t, restart in chunk
            ]
            descent = descend_on_instruction(
                model, points_NH, said, examples, config.steps, config.indirect_lr, config.prior
            )
        _note(model, tasks, [t for t, _ in chunk], descent.latent_CZ, said, found)
    return found


def _noise(shape: tuple[int, ...], seed: int, task: _Task, restart: int) -> Tensor:
    """Zero for the first start, then half a standard deviation of keyed noise."""
    generator = torch.Generator().manual_seed(key_of(seed, task.key, "restart", restart))
    return torch.randn(shape, generator=generator) * (0.5 if restart else 0.0)


def _note(
    model: ShipModel,
    tasks: Sequence[_Task],
    owners: Sequence[int],
    latent_CZ: Tensor,
    said: Sequence[str],
    found: Found,
) -> None:
    """Keep what was found, and how it explains all of its task's examples."""
    fit = fit_of_latents(model, latent_CZ, said, [tasks[t].examples for t in owners])
    for row, t in enumerate(owners):
        found[t].append(latent_CZ[row])
        tasks[t].found.append(
            (int(fit.right_CM[row].sum()), float(fit.loss_CM[row].mean()), latent_CZ[row].cpu())
        )


def _decode_found(
    model: ShipModel,
    tasks: Sequence[_Task],
    found: Found,
    config: InductionConfig,
    seed: int,
    turn: int,
) -> Texts:
    """Texts that the decoder reads out of each latent, beside examples where it was trained to."""
    rows = [(tasks[t], place) for t, own in enumerate(found) for place in range(len(own))]
    latent_CZ = torch.stack([latent_Z for own in found for latent_Z in own])
    shown: list[Examples] = [()] * len(rows)
    if model.config.decoder.max_examples and config.method not in ("direct", "indirect"):
        shown = [_views(model, task, 1, seed, (turn, place))[0] for task, place in rows]
    texts: Texts = [[] for _ in tasks]
    likeliest = beams(model, shown, latent_CZ, config.num_beams, config.max_new_tokens)
    keys = [key_of(seed, task.key, "refined", turn, place) for task, place in rows]
    drawn = (
        sampled(
            model,
            shown,
            latent_CZ,
            config.num_samples,
            config.temperature,
            keys,
            config.max_new_tokens,
        )
        if config.num_samples
        else [[] for _ in rows]
    )
    owners = [t for t, own in enumerate(found) for _ in own]
    for t, first, second in zip(owners, likeliest, drawn, strict=True):
        texts[t] += [(text, "refined") for text in (*first, *second)]
    return texts


def _extend(texts: Texts, more: Texts) -> None:
    for own, new in zip(texts, more, strict=True):
        own.extend(new)


def _regroup(rows: Sequence[Sequence[str]], per_task: int, origin: str) -> Texts:
    return [
        [(text, origin) for row in rows[start : start + per_task] for text in row]
        for start in range(0, len(rows), per_task)
    ]


def _test(model: ShipModel, tasks: Sequence[_Task], texts: Texts, config: InductionConfig) -> None:
    """Put the best of the new texts among each task's tested ones: all on a few examples, the
    finalists on the others."""
    pairs = [
        (t, text, origin)
        for t, (task, own) in enumerate(zip(tasks, texts, strict=True))
        for text, origin in dict(reversed(own)).items()
        if text and text not in task.tested
    ]
    if not pairs:
        return
    distinct = list(dict.fromkeys(text for _, text, _ in pairs))
    places = {text: i for i, text in enumerate(distinct)}
    latent_CZ = encode_all(model, distinct)[[places[text] for _, text, _ in pairs]]
    few = slice(0, config.num_screened)
    through, stated = _fits(model, tasks, pairs, latent_CZ, few)
    right_C = (through.right_CM.sum(1) + stated.right_CM.sum(1)).tolist()
    loss_C = (through.loss_CM.sum(1) + stated.loss_CM.sum(1)).tolist()
    for (t, text, _), right, loss in zip(pairs, right_C, loss_C, strict=True):
        tasks[t].screened[text] = (-right, loss)
    finalists = _finalists(tasks, pairs, config.num_finalists)
    index = torch.tensor(finalists)
    pairs, latent_CZ = [pairs[i] for i in finalists], latent_CZ[index]
    through, stated = through.rows(index), stated.rows(index)
    if len(tasks[0].examples) > config.num_screened:
        rest_through, rest_stated = _fits(
            model, tasks, pairs, latent_CZ, slice(config.num_screened, None)
        )
        through, stated = through.beside(rest_through), stated.beside(rest_stated)
    for row, (t, text, origin) in enumerate(pairs):
        tasks[t].tested[text] = Candidate(
            text,
            int(through.right_CM[row].sum()),
            float(through.loss_CM[row].mean()),
            int(stated.right_CM[row].sum()),
            float(stated.loss_CM[row].mean()),
            tuple(latent_CZ[row].tolist()),
            origin,
        )


Pair = tuple[int, str, str]


def _fits(
    model: ShipModel, tasks: Sequence[_Task], pairs: Sequence[Pair], latent_CZ: Tensor, which: slice
) -> tuple[Fit, Fit]:
    """Through the encoder and in the prompt."""
    said, examples = [text for _, text, _ in pairs], [tasks[t].examples[which] for t, _, _ in pairs]
    return fit_of_latents(model, latent_CZ, said, examples), fit_in_prompt(model, said, examples)


def _finalists(tasks: Sequence[_Task], pairs: Sequence[Pair], count: int) -> list[int]:
    """Rows of the best of each task on the screening examples."""
    rows: list[list[int]] = [[] for _ in tasks]
    for row, (t, _, _) in enumerate(pairs):
        rows[t].append(row)
    return [
        row
        for task, own in zip(tasks, rows, strict=True)
        for row in sorted(own, key=lambda row: task.screened[pairs[row][1]])[:count]
    ]


def _result(model: ShipModel, task: _Task) -> Induction:
    best = task.best()
    if not best:
        raise UserError(
            "induce: the decoder wrote no instruction that ends; train it longer or use method bank"
        )
    points = [(c.num_right, c.loss, c.latent) for c in best]
    points += [(right, loss, tuple(latent_Z.tolist())) for right, loss, latent_Z in task.found]
    num_right, _, latent = min(points, key=lambda point: (-point[0], point[1]))
    return Induction(best[0].instruction, tuple(best), latent, num_right, len(task.examples))
