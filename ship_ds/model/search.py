"""Beam search over a stream: one loop, and scorers that say how beams may go on.

    logits_EV ---scorer---> extensions, best first ---search---> surviving beams ---> the stream
    (of each beam)          "1 4 5" + 9, -0.7                    "1 4 5 9", -0.7      reads them on

Three searches use it:

- `beam_search`: the likeliest continuations of each prompt;
- `vote`: several prompts of one task grow one text, scored by the mean of their log-probabilities;
- `likeliest_known`: the likeliest of known texts, which a `TokenTrie` holds:

      TokenTrie([(5, 8, 1), (5, 9, 1), (6, 1)])       ()
                                                     /  \\
      next_tokens(()) == (5, 6)                     5    6
      next_tokens((5,)) == (8, 9)                  / \\    \\
      next_tokens((5, 8, 1)) == ()                8   9    1 (text 2)
                                           (text 0) 1   1 (text 1)

      beams = likeliest_known(stream, trie, 32)        # stream: prompts read, about to write a text
      [trie.index(beam.tokens) for beam in beams[0]]   # texts of prompt 0, likeliest first

Letters: E sequences, B beams, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from ship_ds.model.language_model import Stream


@dataclass(frozen=True)
class Beam:
    """A text so far.

    Args:
        score: the sum of its tokens' log-probabilities; of a finished one, over its length to the
            power of the length penalty.
        tokens: with the end-of-sequence token, where one was written.
        row: where in the stream it was read: its first row over the rows a beam.
    """

    score: float
    tokens: tuple[int, ...]
    row: int


@dataclass(frozen=True)
class Extension:
    """A beam and a token that may follow. `score`: with it; `ends`: the text is then complete."""

    beam: Beam
    token: int
    score: float
    ends: bool

    def grown(self) -> Beam:
        """The longer beam, in the row of the shorter one."""
        return Beam(self.score, (*self.beam.tokens, self.token), self.beam.row)


Scorer = Callable[[Tensor, Sequence[Sequence[Beam]]], list[list[Extension]]]
"""(logits_EV of the stream, running beams of each search) -> extensions of each, best first."""


@torch.no_grad()
def beam_search(
    stream: Stream,
    num_beams: int,
    eos_id: int,
    max_new_tokens: int,
    other_ends: Sequence[int] = (),
) -> list[list[Beam]]:
    """The `num_beams` best continuations of each prompt, best first.

    Same search and stopping rule as `generate` in transformers 5 with early_stopping=False: a score
    is the mean of the tokens' log-probabilities.

    Args:
        stream: prompts, one a row.
        num_beams: B.
        eos_id: ends a text.
        max_new_tokens: cuts a text off.
        other_ends: tokens that end a text too, and are given back as `eos_id`.
    """
    searches = [_Search(num_beams, row, 1.0) for row in range(stream.num_rows)]
    # So many that as many beams are left to run where each has all its ends among the best.
    num_extensions = num_beams * (1 + len({eos_id, *other_ends}))
    scorer = Likelihood(num_extensions, eos_id, other_ends=other_ends)
    _run(stream, scorer, searches, max_new_tokens)
    return [search.best() for search in searches]


@torch.no_grad()
def vote(
    stream: Stream, num_prompts: int, num_beams: int, eos_id: int, max_new_tokens: int
) -> list[list[Beam]]:
    """For each task its `num_beams` best texts: finished ones, then those that were cut off.

    A text's score is the sum over its tokens of the mean over prompts of the log-probability (group
    decoding, Sun et al. 2024, arXiv 2403.05789, section 3.2).

    Args:
        stream: `num_prompts` consecutive rows a task.
        num_prompts: how many prompts of one task vote on a token.
        num_beams: B.
        eos_id: ends a text.
        max_new_tokens: cuts a text off.
    """
    searches = [_EndedFirst(num_beams, task, 0.0) for task in range(stream.num_rows // num_prompts)]
    scorer = Likelihood(2 * num_beams, eos_id, num_prompts)
    _run(stream, scorer, searches, max_new_tokens, num_prompts)
    return [search.best() for search in searches]


@torch.no_grad()
def likeliest_known(stream: Stream, trie: "TokenTrie", num_beams: int) -> list[list[Beam]]:
    """For each prompt about `num_beams` of the trie's texts that follow it likeliest, best first.

    A beam over the trie reads a few hundred tokens a prompt instead of every text whole.

    Args:
        stream: prompts, one a row.
        trie: the texts.
        num_beams: B; all texts come back where there are no more than that.
    """
    searches = [_Joint(num_beams, row) for row in range(stream.num_rows)]
    # A step more than the longest text has tokens, which is never taken: no text is cut off.
    _run(stream, AlongTrie(trie), searches, trie.longest + 1)
    return [search.best() for search in searches]


class Likelihood:
    """Scores every token of the vocabulary by its log-probability."""

    def __init__(
        self,
        num_extensions: int,
        eos_id: int,
        num_prompts: int = 1,
        other_ends: Sequence[int] = (),
    ) -> None:
        """Keep each search's best `num_extensions`; a beam has `num_prompts` rows, whose mean
        counts."""
        self.num_extensions, self.eos_id, self.num_prompts = num_extensions, eos_id, num_prompts
        self.ends = {eos_id, *other_ends}

    def __call__(
        self, logits_EV: Tensor, searches: Sequence[Sequence[Beam]]
    ) -> list[list[Extension]]:
        """See `Scorer`."""
        log_probs_EV = logits_EV.float().log_softmax(-1)
        means = log_probs_EV.unflatten(0, (-1, self.num_prompts)).mean(1)
        sums = means[_rows(searches, means.device)] + _scores(searches, means.device)[..., None]
        best = sums.flatten(1).topk(min(self.num_extensions, sums[0].numel()))
        values, places = best.values.tolist(), best.indices.tolist()
        return [
            [
                self._extension(beams, place, sums.shape[-1], value)
                for value, place in zip(own_values, own_places, strict=True)
                if place < len(beams) * sums.shape[-1]
            ]
            for beams, own_values, own_places in zip(searches, values, places, strict=True)
        ]

    def _extension(
        self, beams: Sequence[Beam], place: int, vocabulary: int, score: float
    ) -> Extension:
        beam, token = divmod(place, vocabulary)
        ends = token in self.ends
        return Extension(beams[beam], self.eos_id if ends else token, score, ends)


def _rows(searches: Sequence[Sequence[Beam]], device: torch.device) -> Tensor:
    """(searches, B): the row of each beam; searches with fewer beams than others repeat a row."""
    widest = max(map(len, searches))
    rows = [[beam.row for beam in beams] for beams in searches]
    return torch.tensor([row + row[:1] * (widest - len(row)) for row in rows], device=device)


def _scores(searches: Sequence[Sequence[Beam]], device: torch.device) -> Tensor:
    """(searches, B): the score of each beam; -inf for the repeated ones."""
    widest = max(map(len, searches))
    scores = [[beam.score for beam in beams] for beams in searches]
    return torch.tensor([row + [-torch.inf] * (widest - len(row)) for row in scores], device=device)


class TokenTrie:
    """Token sequences as a tree, by their beginnings.

    No sequence may begin another, which an end-of-sequence token at the end of each makes sure of.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        """Read the sequences in order; that of `next_tokens` is the order of appearance."""
        following: dict[tuple[int, ...], dict[int, None]] = {}
        for tokens in map(tuple, sequences):
            for i, token in enumerate(tokens):
                following.setdefault(tokens[:i], {})[token] = None
        self._following = {start: tuple(tokens) for start, tokens in following.items()}
        self._index = {tuple(tokens): index for index, tokens in enumerate(sequences)}
        self.longest = max(map(len, sequences), default=0)

    def next_tokens(self, start: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens that follow `start` in some sequence; () after a whole one."""
        return self._following.get(start, ())

    def index(self, tokens: tuple[int, ...]) -> int:
        """Which sequence this is; of equal ones the last."""
        return self._index[tokens]


class AlongTrie:
    """Scores only the tokens that a trie has there, by their log-probability."""

    def __init__(self, trie: TokenTrie) -> None:
        self.trie = trie

    def __call__(
        self, logits_EV: Tensor, searches: Sequence[Sequence[Beam]]
    ) -> list[list[Extension]]:
        """See `Scorer`; every extension there is, in the trie's order."""
        beams = [beam for search in searches for beam in search]
        tokens = [self.trie.next_tokens(beam.tokens) for beam in beams]
        widest = max(map(len, tokens))
        index = torch.tensor(
            [[*row, *(0 for _ in range(widest - len(row)))] for row in tokens],
            device=logits_EV.device,
        )
        rows = torch.tensor([beam.row for beam in beams], device=logits_EV.device)
        # Only what is needed leaves the device: a few tokens a beam, not the vocabulary.
        log_probs = logits_EV.float().log_softmax(-1)[rows[:, None], index].tolist()
        extensions = iter(
            [self._extend(*one) for one in zip(beams, tokens, log_probs, strict=True)]
        )
        return [[one for _ in search for one in next(extensions)] for search in searches]

    def _extend(
        self, beam: Beam, tokens: Sequence[int], log_probs: Sequence[float]
    ) -> list[Extension]:
        return [
            Extension(beam, token, beam.score + log_prob, not self._goes_on(beam, token))
            for token, log_prob in zip(tokens, log_probs, strict=False)
        ]

    def _goes_on(self, beam: Beam, token: int) -> bool:
        return bool(self.trie.next_tokens((*beam.tokens, token)))


class _Search:
    """The beams of one prompt: those that run and those that have ended, best first.

    length_penalty: a score is the sum of log-probabilities over length ** length_penalty.
    """

    def __init__(self, num_beams: int, row: int, length_penalty: float = 0.0) -> None:
        self.num_beams, self.length_penalty = num_beams, length_penalty
        self.running = [Beam(0.0, (), row)]
        self.finished: list[Beam] = []
        self.is_active = True

    def step(self, extensions: Sequence[Extension], is_last: bool) -> list[Beam]:
        """Take the best extensions; the beams that survive them, to be read in the stream.

        Of the ended ones only those among the first `num_beams` count, as in transformers: the
        others are a reserve, so that as many beams as before are left to run. is_last: no token can
        follow, so whatever is there has ended.
        """
        first = extensions[: self.num_beams]
        self._finish([one for one in first if is_last or one.ends])
        going_on = [one for one in extensions if not one.ends][: self.num_beams]
        self.running = [one.grown() for one in going_on]
        # A sum of log-probabilities only falls, so the best running beam bounds the others; it is
        # divided by its present length, as transformers does.
        length = len(self.running[0].tokens)
        bound = self.running[0].score / length**self.length_penalty
        is_full = len(self.finished) == self.num_beams
        self.is_active = not is_last and not (is_full and bound <= self.finished[-1].score)
        return self.running if self.is_active else []

    def _finish(self, ended: Sequence[Extension]) -> None:
        beams = [one.grown() for one in ended]
        scored = [
            replace(beam, score=beam.score / len(beam.tokens) ** self.length_penalty)
            for beam in beams
        ]
        # sorted is stable: of equal scores the earlier one stays in front.
        self.finished = sorted([*self.finished, *scored], key=_falling)[: self.num_beams]

    def best(self) -> list[Beam]:
        """The result, best first."""
        return self.finished


class _EndedFirst(_Search):
    """A text that was cut off never stands before one that ended."""

    def step(self, extensions: Sequence[Extension], is_last: bool) -> list[Beam]:
        return super().step(extensions, False)

    def best(self) -> list[Beam]:
        return [*self.finished, *self.running][: self.num_beams]


class _Joint(_Search):
    """Finished beams hold their places among the running ones: scores only fall, so one that is no
    longer among the best cannot come back."""

    def step(self, extensions: Sequence[Extension], is_last: bool) -> list[Beam]:
        finished = [Extension(beam, -1, beam.score, True) for beam in self.finished]
        best = sorted([*finished, *extensions], key=_falling)[: self.num_beams]
        self.finished = [one.beam if one.token < 0 else one.grown() for one in best if one.ends]
        self.running = [one.grown() for one in best if not one.ends]
        self.is_active = bool(self.running)
        return self.running


def _falling(scored: Beam | Extension) -> float:
    return -scored.score


def _run(
    stream: Stream,
    scorer: Scorer,
    searches: Sequence[_Search],
    max_new_tokens: int,
    rows_per_beam: int = 1,
) -> None:
    """Step all searches together until each is done or `max_new_tokens` were written."""
    active = list(searches)
    stream.reserve(max_new_tokens - 1)
    for length in count(1):
        running = [search.running for search in active]
        survivors = [
            beam
            for search, extensions in zip(active, scorer(stream.logits_EV, running), strict=True)
            for beam in search.step(extensions, length == max_new_tokens)
        ]
        active = [search for search in active if search.is_active]
        if length == max_new_tokens or not active:
            return
        _read(stream, survivors, rows_per_beam)
        rows = count()
        for search in active:
            search.running = [replace(beam, row=next(rows)) for beam in search.running]


def _read(stream: Stream, beams: Sequence[Beam], rows_per_beam: int) -> None:
    """Let the stream go on with these beams' last tokens, in this order."""
    rows = [beam.row * rows_per_beam + i for beam in beams for i in range(rows_per_beam)]
    tokens = [beam.tokens[-1] for beam in beams for _ in range(rows_per_beam)]
    if rows != list(range(stream.num_rows)):
        stream.select(rows)
    stream.advance(stream.index(tokens))
