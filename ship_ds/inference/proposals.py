"""Instructions that the decoder proposes from examples, with z beside them or without; and changes
of such texts.

The decoder was trained on at most `model.decoder.max_examples` examples, in any order. When more
are given it reads several
views: random subsets in random order. Every random choice is keyed, so a task's proposals do not
depend on its batch.

Letters: W views, K samples a view, N new tokens, Z latent.
"""

import hashlib
import itertools
import random
from collections.abc import Container, Sequence

import torch
from torch import Tensor

from ship_ds.data.task import Example
from ship_ds.model.batch import TokenBatch
from ship_ds.model.generation import sample
from ship_ds.model.language_model import Stream
from ship_ds.model.search import beam_search
from ship_ds.model.ship import ShipModel

Examples = Sequence[Example]
_ROWS = 512
"""Rows a stream: the cache of more does not pay."""
_CUTS = 12
"""Places at which two texts are spliced, at most."""


def key_of(*parts: object) -> int:
    """A seed from anything that names a draw."""
    return (
        int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "little")
        >> 1
    )


def views(examples: Examples, max_examples: int, count: int, key: int) -> list[tuple[Example, ...]]:
    """`count` orders of `max_examples` of the examples; the distinct subsets come first."""
    rng = random.Random(key)
    size = min(max_examples, len(examples))
    drawn: list[tuple[Example, ...]] = []
    subsets: set[frozenset[int]] = set()
    for _ in range(20 * count):
        picked = rng.sample(range(len(examples)), size)
        if frozenset(picked) not in subsets:
            subsets.add(frozenset(picked))
            drawn.append(tuple(examples[i] for i in picked))
    while len(drawn) < count:
        drawn.append(tuple(rng.sample(examples, size)))
    return drawn[:count]


def read(model: ShipModel, shown: Sequence[Examples], latent_WZ: Tensor | None) -> Stream:
    """The decoder after reading each view, about to write the instruction; no latents: its learned
    tokens in their place."""
    prompts = model.decoder_prompts
    ids = [prompts.decoder_prompt(view) for view in shown]
    batch = TokenBatch.build(
        ids, None, prompts.pad_id, model.config.decoder.num_soft_tokens, model.device
    )
    latent_WZ, shows_latent_W = _beside(model, len(shown), latent_WZ)
    return model.decoder.stream(latent_WZ, shows_latent_W, batch)


def _beside(model: ShipModel, num_views: int, latent_WZ: Tensor | None) -> tuple[Tensor, Tensor]:
    """The latents beside the views, zeros where there are none, and whether the decoder reads
    them."""
    shows_latent_W = torch.full((num_views,), latent_WZ is not None, device=model.device)
    latent_WZ = torch.zeros(num_views, model.config.latent_size) if latent_WZ is None else latent_WZ
    return latent_WZ.to(model.device), shows_latent_W


def sampled(
    model: ShipModel,
    shown: Sequence[Examples],
    latent_WZ: Tensor | None,
    num_samples: int,
    temperature: float,
    keys: Sequence[int],
    max_new_tokens: int,
) -> list[list[str]]:
    """`num_samples` instructions from each view, whose draws its key settles; those that do not end
    are left out."""
    prompts, texts = model.decoder_prompts, []
    step = max(1, _ROWS // num_samples)
    for start in range(0, len(shown), step):
        chunk = slice(start, start + step)
        stream = read(model, shown[chunk], None if latent_WZ is None else latent_WZ[chunk])
        stream.select(
            torch.arange(len(shown[chunk]), device=model.device).repeat_interleave(num_samples)
        )
        uniform = torch.cat(
            [
                torch.rand(
                    num_samples, max_new_tokens, generator=torch.Generator().manual_seed(key)
                )
                for key in keys[chunk]
            ]
        )
        rows = sample(stream, uniform, temperature, prompts.eos_id)
        texts += [
            [_text(model, row) for row in rows[i : i + num_samples] if row[-1] == prompts.eos_id]
            for i in range(0, len(rows), num_samples)
        ]
    return texts


def beams(
    model: ShipModel,
    shown: Sequence[Examples],
    latent_WZ: Tensor | None,
    num_beams: int,
    max_new_tokens: int,
) -> list[list[str]]:
    """The `num_beams` best instructions by the decoder's own likelihood from each view, best
    first."""
    texts, eos_id = [], model.decoder_prompts.eos_id
    step = max(1, _ROWS // num_beams)
    for start in range(0, len(shown), step):
        chunk = slice(start, start + step)
        stream = read(model, shown[chunk], None if latent_WZ is None else latent_WZ[chunk])
        for found in beam_search(stream, num_beams, eos_id, max_new_tokens):
            texts.append([_text(model, beam.tokens) for beam in found if beam.tokens[-1] == eos_id])
    return texts


@torch.no_grad()
def edits(
    model: ShipModel,
    shown: Sequence[Examples],
    texts: Sequence[str],
    num_edits: int,
    latent_WZ: Tensor | None = None,
) -> list[list[str]]:
    """For each text its `num_edits` most likely changes of one token, by what the decoder would
    rather have written there."""
    prompts, found = model.decoder_prompts, []
    for start in range(0, len(texts), _ROWS // 4):
        chunk = slice(start, start + _ROWS // 4)
        targets = [prompts.target(text) for text in texts[chunk]]
        ids = [prompts.decoder_prompt(view) for view in shown[chunk]]
        batch = TokenBatch.build(
            ids, targets, prompts.pad_id, model.config.decoder.num_soft_tokens, model.device
        )
        beside = _beside(model, len(ids), None if latent_WZ is None else latent_WZ[chunk])
        logits, _ = model.decoder(*beside, batch)
        for target, own_NV in zip(targets, logits.split(batch.target_lengths), strict=True):
            found.append(_changes(model, target, own_NV, num_edits))
    return found


def _changes(
    model: ShipModel, target: Sequence[int], logits_NV: Tensor, num_edits: int
) -> list[str]:
    """Single-token substitutions by falling log-probability ratio; the end of sequence is neither
    changed nor written."""
    log_probs_NV = logits_NV[:-1].float().log_softmax(-1)
    own_N = torch.tensor(target[:-1], device=log_probs_NV.device)
    gain_NV = log_probs_NV - log_probs_NV.gather(1, own_N[:, None])
    gain_NV.scatter_(1, own_N[:, None], -torch.inf)
    gain_NV[:, model.decoder_prompts.eos_id] = -torch.inf
    best = gain_NV.flatten().topk(min(num_edits, gain_NV.numel())).indices.tolist()
    width = gain_NV.shape[1]
    return [
        _text(model, [*target[: i // width], i % width, *target[i // width + 1 :]]) for i in best
    ]


def splices(
    model: ShipModel, texts: Sequence[str], count: int, max_tokens: int, known: Container[str]
) -> list[str]:
    """`count` texts that begin as one of `texts` and, from a token that both have, go on as another
    (one-point crossover).

    texts: best first; splices of the best ones come first, a few of each two. known: texts that are
    not wanted again.
    """
    targets = [model.decoder_prompts.target(text)[:-1] for text in texts]
    found: dict[str, None] = {}
    for first, second in sorted(
        itertools.permutations(targets, 2), key=lambda pair: sum(map(targets.index, pair))
    ):
        if len(found) >= count:
            break
        cuts = (
            (i, j)
            for i, j in itertools.product(range(1, len(first)), range(1, len(second)))
            if first[i] == second[j] and i + len(second) - j < max_tokens
        )
        spliced = (
            _text(model, (*first[:i], *second[j:])) for i, j in itertools.islice(cuts, _CUTS)
        )
        found |= {text: None for text in spliced if text and text not in known}
    return list(found)[:count]


def _text(model: ShipModel, tokens: Sequence[int]) -> str:
    return model.decoder_prompts.text(tokens)
