"""Induction: examples -> instruction, for many tasks at once.

    examples --propose--> texts --test--> candidates --not all explained?--> refine, test again

Methods: `direct` and `indirect` descend to a latent and decode it (arXiv 2502.02315, section 3.3);
`bank` looks among the known instructions; `propose` lets the decoder read the examples and tests
what it writes; `union`, the default, does the last two together, and looks among what follows from
the known instructions by analogy. Every candidate is tested on the given examples in both ways it
will be used: through the encoder, as an adapter, and as text in the prompt (trials.py), unless
the Task LLM does not follow text there (prompt_following.py). Where no candidate explains
everything, the best are refined: their latents by gradient (descents.py), their texts by single
tokens and by splicing one to another; what comes out is tested likewise.

Analogies, edits and splices make instructions where the known ones are texts of a grammar, and
nothing of use where people wrote them. There (`InductionConfig.suited_to`) the candidates are what
the decoder proposes, the known instructions whose tasks have examples like the given ones
(example_index.py) or, where their examples are nowhere, those that the decoder finds likeliest,
what the Task LLM says when it is asked, and, in a second round (not by itself where known ones are
found by their examples), other wordings of the best and their nearest known neighbours.

Letters: C candidates, W views of the examples, Z latent size.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ship_ds.console import Log, no_log
from ship_ds.errors import UserError
from ship_ds.inference.bank import THOROUGH, Bank
from ship_ds.inference.config import DESCENTS, GRAMMATICAL, InductionConfig
from ship_ds.inference.descents import (
    decode_descents,
    descend_from_best,
    descend_from_scratch,
    descend_from_texts,
    latents_of,
    read_examples,
    task_views,
)
from ship_ds.inference.gradient import NEUTRAL_INSTRUCTION
from ship_ds.inference.proposals import (
    asked_texts,
    edits,
    likeliest_texts,
    sample_texts,
    splices,
)
from ship_ds.inference.results import Induction
from ship_ds.inference.scoring import Examples
from ship_ds.inference.search_state import Proposal, SearchState
from ship_ds.inference.trials import test_proposals
from ship_ds.model.drawing import draw_seed
from ship_ds.model.ship import ShipModel
from ship_ds.monitor.progress import ProgressLine

MOST_TRIED = 2000
"""Known instructions that `tries_all_known` tries; where more are known it walks, as it does
without. Each costs a forward of one example: a second a task on one core for 800 of the embedded
base. A walk among the quickstart's 961 in their place misses the task's own: docs/results.md."""
_NUM_READ = 2
"""Views of the examples by which the decoder ranks the known instructions."""


def induce_many(
    model: ShipModel,
    bank: Bank,
    tasks: Sequence[Examples],
    config: InductionConfig,
    seed: int = 0,
    log: Log = no_log,
) -> list[Induction]:
    """One induction a task.

    Args:
        model: with its trained weights.
        bank: the known instructions.
        tasks: the examples of each.
        config: how to search.
        seed: of every draw, together with the task's examples: the other tasks do not matter.
        log: takes lines of progress; `no_log` shows no bar either.

    Raises:
        UserError: a task has no examples; or nothing is known and the method needs it.
    """
    if any(not examples for examples in tasks):
        raise UserError(
            "induce: a task has no examples; give at least one line with input and target"
        )
    off: dict[str, object] = {}
    if not model.decodes:
        if config.method not in ("bank", "union"):
            raise UserError(
                f"induce: --method {config.method} reads texts out of latents, and this run "
                "trained no decoder (loss.reconstruction=0); use bank or union"
            )
        off = {"asks_decoder": False, "num_edits": 0}
    config = config.suited_to(bank.share_in_slots, bank.index is not None)
    config = config.model_copy(update=off)
    searches = searches_of(model, bank, tasks, config)
    num_stages = 2 + _num_rounds(config)
    with ProgressLine("induction", num_stages * len(tasks), "part", log) as progress:
        for group in _by_num_examples(searches, config.num_at_once):
            _search(model, bank, group, config, seed, progress)
    return [search.result() for search in searches]


def searches_of(
    model: ShipModel, bank: Bank, tasks: Sequence[Examples], config: InductionConfig
) -> list[SearchState]:
    """The searches at their beginning, one a task; in a `union` they know how alike the known
    tasks' examples are, where the bank has them.

    Args:
        model: says how long a target is.
        bank: the known instructions.
        tasks: the examples of each.
        config: whose method decides.
    """
    if bank.index is None or config.method != "union":
        return [SearchState(tuple(examples)) for examples in tasks]
    known, prompts = bank.index.instructions, model.prompts
    return [
        SearchState(
            tuple(examples),
            resemblance=dict(zip(known, alike, strict=True)),
            num_tokens=tuple(len(prompts.target(example.target)) for example in examples),
        )
        for examples, alike in zip(tasks, bank.index.resemblance(tasks).tolist(), strict=True)
    ]


def with_latents_decoded(
    model: ShipModel,
    induction: Induction,
    examples: Examples,
    latent_CZ: Tensor,
    config: InductionConfig,
    seed: int,
) -> Induction:
    """The induction with further candidates: what the decoder reads out of these latents, tested on
    the examples.

    Args:
        model: with its trained weights.
        induction: of the task.
        examples: that it was induced from.
        latent_CZ: latents of the task that were found elsewhere.
        config: how to search.
        seed: of the draws.

    Returns:
        The induction as it was where the run trained no decoder.
    """
    if not model.decodes:
        return induction
    search = SearchState(tuple(examples), {c.instruction: c for c in induction.candidates})
    descents = latents_of(model, search, latent_CZ, induction.instruction)
    # A round after the last one of the search, so that nothing is drawn as it was there.
    proposals = decode_descents(model, descents, config, seed, config.num_rounds + 1)
    test_proposals(model, [search], proposals, config)
    return search.result()


def _by_num_examples(
    searches: Sequence[SearchState], num_at_once: int
) -> Iterator[list[SearchState]]:
    """Tasks with equally many examples, which go through the models together: an adapter's products
    want equal parts."""
    for size in sorted({len(search.examples) for search in searches}):
        equal = [search for search in searches if len(search.examples) == size]
        for start in range(0, len(equal), num_at_once):
            yield equal[start : start + num_at_once]


def _search(
    model: ShipModel,
    bank: Bank,
    searches: list[SearchState],
    config: InductionConfig,
    seed: int,
    progress: ProgressLine,
) -> None:
    proposals = _first_proposals(model, bank, searches, config, seed, progress)
    progress.done(len(searches))
    num_distinct = len({(proposal.search, proposal.text) for proposal in proposals})
    progress.begin(f"testing {num_distinct} candidates of {len(searches)} tasks")
    test_proposals(model, searches, proposals, config)
    _test_neutral_instruction(model, searches, config)
    progress.done(len(searches))
    for round_number in range(1, _num_rounds(config) + 1):
        unexplained = [search for search in searches if not search.is_explained]
        if unexplained:
            progress.begin(f"{len(unexplained)} tasks not explained: refining")
            proposals = _refine(model, bank, unexplained, config, seed, round_number)
            test_proposals(model, unexplained, proposals, config)
        progress.done(len(searches))


def _num_rounds(config: InductionConfig) -> int:
    """The bank tests what it knows and no more; the two descents start from texts instead."""
    if config.method in DESCENTS:
        return config.num_text_starts
    return config.num_rounds if config.method in ("propose", "union") else 0


def _first_proposals(
    model: ShipModel,
    bank: Bank,
    searches: list[SearchState],
    config: InductionConfig,
    seed: int,
    progress: ProgressLine,
) -> list[Proposal]:
    if config.method in DESCENTS:
        progress.begin("descending")
        descents = descend_from_scratch(model, searches, config, seed)
        return decode_descents(model, descents, config, seed, 0)
    proposals: list[Proposal] = []
    if config.method in ("bank", "union"):
        progress.begin(f"looking among {len(bank)} known instructions")
        proposals += _known(model, bank, searches, config, seed)
    if encoder_reads(model, config):
        progress.begin("the encoder reads")
        proposals += _read_by_encoder(model, bank, searches, config, seed)
    writes = config.method == "propose" or (config.method == "union" and config.asks_decoder)
    if writes:
        progress.begin("the decoder proposes")
        proposals += _written_by_decoder(model, searches, config, seed)
    if config.asks_task_llm and config.method in ("propose", "union"):
        progress.begin("the Task LLM proposes")
        asked = asked_texts(model, [search.examples for search in searches], config.max_new_tokens)
        proposals += _proposals(searches, [[text] if text else [] for text in asked], "asked")
    return proposals


def _test_neutral_instruction(
    model: ShipModel, searches: Sequence[SearchState], config: InductionConfig
) -> None:
    """A decoder that has hardly been trained may propose no text at all; an induction still has to
    answer."""
    untested = [search for search in searches if not search.tested]
    proposals = [Proposal(search, NEUTRAL_INSTRUCTION, "neutral") for search in untested]
    test_proposals(model, untested, proposals, config)


def _known(
    model: ShipModel,
    bank: Bank,
    searches: Sequence[SearchState],
    config: InductionConfig,
    seed: int,
) -> Iterator[Proposal]:
    """Known instructions, and in a `union` what follows from them by analogy."""
    if not len(bank):
        raise UserError(
            "induce: the bundle knows no instructions of its training; use method "
            "propose, direct or indirect"
        )
    tries_analogies = config.analogies and config.method == "union"
    larger = bank.with_analogies(model) if tries_analogies else bank
    shortlists = [_most_alike(bank, search, config.num_known) for search in searches]
    # All of them, or those that have no word in common with any known task.
    others = [place for place, shortlist in enumerate(shortlists) if not shortlist]
    if others:
        rest = [searches[place] for place in others]
        by_models = _shortlists_by_models(model, bank, larger, rest, config, seed)
        for place, shortlist in zip(others, by_models, strict=True):
            shortlists[place] = shortlist
    for search, shortlist in zip(searches, shortlists, strict=True):
        for c in shortlist:
            # The larger bank begins with the smaller one.
            origin = "known" if c < len(bank) else "analogy"
            yield Proposal(search, larger.instructions[c], origin, larger.latent_CZ[c])


def _most_alike(bank: Bank, search: SearchState, count: int) -> list[int]:
    """The known instructions whose tasks' examples have most in common with the given ones, most
    alike first; none where that is not compared."""
    row_of = {text: row for row, text in enumerate(bank.instructions)}
    alike = (search.resemblance or {}).items()
    best = sorted(alike, key=lambda pair: -pair[1])[:count]
    return [row_of[text] for text, value in best if value > 0]


def _shortlists_by_models(
    model: ShipModel,
    bank: Bank,
    larger: Bank,
    searches: Sequence[SearchState],
    config: InductionConfig,
    seed: int,
) -> list[list[int]]:
    """Known instructions, as rows of the larger bank, that the decoder finds likely or whose
    adapters fit."""
    examples = [search.examples for search in searches]
    reads = config.asks_decoder and model.config.decoder.max_examples > 0
    if config.method == "union" and bank.share_in_slots < GRAMMATICAL and reads:
        # Their own draw of views: what the decoder proposes from is drawn by "views 0".
        views = [task_views(model, search, _NUM_READ, seed, "known") for search in searches]
        return bank.shortlist_read(model, views, config.num_known)
    if config.tries_all_known and len(larger) <= MOST_TRIED:
        return larger.shortlist_of_all(model, examples, config.num_known)
    walk = THOROUGH if config.asks_decoder else replace(THOROUGH, num_likely=0)
    return larger.shortlist(model, examples, config.num_known, walk)


def encoder_reads(model: ShipModel, config: InductionConfig) -> bool:
    """Whether the search asks the encoder what it makes of examples."""
    searches = config.method in ("propose", "union")
    return searches and config.num_read > 0 and model.config.encoder.reads_examples_alone


def _read_by_encoder(
    model: ShipModel,
    bank: Bank,
    searches: Sequence[SearchState],
    config: InductionConfig,
    seed: int,
) -> list[Proposal]:
    """What the decoder writes of the latents that the encoder makes of choices of the examples, and
    the known instructions nearest to these: induction in one pass, tested like all others."""
    latent_WZ = read_examples(model, searches, config.num_read, seed).cpu()
    owners = [search for search in searches for _ in range(config.num_read)]
    proposals: list[Proposal] = []
    if config.asks_decoder:
        shown: list[Examples] = [()] * len(owners)
        texts = likeliest_texts(model, shown, latent_WZ, config.num_beams, config.max_new_tokens)
        proposals += _proposals(owners, texts, "encoded")
    if config.method == "union" and len(bank):
        for search, nearest in zip(owners, bank.nearest(latent_WZ, config.num_beams), strict=True):
            for c in nearest:
                proposals.append(Proposal(search, bank.instructions[c], "known", bank.latent_CZ[c]))
    return proposals


def _written_by_decoder(
    model: ShipModel, searches: Sequence[SearchState], config: InductionConfig, seed: int
) -> list[Proposal]:
    """What the decoder writes after reading the examples; one that reads none proposes nothing."""
    if not model.config.decoder.max_examples:
        return []
    num_views, max_length = config.num_views, config.max_new_tokens
    owners = [search for search in searches for _ in range(num_views)]
    shown = [v for search in searches for v in task_views(model, search, num_views, seed, 0)]
    seeds = [
        draw_seed(seed, search.key, "proposal", i) for search in searches for i in range(num_views)
    ]
    samples = sample_texts(
        model, shown, None, config.num_samples, config.temperature, seeds, max_length
    )
    beams = likeliest_texts(model, shown, None, config.num_beams, max_length)
    return [*_proposals(owners, samples, "sampled"), *_proposals(owners, beams, "beam")]


def _proposals(
    searches: Sequence[SearchState], texts: Sequence[Iterable[str]], origin: str
) -> Iterator[Proposal]:
    for search, texts_of_row in zip(searches, texts, strict=True):
        for text in texts_of_row:
            yield Proposal(search, text, origin)


def _refine(
    model: ShipModel,
    bank: Bank,
    searches: Sequence[SearchState],
    config: InductionConfig,
    seed: int,
    round_number: int,
) -> list[Proposal]:
    """Changes of each task's best texts, and what the decoder reads out of latents at theirs or
    near them."""
    if config.method in DESCENTS:
        descents = descend_from_texts(model, searches, config)
        return decode_descents(model, descents, config, seed, round_number)
    proposals: list[Proposal] = []
    if config.num_edits and config.asks_decoder:
        proposals += _edited(model, searches, config, seed, round_number)
    if config.num_splices:
        proposals += _spliced(model, searches, config, proposals)
    if config.num_neighbours and len(bank):
        proposals += known_neighbours(bank, searches, config)
    if not config.asks_decoder:
        return proposals
    descents = descend_from_best(model, searches, config)
    return proposals + decode_descents(model, descents, config, seed, round_number)


def known_neighbours(
    bank: Bank, searches: Sequence[SearchState], config: InductionConfig
) -> Iterator[Proposal]:
    """The known instructions nearest to each task's best candidates.

    Args:
        bank: the known instructions.
        searches: one a task, with tested candidates.
        config: how many of each task's best, and how many neighbours of each at most.

    Yields:
        Neighbours that were not tested yet, with their latents.
    """
    for search in searches:
        best = torch.tensor([c.latent for c in search.best[: config.num_refined]])
        # One more than is asked for: a known candidate is its own nearest.
        for nearest in bank.nearest(best, config.num_neighbours + 1):
            others = [c for c in nearest if bank.instructions[c] not in search.tested]
            for c in others[: config.num_neighbours]:
                yield Proposal(search, bank.instructions[c], "known", bank.latent_CZ[c])


def _edited(
    model: ShipModel,
    searches: Sequence[SearchState],
    config: InductionConfig,
    seed: int,
    round_number: int,
) -> list[Proposal]:
    """The best texts with one token changed, as the decoder would rather write them beside their
    latent and a view of the examples."""
    edited = [(search, c) for search in searches for c in search.best[: config.num_edited]]
    shown = [task_views(model, search, 1, seed, round_number)[0] for search, _ in edited]
    latent_CZ = torch.tensor([candidate.latent for _, candidate in edited])
    texts = [candidate.instruction for _, candidate in edited]
    changed = edits(model, shown, texts, config.num_edits, latent_CZ)
    return list(_proposals([search for search, _ in edited], changed, "edit"))


def _spliced(
    model: ShipModel,
    searches: Sequence[SearchState],
    config: InductionConfig,
    proposals: Sequence[Proposal],
) -> list[Proposal]:
    """Splices of what did best on the first examples, none of which was tried or proposed."""
    spliced = []
    for search in searches:
        proposed = {proposal.text for proposal in proposals if proposal.search is search}
        texts = splices(
            model,
            search.parents(config.num_parents),
            config.num_splices,
            config.max_new_tokens,
            {*search.screened, *proposed},
        )
        spliced += [Proposal(search, text, "splice") for text in texts]
    return spliced
