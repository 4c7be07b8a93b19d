"""What an adapter does, in words, with the evidence.

    adapter --answers inputs--> examples --induction--> texts      behaviour, bank
            --weights---------> latents  --decoder----> texts      weights, bank
    each text --its own adapter, and as text in the prompt--> the same answers?

A text is worth what it does: the share of the adapter's answers that the adapter of the text gives
too, of all inputs and of those that the base answers otherwise by itself, whichever is lower. The
second keeps a text that does nothing from explaining an adapter that does nearly nothing. Where
even the best text gives less than a threshold, the answer is that nothing which can be said does
this. The threshold lies between two sorts of adapters that are made of dev tasks (`calibrate`).

Letters: C candidates, Z latent size, R LoRA rank, I inputs of a linear, O outputs of a linear.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ship_ds.console import Log, no_log
from ship_ds.data.task import Example, SplitTask, spread
from ship_ds.errors import UserError
from ship_ds.inference.adapter_reading import induce_from_weights, known_distances
from ship_ds.inference.bank import Bank
from ship_ds.inference.confidence import best_parting
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import answer_bare, answer_latents, answer_stated, answer_under
from ship_ds.inference.gradient import Schedule, descend_to_behaviour
from ship_ds.inference.induction import induce_many, with_latents_decoded
from ship_ds.inference.lora_reader import LoraReader
from ship_ds.inference.results import (
    Candidate,
    Explained,
    Explanation,
    Induction,
    WeightInduction,
)
from ship_ds.inference.search_state import Proposal, SearchState
from ship_ds.inference.trials import test_proposals
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.model.drawing import keyed_generator
from ship_ds.model.ship import ShipModel

NUM_INPUTS = 24
"""Made up where none are given."""
_NUM_SEARCHED = 8
"""Of the adapter's answers, that instructions are looked for on; the others only test."""
_NUM_EXECUTED = 8
"""Best candidates of the search whose answers to all inputs are compared with the adapter's."""
_SEARCH = {"num_rounds": 1}
_READING = {"steps": 30, "num_beams": 2, "num_samples": 2}
"""Where nothing else was set, of the search by answers and of the one by weights: each is one
source of three, and together they would take twice as long."""
_WORTH_MATCHING = 0.25
"""Share of the searched answers that some text has to give before a latent is sought that gives
them all: what no text comes near, no latent near them does."""
HALF = 0.5
"""The threshold where dev tells none."""
_NUM_DEV = 8
_FEWEST = 4
"""Dev tasks that a threshold needs."""
_NOISE = 0.5
"""Norm of what is added to dev's own adapters, beside their own norm: adapters that do a task and
are none that the run would make."""


@dataclass(frozen=True)
class Threshold:
    """From which agreement on a text counts as saying what an adapter does.

    Args:
        value: half way between the two sorts where they lie apart: the lowest agreement that best
            parts them, and the highest below it.
        share_named: of dev's own adapters with noise in them, how many are above.
        share_refused: of random adapters of the same norms, how many are below.
        num_tasks: of dev, each giving one of both.
    """

    value: float
    share_named: float
    share_refused: float
    num_tasks: int


def explain_many(
    model: ShipModel,
    bank: Bank,
    adapters: Sequence[Adapter],
    inputs: Sequence[Sequence[str]],
    config: InductionConfig,
    max_new_tokens: int,
    threshold: float = HALF,
    reader: LoraReader | None = None,
    seed: int = 0,
    log: Log = no_log,
) -> list[Explanation]:
    """One explanation an adapter.

    Args:
        model: with its trained weights.
        bank: the known instructions.
        adapters: of one task each.
        inputs: what each of them is asked, one at least.
        config: how to search.
        max_new_tokens: of an answer.
        threshold: agreement from which on a text counts as saying it.
        reader: of this run's adapters; None: the weights are read by descent alone.
        seed: of every draw.
        log: takes lines of progress.
    """
    answers = [
        answer_under(model, adapter, "", texts, max_new_tokens)
        for adapter, texts in zip(adapters, inputs, strict=True)
    ]
    bare = answer_bare(model, inputs, max_new_tokens)
    examples = [_examples(*row) for row in zip(inputs, answers, bare, strict=True)]
    search = _unless_set(config, _SEARCH)
    by_answers = _induced(model, bank, adapters, examples, search, seed, log)
    reading = _unless_set(config, _READING)
    by_weights = _read(model, bank, adapters, reading, reader, seed)
    candidates = [
        _tested(model, *row, config) for row in zip(examples, by_answers, by_weights, strict=True)
    ]
    executed = _executed(
        model, candidates, inputs, answers, bare, by_weights, config, max_new_tokens
    )
    return [
        Explanation(
            rows[0].instruction if rows and rows[0].agreement >= threshold else None,
            tuple(rows),
            threshold,
            tuple(texts),
            tuple(targets),
            tuple(base),
            adapter.update_norms(),
        )
        for rows, texts, targets, base, adapter in zip(
            executed, inputs, answers, bare, adapters, strict=True
        )
    ]


def _unless_set(config: InductionConfig, numbers: Mapping[str, int]) -> InductionConfig:
    """The search with these numbers where none was given."""
    return config.model_copy(
        update={key: value for key, value in numbers.items() if key not in config.model_fields_set}
    )


def _examples(
    inputs: Sequence[str], answers: Sequence[str | None], bare: Sequence[str | None]
) -> list[Example]:
    """The answers that ended, those first that the base does not give, as many as are searched."""
    rows = [row for row in zip(inputs, answers, bare, strict=True) if row[1] is not None]
    rows.sort(key=lambda row: row[1] == row[2])
    distinct = {text: Example(text, answer) for text, answer, _ in rows if answer is not None}
    return list(distinct.values())[:_NUM_SEARCHED]


def _induced(
    model: ShipModel,
    bank: Bank,
    adapters: Sequence[Adapter],
    examples: Sequence[Sequence[Example]],
    config: InductionConfig,
    seed: int,
    log: Log,
) -> list[Induction | None]:
    """What explains each adapter's answers; None where none of them ended."""
    places = [place for place, row in enumerate(examples) if row]
    tasks = [examples[place] for place in places]
    inductions: list[Induction | None] = [None] * len(adapters)
    for place, induction in zip(
        places, induce_many(model, bank, tasks, config, seed, log) if tasks else [], strict=True
    ):
        inductions[place] = induction
        most = max(candidate.most_right for candidate in induction.candidates)
        if _WORTH_MATCHING * induction.num_examples <= most < induction.num_examples:
            log("no candidate gives every answer: matching its distributions")
            inductions[place] = _matched(
                model, induction, adapters[place], examples[place], config, seed
            )
    return inductions


def _matched(
    model: ShipModel,
    induction: Induction,
    adapter: Adapter,
    examples: Sequence[Example],
    config: InductionConfig,
    seed: int,
) -> Induction:
    """With what is read out of latents whose adapters have the same distributions over next
    tokens."""
    best = induction.candidates[: config.num_refined]
    start_CZ = torch.tensor([induction.latent, *(candidate.latent for candidate in best)])
    wordings = [induction.instruction] * len(start_CZ)
    schedule = Schedule(config.steps, config.direct_lr, config.prior)
    descent = descend_to_behaviour(model, start_CZ, wordings, adapter, examples, schedule)
    return with_latents_decoded(model, induction, examples, descent.latent_CZ, config, seed)


def _read(
    model: ShipModel,
    bank: Bank,
    adapters: Sequence[Adapter],
    config: InductionConfig,
    reader: LoraReader | None,
    seed: int,
) -> list[WeightInduction | None]:
    """What each adapter's weights say; None where nothing can be said by them."""
    try:
        known = known_distances(model, bank, adapters) if len(bank) else [None] * len(adapters)
        return [
            induce_from_weights(
                model,
                bank,
                adapter,
                config,
                seed,
                reader.read(adapter) if reader is not None else None,
                known_C,
            )
            for adapter, known_C in zip(adapters, known, strict=True)
        ]
    except UserError:
        # A kind without a distance, or a run that knows and writes nothing.
        return [None] * len(adapters)


def _tested(
    model: ShipModel,
    examples: Sequence[Example],
    by_answers: Induction | None,
    by_weights: WeightInduction | None,
    config: InductionConfig,
) -> list[Candidate]:
    """The candidates of both, best first by the examples; those of the weights alone where there
    are no examples."""
    read = by_weights.candidates[: config.num_finalists] if by_weights else ()
    if by_answers is None:
        return [Candidate(c.instruction, 0, 0.0, None, None, c.latent, c.origin) for c in read]
    search = SearchState(tuple(examples), {c.instruction: c for c in by_answers.candidates})
    proposals = [
        Proposal(search, c.instruction, c.origin, torch.tensor(c.latent, device=model.device))
        for c in read
    ]
    test_proposals(model, [search], proposals, config)
    return search.best


def _executed(
    model: ShipModel,
    candidates: Sequence[Sequence[Candidate]],
    inputs: Sequence[Sequence[str]],
    answers: Sequence[Sequence[str | None]],
    bare: Sequence[Sequence[str | None]],
    by_weights: Sequence[WeightInduction | None],
    config: InductionConfig,
    max_new_tokens: int,
) -> list[list[Explained]]:
    """The best candidates of each adapter with their answers to all of its inputs, best first."""
    owners = [
        (place, candidate)
        for place, row in enumerate(candidates)
        for candidate in row[:_NUM_EXECUTED]
    ]
    made: list[list[Explained]] = [[] for _ in candidates]
    if not owners:
        return made
    texts = [candidate.instruction for _, candidate in owners]
    asked = [inputs[place] for place, _ in owners]
    latent_CZ = torch.tensor([candidate.latent for _, candidate in owners], device=model.device)
    deduced = answer_latents(model, latent_CZ, texts, asked, max_new_tokens)
    stated = (
        answer_stated(model, texts, asked, max_new_tokens)
        if config.ranks_in_prompt
        else [None] * len(owners)
    )
    for (place, candidate), by_adapter, in_prompt in zip(owners, deduced, stated, strict=True):
        targets, base, weights = answers[place], bare[place], by_weights[place]
        ways = [by_adapter] if in_prompt is None else [by_adapter, in_prompt]
        made[place].append(
            Explained(
                candidate.instruction,
                _sources(candidate, weights),
                _num_same(by_adapter, targets),
                None if in_prompt is None else _num_same(in_prompt, targets),
                max(agreement_of(way, targets, base) for way in ways),
                _distance(candidate.instruction, weights),
            )
        )
    for rows in made:
        # Both ways together first, as induction ranks: of texts that agree alike the one that says
        # it as well as does it.
        rows.sort(key=lambda one: (-one.agreement, -one.same - (one.same_in_prompt or 0)))
    return made


def _num_same(answers: Sequence[str | None], targets: Sequence[str | None]) -> int:
    return sum(
        one is not None and one == other for one, other in zip(answers, targets, strict=True)
    )


def agreement_of(
    answers: Sequence[str | None], targets: Sequence[str | None], bare: Sequence[str | None]
) -> float:
    """How far answers are an adapter's: the share of all inputs, or of those that the base answers
    otherwise, whichever is lower; 0 where the adapter changes no answer.

    Args:
        answers: of a candidate.
        targets: the answers of the adapter; one that did not end is nobody's.
        bare: of the base.
    """
    places = [place for place, answer in enumerate(targets) if answer != bare[place]]
    if not places:
        return 0.0
    changed = _num_same([answers[place] for place in places], [targets[place] for place in places])
    return min(_num_same(answers, targets) / len(targets), changed / len(places))


_BEHAVIOUR = ("encoded", "sampled", "beam", "asked", "refined", "edit", "splice", "neutral")


def _sources(candidate: Candidate, weights: WeightInduction | None) -> tuple[str, ...]:
    """Where the text was found, by whichever search."""
    origins = {candidate.origin}
    if weights is not None:
        origins |= {c.origin for c in weights.candidates if c.instruction == candidate.instruction}
    named = {
        "weights": {"decoded", "read"},
        "behaviour": set(_BEHAVIOUR),
        "bank": {"known", "analogy"},
    }
    return tuple(source for source, those in named.items() if origins & those)


def _distance(text: str, weights: WeightInduction | None) -> float | None:
    candidates = weights.candidates if weights else ()
    return next((c.distance for c in candidates if c.instruction == text), None)


def made_up(
    tasks: Sequence[SplitTask], probes: Sequence[str], count: int = NUM_INPUTS, seed: int = 0
) -> list[str]:
    """Inputs to try an adapter on: one each of tasks of the run, evenly spaced; or, where there are
    none, the run's probes and others of their words.

    Args:
        tasks: of the run's data.
        probes: inputs of the bundle.
        count: how many, at most.
        seed: of the draws.
    """
    rng = random.Random(f"{seed} made up")
    with_inputs = [task for task in tasks if task.train]
    places = [place * len(with_inputs) // count for place in range(count)] if with_inputs else []
    texts = [rng.choice(with_inputs[place].train).input for place in places]
    texts += probes
    words = [text.split() for text in probes if text.split()]
    pool = [word for row in words for word in row]
    # Four times as many draws as are wanted: short ones repeat.
    for _ in range(4 * count if words else 0):
        texts.append(" ".join(rng.choice(pool) for _ in rng.choice(words)))
    return list(dict.fromkeys(texts))[:count]


@torch.no_grad()
def noise_like(adapter: LoraAdapter, key: str) -> LoraAdapter:
    """A random LoRA of the same modules and ranks whose update of each has the same norm.

    Args:
        adapter: of one task.
        key: what the draws depend on alone.
    """
    generator = keyed_generator(f"noise {key}")
    norms, factors = adapter.update_norms(), {}
    for path, (a_1RI, b_1OR) in adapter.factors.items():
        a, b = (torch.randn(one.shape, generator=generator) for one in (a_1RI, b_1OR))
        norm = float((b[0] @ a[0]).norm()) * abs(adapter.scaling)
        factors[path] = (a.to(a_1RI), (b * (norms[path] / max(norm, 1e-12))).to(b_1OR))
    return replace(adapter, factors=factors)


def _disturbed(adapter: LoraAdapter, key: str) -> LoraAdapter:
    """The adapter with noise of half its norm beside it."""
    noise, factors = noise_like(adapter, key), {}
    for path, (a_1RI, b_1OR) in adapter.factors.items():
        more_a, more_b = noise.factors[path]
        factors[path] = (torch.cat([a_1RI, more_a], 1), torch.cat([b_1OR, _NOISE * more_b], 2))
    return replace(adapter, factors=factors)


def calibrate(
    model: ShipModel,
    bank: Bank,
    dev: Sequence[SplitTask],
    inputs: Sequence[str],
    config: InductionConfig,
    max_new_tokens: int,
    reader: LoraReader | None = None,
    log: Log = no_log,
) -> Threshold:
    """The threshold between adapters that do a task of dev, though not as the run's own do, and
    random ones of the same norms.

    Args:
        model: with its trained weights.
        bank: the known instructions.
        dev: tasks, of which up to 8 are taken, evenly spaced.
        inputs: what all adapters are asked.
        config: how to search.
        max_new_tokens: of an answer.
        reader: of this run's adapters.
        log: takes lines of progress.
    """
    texts = [task.task.instruction for task in spread(dev, _NUM_DEV)]
    adapters = [model.adapt(latent_Z[None]) for latent_Z in model.encode(texts)] if texts else []
    loras = [lora for adapter in adapters if (lora := adapter.as_lora()) is not None]
    if len(texts) < _FEWEST or len(loras) < len(adapters):
        return Threshold(HALF, 0.0, 0.0, 0)
    subjects = [
        *(_disturbed(lora, text) for lora, text in zip(loras, texts, strict=True)),
        *(noise_like(lora, text) for lora, text in zip(loras, texts, strict=True)),
    ]
    explanations = explain_many(
        model,
        bank,
        subjects,
        [inputs] * len(subjects),
        config,
        max_new_tokens,
        reader=reader,
        log=log,
    )
    agreed = [one.agreement for one in explanations]
    return threshold_of(agreed[: len(adapters)], agreed[len(adapters) :])


def threshold_of(named: Sequence[float], refused: Sequence[float]) -> Threshold:
    """Where two sorts of adapters part best; where they do not part, `HALF` or above all that
    should be refused.

    Args:
        named: agreement of those that should be named.
        refused: of those that should not.
    """
    lowest, difference = best_parting(named, refused)
    # Half way down to the next below it.
    below = max((value for value in (*named, *refused) if value < lowest), default=0.0)
    value = (lowest + below) / 2
    if difference <= 0:
        value = HALF if max(refused) < HALF else (max(refused) + 1) / 2
    return Threshold(
        value,
        sum(one >= value for one in named) / len(named),
        sum(one < value for one in refused) / len(refused),
        len(named),
    )
