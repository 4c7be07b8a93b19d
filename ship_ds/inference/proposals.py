"""Instructions that the decoder writes after reading examples, with z beside them or without; and
changes of such texts.

The decoder was trained on at most `model.decoder.max_examples` examples, in any order. When more
are given it reads several views: random subsets in random order. Every random choice has a seed of
its own, so a task's proposals do not depend on its batch.

    views(examples, 2, 3, seed)                     -> 3 pairs of examples
    sample_texts(model, views, None, 6, ...)        -> up to 6 texts a view
    edits(model, views, ["add 3"], 2)               -> [["add 4", "remove 3"]]
    splices(model, ["add 3 first", "put 3 last"])   -> ["add 3 last", "put 3 first"]

Letters: K labelled positions, V vocabulary, W views of the examples, Z latent size.
"""

import itertools
import random
import re
from collections.abc import Callable, Container, Iterator, Sequence

import torch
from torch import Tensor

from ship_ds.data.task import Example
from ship_ds.inference.deduction import bare_answerer, prompt_with_room
from ship_ds.inference.scoring import Examples, scored_batches
from ship_ds.model import budget
from ship_ds.model.batch import TokenBatch
from ship_ds.model.generation import sample
from ship_ds.model.language_model import Stream
from ship_ds.model.search import beam_search
from ship_ds.model.ship import ShipModel

_CUTS = 12
"""Places at which two texts are spliced, at most."""


def views(
    examples: Examples, max_examples: int, count: int, seed: int
) -> list[tuple[Example, ...]]:
    """Random subsets of the examples in random order; the distinct subsets come first.

    Args:
        examples: of one task.
        max_examples: in a view, at most.
        count: of views.
        seed: of the draws.
    """
    rng = random.Random(seed)
    size = min(max_examples, len(examples))
    drawn: list[tuple[Example, ...]] = []
    subsets: set[frozenset[int]] = set()
    for _ in range(20 * count):  # enough draws to meet nearly every subset there is
        picked = rng.sample(range(len(examples)), size)
        if frozenset(picked) not in subsets:
            subsets.add(frozenset(picked))
            drawn.append(tuple(examples[i] for i in picked))
    while len(drawn) < count:
        drawn.append(tuple(rng.sample(examples, size)))
    return drawn[:count]


def stream_after(model: ShipModel, shown: Sequence[Examples], latent_WZ: Tensor | None) -> Stream:
    """The decoder after reading each view, about to write the instruction.

    Args:
        model: holds the decoder.
        shown: the examples of each view; none: the latent alone.
        latent_WZ: beside the views; None puts the decoder's learned tokens in their place.
    """
    prompts = model.decoder_prompts
    ids = [prompts.decoder_prompt(view) for view in shown]
    batch = TokenBatch.build(
        ids, None, prompts.pad_id, model.config.decoder.num_soft_tokens, model.device
    )
    return model.decoder.stream(*latents_beside(model, len(shown), latent_WZ), batch)


def latents_beside(
    model: ShipModel, num_views: int, latent_WZ: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The latents beside the views, zeros where there are none, and whether the decoder reads
    them.

    Args:
        model: holds the decoder.
        num_views: W.
        latent_WZ: see `stream_after`.

    Returns:
        Latents (W, Z), and of each view whether its latent is read, (W,).
    """
    shows_latent_W = torch.full((num_views,), latent_WZ is not None, device=model.device)
    latent_WZ = torch.zeros(num_views, model.config.latent_size) if latent_WZ is None else latent_WZ
    return latent_WZ.to(model.device), shows_latent_W


def sample_texts(
    model: ShipModel,
    shown: Sequence[Examples],
    latent_WZ: Tensor | None,
    num_samples: int,
    temperature: float,
    seeds: Sequence[int],
    max_new_tokens: int,
) -> list[list[str]]:
    """Instructions sampled from each view; those that do not end are left out.

    Args:
        model: holds the decoder.
        shown: the examples of each view.
        latent_WZ: see `stream_after`.
        num_samples: of each view.
        temperature: below 1 samples are closer to the likeliest text.
        seeds: one a view.
        max_new_tokens: of a text.
    """
    if num_samples == 0:
        return [[] for _ in shown]
    prompts = model.decoder_prompts
    texts: list[list[str]] = [[] for _ in shown]
    for chunk in stream_batches(model, shown, num_samples, max_new_tokens):
        stream = stream_after(
            model, [shown[view] for view in chunk], None if latent_WZ is None else latent_WZ[chunk]
        )
        stream.select([view for view in range(stream.num_rows) for _ in range(num_samples)])
        uniform = torch.cat([_uniform(num_samples, max_new_tokens, seeds[view]) for view in chunk])
        rows = sample(stream, uniform, temperature, prompts.eos_id)
        for i, view in enumerate(chunk):
            rows_of_view = rows[i * num_samples : (i + 1) * num_samples]
            texts[view] = [_text(model, row) for row in rows_of_view if row[-1] == prompts.eos_id]
    return texts


def _uniform(num_samples: int, num_tokens: int, seed: int) -> Tensor:
    """Numbers in [0, 1), by which tokens are drawn, (num_samples, num_tokens)."""
    return torch.rand(num_samples, num_tokens, generator=torch.Generator().manual_seed(seed))


def likeliest_texts(
    model: ShipModel,
    shown: Sequence[Examples],
    latent_WZ: Tensor | None,
    num_beams: int,
    max_new_tokens: int,
) -> list[list[str]]:
    """The `num_beams` best instructions by the decoder's own likelihood from each view, best
    first; those that do not end are left out.

    Args:
        model: holds the decoder.
        shown: the examples of each view.
        latent_WZ: see `stream_after`.
        num_beams: of each view.
        max_new_tokens: of a text.
    """
    eos_id = model.decoder_prompts.eos_id
    texts: list[list[str]] = [[] for _ in shown]
    for chunk in stream_batches(model, shown, num_beams, max_new_tokens):
        stream = stream_after(
            model, [shown[view] for view in chunk], None if latent_WZ is None else latent_WZ[chunk]
        )
        searches = beam_search(stream, num_beams, eos_id, max_new_tokens)
        for view, beams in zip(chunk, searches, strict=True):
            texts[view] = [_text(model, beam.tokens) for beam in beams if beam.tokens[-1] == eos_id]
    return texts


def asked_texts(
    model: ShipModel,
    shown: Sequence[Examples],
    max_new_tokens: int,
    prompt: Callable[[Examples], tuple[int, ...]] | None = None,
) -> list[str]:
    """What the bare Task LLM writes, greedily, when it is shown examples and asked for the
    instruction (Honovich et al. 2022, arXiv 2205.10782), whether it ends or not. Examples that its
    context has no room for are left out, the last ones first.

    Args:
        model: holds the Task LLM.
        shown: the examples of each task.
        max_new_tokens: of a text.
        prompt: of examples, as ids; None: the one that SHIP's decoder reads ("This task is to:").
    """
    form = model.prompts
    prompt = prompt or form.decoder_prompt
    prompts = [prompt_with_room(prompt, examples, model, max_new_tokens) for examples in shown]
    return [form.text(row) for row in bare_answerer(model).rows([prompts], max_new_tokens)[0]]


_PREAMBLE = re.compile(r"\s*:?\s*(?:(?:probably|most likely):?\s*)*(?:to\b\s*)?")
_QUOTED = re.compile(r'"([a-zA-Z.,\'\\/]+ [a-zA-Z .,\'\\/]+)"')


def without_preamble(text: str) -> str:
    """The instruction in what a model writes behind "The instruction was", nearly as the paper of
    instruction induction takes it: the first line without "probably", "most likely" and "to"; what
    is quoted in it, where that is four words or more; no quotation marks. There the letters "to"
    go from "total" as well."""
    text = text[_PREAMBLE.match(text).end() :]  # type: ignore[union-attr]
    line = text.strip().split("\n")[0]
    quoted = _QUOTED.search(line)
    if quoted is not None and len(quoted[1].split()) > 3:
        line = quoted[1]
    return line.replace('"', "").strip()


@torch.no_grad()
def edits(
    model: ShipModel,
    shown: Sequence[Examples],
    texts: Sequence[str],
    num_edits: int,
    latent_WZ: Tensor | None = None,
) -> list[list[str]]:
    """For each text its `num_edits` most likely changes of one token, by what the decoder would
    rather have written there.

    Args:
        model: holds the decoder.
        shown: a view of the examples for each text.
        texts: to be changed.
        num_edits: of each text.
        latent_WZ: see `stream_after`.
    """
    prompts, num_soft = model.decoder_prompts, model.config.decoder.num_soft_tokens
    targets = [prompts.target(text) for text in texts]
    ids = [prompts.decoder_prompt(view) for view in shown]
    changes: list[list[str]] = [[] for _ in texts]
    lm = model.decoder.language_model
    batches = scored_batches(lm, ids, targets, prompts.pad_id, model.device, num_soft)
    for chunk, batch in batches:
        latents = None if latent_WZ is None else latent_WZ[chunk]
        logits_KV, _ = model.decoder.score(*latents_beside(model, len(chunk), latents), batch)
        for row, one_KV in zip(chunk, logits_KV.split(batch.target_lengths), strict=True):
            changes[row] = _changes(model, targets[row], one_KV, num_edits)
    return changes


def stream_batches(
    model: ShipModel, shown: Sequence[Examples], rows_per_view: int, max_new_tokens: int
) -> Iterator[list[int]]:
    """Views whose rows go into one stream, the longest first.

    Args:
        model: holds the decoder.
        shown: the examples of each view.
        rows_per_view: how many texts grow from each view at once.
        max_new_tokens: of a text.

    Yields:
        Which views, as places in `shown`.
    """
    num_soft = model.config.decoder.num_soft_tokens
    widths = [num_soft + len(model.decoder_prompts.decoder_prompt(view)) for view in shown]
    costs = model.decoder.language_model.costs
    return budget.row_batches(
        widths,
        budget.bytes_free(model.device),
        lambda width: (
            rows_per_view * costs.decoded_row(width, max_new_tokens, chooses_greedily=False)
        ),
    )


def _changes(
    model: ShipModel, target: Sequence[int], logits_KV: Tensor, num_edits: int
) -> list[str]:
    """Single-token substitutions by falling log-probability ratio; the end of sequence is neither
    changed nor written."""
    log_probs_KV = logits_KV[:-1].float().log_softmax(-1)
    written_K = torch.tensor(target[:-1], device=log_probs_KV.device)
    gain_KV = log_probs_KV - log_probs_KV.gather(1, written_K[:, None])
    gain_KV.scatter_(1, written_K[:, None], -torch.inf)
    gain_KV[:, model.decoder_prompts.eos_id] = -torch.inf
    best = gain_KV.flatten().topk(min(num_edits, gain_KV.numel())).indices.tolist()
    changes = (divmod(place, gain_KV.shape[1]) for place in best)
    return [_text(model, [*target[:i], token, *target[i + 1 :]]) for i, token in changes]


def splices(
    model: ShipModel, texts: Sequence[str], count: int, max_tokens: int, excluded: Container[str]
) -> list[str]:
    """Texts that begin as one of `texts` and, from a token that both have, go on as another
    (one-point crossover).

    Args:
        model: knows the decoder's tokens.
        texts: best first; splices of the best ones come first, a few of each two.
        count: of splices, at most.
        max_tokens: of a splice, which has fewer.
        excluded: texts that are left out, such as those tried before.
    """
    targets = [model.decoder_prompts.target(text)[:-1] for text in texts]
    spliced: dict[str, None] = {}
    for first, second in sorted(
        itertools.permutations(targets, 2), key=lambda pair: sum(map(targets.index, pair))
    ):
        if len(spliced) >= count:
            break
        new = (_text(model, tokens) for tokens in _crossovers(first, second, max_tokens))
        spliced |= {text: None for text in new if text and text not in excluded}
    return list(spliced)[:count]


def _crossovers(
    first: Sequence[int], second: Sequence[int], max_tokens: int
) -> Iterator[tuple[int, ...]]:
    """Beginnings of the first that go on as the second from a token that both have."""
    cuts = (
        (i, j)
        for i, j in itertools.product(range(1, len(first)), range(1, len(second)))
        if first[i] == second[j] and i + len(second) - j < max_tokens
    )
    return ((*first[:i], *second[j:]) for i, j in itertools.islice(cuts, _CUTS))


def _text(model: ShipModel, tokens: Sequence[int]) -> str:
    return model.decoder_prompts.text(tokens)
