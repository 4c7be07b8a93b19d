"""Testing proposed instructions on a task's examples, in four stages:

    proposals      unique_new_trials   screen        keep_finalists   test_on_rest
    "add 3"        "add 3"             2 right       "add 3"          5 right -> candidate
    "sort"         "sort"              0 right
    "add 3"

Letters: C candidates, M examples of a task, Z latent size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ship_ds.inference.config import InductionConfig
from ship_ds.inference.results import Candidate, score
from ship_ds.inference.scoring import Fit, fit_in_prompt, fit_of_latents
from ship_ds.inference.search_state import Proposal, ScreeningScore, SearchState
from ship_ds.model.encoder import Encoded
from ship_ds.model.ship import ShipModel


@dataclass(frozen=True, eq=False)
class Trial:
    """A text to be tested for a task.

    Args:
        search: the task.
        text: the instruction.
        origin: who proposed it first.
        latent_Z: the mean of its posterior.
        read: the text as the encoder read it, for an adapter that fuses it; None: it is read again
            for one.
    """

    search: SearchState
    text: str
    origin: str
    latent_Z: Tensor
    read: Encoded | None = None


@dataclass(frozen=True, eq=False)
class TrialTable:
    """Trials and how each explains the same number of its task's examples; row C of every column is
    trial C.

    Args:
        trials: the rows, those of a task together.
        encoded: the fit of the texts' adapters.
        in_prompt: the fit of the texts in the prompt; None where that is not tried.
    """

    trials: tuple[Trial, ...]
    encoded: Fit
    in_prompt: Fit | None

    @classmethod
    def measure(
        cls, model: ShipModel, trials: Sequence[Trial], examples: slice, in_prompt: bool = True
    ) -> "TrialTable":
        """Try each on these of its task's examples.

        Args:
            model: with its trained weights.
            trials: at least one.
            examples: which of a task's examples, equally many for all.
            in_prompt: whether the text is tried in the prompt as well.
        """
        latent_CZ = torch.stack([trial.latent_Z for trial in trials])
        texts = [trial.text for trial in trials]
        given = [trial.search.examples[examples] for trial in trials]
        read = [trial.read or trial.text for trial in trials]
        encoded = fit_of_latents(model, latent_CZ, texts, given, read)
        stated = fit_in_prompt(model, texts, given) if in_prompt else None
        return cls(tuple(trials), encoded, stated)

    @property
    def _fits(self) -> list[Fit]:
        return [self.encoded] if self.in_prompt is None else [self.encoded, self.in_prompt]

    @property
    def num_right_C(self) -> Tensor:
        """Exact answers, both ways together."""
        return torch.stack([fit.right_CM.sum(1) for fit in self._fits]).sum(0)

    @property
    def loss_C(self) -> Tensor:
        """Nats, both ways together."""
        return torch.stack([fit.loss_CM.sum(1) for fit in self._fits]).sum(0)

    @property
    def scores(self) -> list[float | None]:
        """Of each trial (`results.score`); None of a task whose examples are not compared with
        those of known tasks."""
        return [self._score(row, trial) for row, trial in enumerate(self.trials)]

    def _score(self, row: int, trial: Trial) -> float | None:
        search = trial.search
        if search.resemblance is None:
            return None
        right_M = torch.stack([fit.right_CM[row].float() for fit in self._fits]).mean(0)
        loss_M = torch.stack([fit.loss_CM[row] for fit in self._fits]).mean(0)
        # A long target is not to weigh more than a short one.
        loss_M = loss_M / torch.tensor(search.num_tokens[: len(loss_M)])
        alike = search.resemblance.get(trial.text, 0.0)
        return score(alike, float(right_M.mean()), float(loss_M.mean()))

    def rows(self, index: Sequence[int]) -> "TrialTable":
        """Some of the trials, in this order."""
        index_C = torch.tensor(index)
        trials = tuple(self.trials[row] for row in index)
        stated = self.in_prompt.rows(index_C) if self.in_prompt else None
        return TrialTable(trials, self.encoded.rows(index_C), stated)

    def beside(self, other: "TrialTable") -> "TrialTable":
        """The same trials on the examples of both tables."""
        stated = self.in_prompt
        if stated and other.in_prompt:
            stated = stated.beside(other.in_prompt)
        return TrialTable(self.trials, self.encoded.beside(other.encoded), stated)

    def candidates(self) -> list[Candidate]:
        """One a trial."""
        return [
            Candidate(
                trial.text,
                int(self.encoded.right_CM[row].sum()),
                float(self.encoded.loss_CM[row].mean()),
                int(self.in_prompt.right_CM[row].sum()) if self.in_prompt else None,
                float(self.in_prompt.loss_CM[row].mean()) if self.in_prompt else None,
                tuple(trial.latent_Z.tolist()),
                trial.origin,
                score_of_row,
            )
            for row, (trial, score_of_row) in enumerate(zip(self.trials, self.scores, strict=True))
        ]


def test_proposals(
    model: ShipModel,
    searches: Sequence[SearchState],
    proposals: Sequence[Proposal],
    config: InductionConfig,
) -> None:
    """Put the best of the proposals among their tasks' tested candidates.

    Args:
        model: answers the examples.
        searches: tasks with equally many examples.
        proposals: for these tasks.
        config: how many are kept.
    """
    trials = unique_new_trials(model, searches, proposals)
    if not trials:
        return
    in_prompt = config.ranks_in_prompt
    table = screen(model, trials, config.num_screened, in_prompt)
    del trials  # and with those that end here the states that were kept of them
    table = keep_finalists(table, config.num_finalists)
    table = test_on_rest(model, table, config.num_screened, in_prompt)
    for trial, candidate in zip(table.trials, table.candidates(), strict=True):
        trial.search.tested[trial.text] = candidate


def unique_new_trials(
    model: ShipModel, searches: Sequence[SearchState], proposals: Sequence[Proposal]
) -> list[Trial]:
    """Each task's texts once, under the origin that came first, without those tested before.

    Why: testing a text is what costs, and several origins propose the same one.

    Args:
        model: encodes the texts; where z alone makes an adapter, those whose latent no proposal
            has.
        searches: the tasks, with what was tested before.
        proposals: for these tasks.

    Returns:
        The trials of all tasks, those of a task together.
    """
    unique = [
        proposal
        for search in searches
        for proposal in _first_of_each_text([p for p in proposals if p.search is search])
        if proposal.text and proposal.text not in search.tested
    ]
    # Tasks share texts too: each is encoded once for all of them, and a known one not at all,
    # unless its adapter is made of more than its latent.
    latents = {one.text: one.latent_Z for one in proposals if one.latent_Z is not None}
    known = () if model.hypernetwork.fuses else latents
    texts = list(dict.fromkeys(one.text for one in unique if one.text not in known))
    read = dict(zip(texts, model.read_once(texts), strict=True))
    latents = {text: one.mean_Z for text, one in read.items()} | latents
    return [
        Trial(one.search, one.text, one.origin, latents[one.text], read.get(one.text))
        for one in unique
    ]


def _first_of_each_text(proposals: Sequence[Proposal]) -> Iterable[Proposal]:
    """The first proposal of each text, in the order in which the texts come up from behind.

    Why that order: it decides which of two equal candidates is kept and with which others a trial
    shares its batch, and with it the last bits of a loss; so results stay those of version 0.1.0.
    """
    first: dict[str, Proposal] = {}
    for proposal in proposals:
        first.setdefault(proposal.text, proposal)
    return (first[text] for text in dict.fromkeys(p.text for p in reversed(proposals)))


def screen(
    model: ShipModel, trials: Sequence[Trial], num_examples: int, in_prompt: bool = True
) -> TrialTable:
    """Try every trial on the first few examples, and remember how it did.

    Why: most texts fail on one or two, so the others need not be paid for; and what did best here
    is spliced later, tested in full or not.

    Args:
        model: with its trained weights.
        trials: of all tasks.
        num_examples: that each is tried on.
        in_prompt: whether the text is tried in the prompt as well.
    """
    table = TrialTable.measure(model, trials, slice(0, num_examples), in_prompt)
    scores = zip(trials, table.num_right_C.tolist(), table.loss_C.tolist(), strict=True)
    for trial, num_right, loss in scores:
        trial.search.screened[trial.text] = ScreeningScore(-num_right, loss)
    return table


def keep_finalists(table: TrialTable, count: int) -> TrialTable:
    """The best `count` trials of each task by their screening: by their scores, where they have
    some, as the best is chosen in the end.

    Why a task at a time: an easy task's many good texts must not push out a hard one's best.
    """
    rows_by_task: dict[SearchState, list[int]] = {}
    for row, trial in enumerate(table.trials):
        rows_by_task.setdefault(trial.search, []).append(row)

    scores = table.scores

    def rank(row: int) -> tuple[float, float]:
        trial, score_of_row = table.trials[row], scores[row]
        screened = trial.search.screened[trial.text]
        return screened if score_of_row is None else (-score_of_row, screened.loss)

    best = (sorted(rows, key=rank)[:count] for rows in rows_by_task.values())
    return table.rows(list(chain.from_iterable(best)))


def test_on_rest(
    model: ShipModel, table: TrialTable, num_screened: int, in_prompt: bool = True
) -> TrialTable:
    """The finalists on all examples: those that screening has left are added.

    Why not all over again: what was measured while screening holds.

    Args:
        model: with its trained weights.
        table: the finalists on the examples of the screening.
        num_screened: how many these are.
        in_prompt: as in the screening.
    """
    if len(table.trials[0].search.examples) <= num_screened:
        return table
    rest = TrialTable.measure(model, table.trials, slice(num_screened, None), in_prompt)
    return table.beside(rest)
