"""The bank of known instructions: every rule that training saw (and what follows from them by
analogy), its latent, and the search for those that fit examples.

Scoring each known adapter on each task's examples costs a forward per pair, so a shortlist comes
first: by the loss of one example under every adapter, or, far cheaper, by the decoder's likelihood
of each known instruction given the examples, which a beam over the tree of all of them finds
without reading most.

Letters: C known instructions, T tasks, M examples, Z latent, B beams.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ship_ds.inference.analogies import analogies
from ship_ds.inference.proposals import read
from ship_ds.inference.scoring import Examples, fit_of_latents
from ship_ds.model.search import TokenTrie, likeliest_known
from ship_ds.model.ship import ShipModel

_ENCODED_AT_ONCE = 256
_TASKS_AT_ONCE = 8
_SEEDS, _NEIGHBOURS, _HOPS = 32, 8, 5
"""Of the walk: evenly spread starts, how far a step sees, how many steps."""


@dataclass(frozen=True)
class Walk:
    """How thoroughly a bank is searched: examples an adapter is tried on, starts that the decoder
    finds, how many go on.

    Of 33 dev rules of the quickstart whose instruction is in the bank or follows by analogy
    (`Bank.with_analogies`, 2,198 instructions), the shortlist of 24 has 27 after `BRIEF` (0.19 s a
    task on two cores) and 31 after `THOROUGH` (0.36 s).
    """

    num_tried: int
    num_likely: int
    num_kept: int


BRIEF = Walk(1, 32, 6)
THOROUGH = Walk(2, 64, 12)


@dataclass(frozen=True)
class Bank:
    """instructions: one wording of each known rule; latent_CZ: their posterior means."""

    instructions: tuple[str, ...]
    latent_CZ: Tensor
    _wider: list["Bank"] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def build(cls, model: ShipModel, instructions: Sequence[str]) -> "Bank":
        unique = tuple(dict.fromkeys(instructions))
        return cls(unique, encode_all(model, unique))

    def __len__(self) -> int:
        return len(self.instructions)

    def with_analogies(self, model: ShipModel) -> "Bank":
        """The same instructions and, after them, what follows from them by analogy; encoded
        once."""
        if not self._wider:
            self._wider.append(
                Bank.build(model, (*self.instructions, *analogies(self.instructions)))
            )
        return self._wider[0]

    def shortlist_of_all(
        self, model: ShipModel, tasks: Sequence[Examples], count: int
    ) -> list[list[int]]:
        """As `shortlist`, but by the loss of the first example under every known adapter: nothing
        is missed, at several times the cost."""
        first = [task[0] for task in tasks]
        losses_CT = fit_of_latents(
            model, self.latent_CZ, self.instructions, [first] * len(self)
        ).loss_CM
        return losses_CT.T.topk(min(count, len(self)), largest=False).indices.tolist()

    def shortlist(
        self,
        model: ShipModel,
        tasks: Sequence[Examples],
        count: int,
        barred: Sequence[int] | None = None,
        walk: Walk = BRIEF,
    ) -> list[list[int]]:
        """For each task about `count` known instructions whose adapters explain its first examples
        best, best first.

        A best-first walk over the graph of nearest latents, from evenly spread instructions and
        from what the decoder finds
        likeliest: a few hundred pairs a task instead of all. Where no more than `count` are known
        it is all of them, as they stand in the bank. barred: for each task one that may not be
        found, or -1.
        """
        if len(self) <= count:
            return [
                [c for c in range(len(self)) if c != index] for index in barred or [-1] * len(tasks)
            ]
        num_seeds = min(_SEEDS, len(self))
        seeds = self._spread(num_seeds)
        found: list[dict[int, float]] = [{} for _ in tasks]
        frontier = [set(seeds) for _ in tasks]
        if model.config.decoder.max_examples:
            shown = [task[: model.config.decoder.max_examples] for task in tasks]
            likely = self.shortlist_by_decoder(model, shown, min(walk.num_likely, len(self)))
            for own, found_by_decoder in zip(frontier, likely, strict=True):
                own.update(found_by_decoder)
        neighbours_CB = self._neighbours()
        tried = [task[: walk.num_tried] for task in tasks]
        for _ in range(_HOPS):
            pairs = [
                (t, c) for t, own in enumerate(frontier) for c in sorted(own - found[t].keys())
            ]
            if not pairs:
                break
            for (t, c), loss in zip(pairs, self._losses(model, tried, pairs), strict=True):
                found[t][c] = loss
            best = [sorted(own, key=own.__getitem__)[: walk.num_kept] for own in found]
            frontier = [{n for c in own for n in neighbours_CB[c]} for own in best]
        for losses, index in zip(found, barred or [-1] * len(tasks), strict=True):
            losses.pop(index, None)
        return [sorted(losses, key=losses.__getitem__)[:count] for losses in found]

    def _losses(
        self, model: ShipModel, tasks: Sequence[Examples], pairs: Sequence[tuple[int, int]]
    ) -> list[float]:
        latent_CZ = self.latent_CZ[[c for _, c in pairs]]
        texts, examples = [self.instructions[c] for _, c in pairs], [tasks[t] for t, _ in pairs]
        return fit_of_latents(model, latent_CZ, texts, examples).loss_CM.sum(1).tolist()

    def _spread(self, count: int) -> list[int]:
        """Instructions far from one another: each next one is the farthest from those before
        (Gonzalez 1985)."""
        chosen = [0]
        distance_C = torch.full((len(self),), torch.inf)
        while len(chosen) < count:
            distance_C = torch.minimum(
                distance_C,
                (self.latent_CZ.cpu() - self.latent_CZ[chosen[-1]].cpu()).square().sum(1),
            )
            chosen.append(int(distance_C.argmax()))
        return chosen

    def _neighbours(self) -> list[list[int]]:
        """The nearest latents of each, itself among them."""
        return (
            torch.cdist(self.latent_CZ, self.latent_CZ)
            .topk(min(_NEIGHBOURS, len(self)), largest=False)
            .indices.tolist()
        )

    @torch.no_grad()
    def shortlist_by_decoder(
        self, model: ShipModel, shown: Sequence[Examples], count: int
    ) -> list[list[int]]:
        """For each view of examples the known instructions that the decoder finds likeliest, best
        first."""
        trie = TokenTrie([model.decoder_prompts.target(text) for text in self.instructions])
        beams = [
            beams_of_view
            for start in range(0, len(shown), _TASKS_AT_ONCE)
            for beams_of_view in likeliest_known(
                read(model, shown[start : start + _TASKS_AT_ONCE], None), trie, count
            )
        ]
        return [[trie.index(beam.tokens) for beam in beams_of_view] for beams_of_view in beams]


def encode_all(model: ShipModel, instructions: Sequence[str]) -> Tensor:
    """Posterior means (C, Z), a few hundred at a time."""
    if not instructions:
        return torch.zeros(0, model.config.latent_size)
    return torch.cat(
        [
            model.encode(instructions[start : start + _ENCODED_AT_ONCE])
            for start in range(0, len(instructions), _ENCODED_AT_ONCE)
        ]
    )
