"""The bank of known instructions: every rule that training saw (and what follows from them by
analogy), its latent, and the search for those that fit examples.

Scoring each known adapter on each task's examples costs a forward per pair, so a shortlist comes
first: by the loss of one example under every adapter, or, far cheaper, by a walk that starts where
the decoder finds known instructions likely, given the examples. A beam over the tree of them all
(`TokenTrie` of model/search.py) finds these without reading most. Where people wrote the examples,
their words alone make a better one (example_index.py).

Letters: C candidates, M examples of a task, T tasks, Z latent size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ship_ds.inference.analogies import analogies, share_in_slots
from ship_ds.inference.example_index import ExampleIndex
from ship_ds.inference.latent_graph import LatentGraph
from ship_ds.inference.proposals import stream_after, stream_batches
from ship_ds.inference.scoring import Examples, fit_of_latents
from ship_ds.model.search import TokenTrie, likeliest_known
from ship_ds.model.ship import ShipModel
from ship_ds.monitor.progress import ProgressLine

_NUM_SEEDS, _NUM_NEIGHBOURS, _NUM_HOPS = 32, 8, 5
"""Of the walk: evenly spread starts, how far a hop sees, how many hops."""


@dataclass(frozen=True)
class Walk:
    """How thoroughly a bank is searched.

    Of 33 dev rules of the quickstart whose instruction is in the bank or follows by analogy
    (`Bank.with_analogies`, 2,198 instructions), the shortlist of 24 has 27 after `BRIEF` (0.19 s a
    task on two cores) and 31 after `THOROUGH` (0.36 s).

    Args:
        num_tried: examples that an adapter is tried on.
        num_likely: starts that the decoder finds; 0: it is not asked.
        num_kept: best of those tried, whose neighbours are tried next.
    """

    num_tried: int
    num_likely: int
    num_kept: int


BRIEF = Walk(1, 32, 6)
THOROUGH = Walk(2, 64, 12)


@dataclass(frozen=True)
class Bank:
    """Known instructions with their latents.

    Args:
        instructions: one wording of each known rule.
        latent_CZ: their posterior means.
        log_variance_CZ: of these posteriors.
        index: the examples of their tasks by words, where they are known.
    """

    instructions: tuple[str, ...]
    latent_CZ: Tensor
    log_variance_CZ: Tensor
    index: ExampleIndex | None = field(default=None, repr=False, compare=False)
    _with_analogies: list["Bank"] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @classmethod
    def build(cls, model: ShipModel, instructions: Sequence[str]) -> "Bank":
        """Encode the instructions, each once, as many at a time as there is room for; hundreds take
        a base of 135 million weights minutes on a CPU, and standard error says how far it is."""
        unique = tuple(dict.fromkeys(instructions))
        with ProgressLine("encoding", len(unique), "instruction", quiet_seconds=10) as progress:
            posterior = model.posterior(unique, progress.done)
        return cls(unique, posterior.mean_TZ, posterior.log_variance_TZ)

    def __len__(self) -> int:
        """How many instructions are known."""
        return len(self.instructions)

    @cached_property
    def graph(self) -> LatentGraph:
        """Which instructions lie near which."""
        return LatentGraph(self.latent_CZ, _NUM_NEIGHBOURS)

    @cached_property
    def share_in_slots(self) -> float:
        """How far the texts are made by a grammar (`analogies.share_in_slots`); 1 where none is
        known, as nothing then speaks against it."""
        return share_in_slots(self.instructions) if self.instructions else 1.0

    def with_analogies(self, model: ShipModel) -> "Bank":
        """The same instructions and, after them, what follows from them by analogy; encoded
        once."""
        if not self._with_analogies:
            new = Bank.build(model, analogies(self.instructions))
            # An empty bank's tensors are on the CPU.
            latents, log_variances = (
                torch.cat([one, other.to(one.device)])
                for one, other in (
                    (self.latent_CZ, new.latent_CZ),
                    (self.log_variance_CZ, new.log_variance_CZ),
                )
            )
            larger = Bank((*self.instructions, *new.instructions), latents, log_variances)
            self._with_analogies.append(larger)
        return self._with_analogies[0]

    def with_index(self, index: ExampleIndex) -> "Bank":
        """The same instructions, to be found by their tasks' examples too; an index of some of
        them."""
        return replace(self, index=index)

    def shortlist_of_all(
        self, model: ShipModel, tasks: Sequence[Examples], count: int
    ) -> list[list[int]]:
        """As `shortlist`, but by the loss of the first example under every known adapter: nothing
        is missed, at several times the cost.

        Args:
            model: makes adapters and answers.
            tasks: the examples of each.
            count: of a shortlist.

        Returns:
            Numbers of known instructions, one row a task, best first.
        """
        # One forward tries an adapter on the first example of every task.
        first = [[task[0] for task in tasks]] * len(self)
        losses_CT = fit_of_latents(model, self.latent_CZ, self.instructions, first).loss_CM
        best: list[list[int]] = losses_CT.T.topk(
            min(count, len(self)), largest=False
        ).indices.tolist()
        return best

    def shortlist(
        self,
        model: ShipModel,
        tasks: Sequence[Examples],
        count: int,
        walk: Walk = BRIEF,
    ) -> list[list[int]]:
        """The known instructions whose adapters explain each task's first examples best.

        A best-first walk over the graph of nearest latents: a few hundred adapters a task are tried
        instead of all.

        Args:
            model: answers the examples.
            tasks: the examples of each, equally many.
            count: of instructions, about.
            walk: how thoroughly to search.

        Returns:
            For each task indices into `instructions`, best first. Where no more than `count` are
            known it is all of them, untried, in the bank's order.
        """
        if len(self) <= count:
            return [list(range(len(self))) for _ in tasks]
        tried = [task[: walk.num_tried] for task in tasks]
        losses: list[dict[int, float]] = [{} for _ in tasks]
        frontiers = self._starts(model, tasks, walk)
        for _ in range(_NUM_HOPS):
            untried = [
                (t, c)
                for t, frontier in enumerate(frontiers)
                for c in sorted(frontier - losses[t].keys())
            ]
            if not untried:
                break
            for (t, c), loss in zip(untried, self._try(model, tried, untried), strict=True):
                losses[t][c] = loss
            frontiers = [
                self._neighbours(_best(losses_of_task, walk.num_kept)) for losses_of_task in losses
            ]
        return [_best(losses_of_task, count) for losses_of_task in losses]

    def _starts(self, model: ShipModel, tasks: Sequence[Examples], walk: Walk) -> list[set[int]]:
        """Evenly spread instructions, and those that the decoder finds likeliest; all of them where
        that is most of the bank: to look for the likeliest would cost more than to try the rest."""
        if len(self) <= _NUM_SEEDS + walk.num_likely:
            return [set(range(len(self))) for _ in tasks]
        seeds = self.graph.spread(_NUM_SEEDS)
        max_examples = model.config.decoder.max_examples
        if not max_examples or not walk.num_likely:
            return [set(seeds) for _ in tasks]
        shown = [task[:max_examples] for task in tasks]
        likely = self.shortlist_by_decoder(model, shown, min(walk.num_likely, len(self)))
        return [{*seeds, *likely_for_task} for likely_for_task in likely]

    def _try(
        self, model: ShipModel, tasks: Sequence[Examples], pairs: Sequence[tuple[int, int]]
    ) -> list[float]:
        """The loss of each (task, instruction): of the task's examples under the instruction's
        adapter, in nats."""
        latent_CZ = self.latent_CZ[[c for _, c in pairs]]
        texts, examples = [self.instructions[c] for _, c in pairs], [tasks[t] for t, _ in pairs]
        losses: list[float] = (
            fit_of_latents(model, latent_CZ, texts, examples).loss_CM.sum(1).tolist()
        )
        return losses

    def _neighbours(self, instructions: Sequence[int]) -> set[int]:
        return {near for c in instructions for near in self.graph.neighbours[c]}

    def shortlist_read(
        self, model: ShipModel, views: Sequence[Sequence[Examples]], count: int
    ) -> list[list[int]]:
        """The known instructions that the decoder finds likeliest after reading each task's views,
        those of all views in turn: no adapter is tried, which costs more than all else where the
        Task LLM is large.

        Args:
            model: holds a decoder that reads examples.
            views: of each task's examples.
            count: of instructions a task.
        """
        flat = [view for views_of_task in views for view in views_of_task]
        read = iter(self.shortlist_by_decoder(model, flat, min(count, len(self))))
        merged = []
        for views_of_task in views:
            by_rank = zip(*(next(read) for _ in views_of_task), strict=True)
            merged.append(list(dict.fromkeys(c for rank in by_rank for c in rank))[:count])
        return merged

    def nearest(self, latent_CZ: Tensor, count: int) -> list[list[int]]:
        """The known instructions whose latents are nearest to each of these, nearest first."""
        distances = torch.cdist(latent_CZ.to(self.latent_CZ.device), self.latent_CZ)
        rows: list[list[int]] = distances.topk(
            min(count, len(self)), largest=False
        ).indices.tolist()
        return rows

    @torch.no_grad()
    def shortlist_by_decoder(
        self, model: ShipModel, shown: Sequence[Examples], count: int
    ) -> list[list[int]]:
        """For each view of examples the known instructions that the decoder finds likeliest.

        Args:
            model: whose decoder scores them.
            shown: views of examples.
            count: of a shortlist.

        Returns:
            Numbers of known instructions, one row a view, best first.
        """
        trie = TokenTrie([model.decoder_prompts.target(text) for text in self.instructions])
        shortlists: list[list[int]] = [[] for _ in shown]
        for chunk in stream_batches(model, shown, count, trie.longest):
            stream = stream_after(model, [shown[view] for view in chunk], None)
            for view, beams in zip(chunk, likeliest_known(stream, trie, count), strict=True):
                shortlists[view] = [trie.index(beam.tokens) for beam in beams]
        return shortlists


def _best(losses: dict[int, float], count: int) -> list[int]:
    """The instructions with the lowest losses, lowest first; of equal ones the one tried first."""
    return sorted(losses, key=losses.__getitem__)[:count]
