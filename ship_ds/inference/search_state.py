"""What induction knows of one task while it searches, and the rows that enter and leave the search.

    examples -> Proposal(search, "add 3", "sampled") -> tested -> search.tested["add 3"]
             -> descent -> DescentResult             -> decoded -> Proposal(..., "refined")

Letters: Z latent size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.inference.results import Candidate, Induction


class ScreeningScore(NamedTuple):
    """How a text did on the first few examples, both ways of using it together; less is better."""

    num_right_negated: float
    loss: float


@dataclass(eq=False)
class SearchState:
    """The search for one task's instruction.

    Args:
        examples: what has to be explained; never changes.
        tested: by text, what was tested on every example.
        screened: by text, everything that was tried on the first few examples.
        descents: where gradient descent ended.
        resemblance: by known instruction, how alike its task's examples are (example_index.py);
            None where that is not compared.
        num_tokens: of each example's target, with its end; empty where that is not compared.
    """

    examples: tuple[Example, ...]
    tested: dict[str, Candidate] = field(default_factory=dict)
    screened: dict[str, ScreeningScore] = field(default_factory=dict)
    descents: list["DescentResult"] = field(default_factory=list)
    resemblance: Mapping[str, float] | None = None
    num_tokens: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """What the task's random draws are keyed by: itself, not its place among others, so that
        the draws are the same in any company and on any number of ranks."""
        return repr(self.examples)

    @property
    def best(self) -> list[Candidate]:
        """The tested candidates, best first."""
        return sorted(self.tested.values(), key=lambda candidate: candidate.rank)

    @property
    def is_explained(self) -> bool:
        """Whether some candidate answers every example."""
        return any(c.most_right == len(self.examples) for c in self.tested.values())

    def parents(self, count: int) -> list[str]:
        """The `count` texts that did best on the first few examples, best first."""

        def rank(text: str) -> tuple[float, float, str]:
            # Losses of the same text differ in their last bits with the batch it was in; rounded,
            # the order does not depend on that.
            score = self.screened[text]
            return score.num_right_negated, round(score.loss, 2), text

        return sorted(self.screened, key=rank)[:count]

    def result(self) -> Induction:
        """The induction so far.

        Raises:
            UserError: nothing was tested.
        """
        best = self.best
        if not best:
            raise UserError(
                "induce: the decoder wrote no instruction that ends; train it longer or use "
                "method bank"
            )
        points = [(c.num_right, c.loss, c.latent, c.instruction) for c in best]
        points += [(d.num_right, d.loss, tuple(d.latent_Z.tolist()), "") for d in self.descents]
        num_right, _, latent, reading = min(points, key=lambda point: (-point[0], point[1]))
        return Induction(
            best[0].instruction, tuple(best), latent, num_right, len(self.examples), reading
        )


class Proposal(NamedTuple):
    """A text that may explain a task's examples, who proposed it, and its posterior's mean where
    that is known already."""

    search: SearchState
    text: str
    origin: str
    latent_Z: Tensor | None = None


@dataclass(frozen=True, eq=False)
class DescentResult:
    """A latent that descent found.

    Args:
        search: the task it is for.
        start: which of the task's starts it comes from, counted from 0.
        latent_Z: the point.
        num_right: examples that its adapter answers exactly.
        loss: of an example in nats, on average.
    """

    search: SearchState
    start: int
    latent_Z: Tensor
    num_right: int
    loss: float
