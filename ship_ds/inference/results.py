"""What induction and reasoning give back: plain frozen values, without torch."""

import math
from dataclasses import dataclass, field

Answers = list[str | None]
"""One an input; None where no end of sequence came in time."""


RIGHT_WEIGHT, LOSS_WEIGHT = 0.5, 0.05


def score(resemblance: float, share_right: float, loss: float) -> float:
    """What speaks for an instruction where people wrote the known ones; more is better.

    The weights are chosen on 41 dev tasks of Super-NaturalInstructions around SmolLM2, among the 8
    known instructions whose tasks are most alike: by exact answers, then loss, the first text has
    ROUGE-L 0.351 with the true one and its adapter answers 0.200 of the examples, by resemblance
    alone 0.388 and 0.093, by this 0.404 and 0.171 (docs/results.md, Induction).

    Args:
        resemblance: cosine of the given examples and those of the known task that it instructs; 0
            of any other text.
        share_right: of the examples, those that it answers exactly, on average over the ways of
            using it that were tried.
        loss: of an example in nats a token, on that average.

    Returns:
        Minus infinity where the loss is not finite.
    """
    total = resemblance + RIGHT_WEIGHT * share_right - LOSS_WEIGHT * loss
    return total if math.isfinite(total) else -math.inf


@dataclass(frozen=True)
class Candidate:
    """An instruction and how it explains the given examples.

    A text is used in two ways, and each is tested: through the encoder, as an adapter, and as text
    in the prompt of the bare Task LLM.

    Args:
        instruction: the text.
        num_right: examples that greedy decoding answers exactly, through the encoder.
        loss: of an example in nats, on average, through the encoder.
        num_right_in_prompt: as `num_right`, with the text in the prompt; None where this was not
            tried, since the Task LLM does not follow text.
        loss_in_prompt: as `loss`, with the text in the prompt, or None.
        latent: the mean of its posterior.
        origin: where it comes from: known, analogy, encoded, sampled, beam, asked, refined, edit,
            splice, neutral.
        score: what speaks for it, of a search that compares the examples with those of known tasks
            (`score`); else None.
    """

    instruction: str
    num_right: int
    loss: float
    num_right_in_prompt: int | None
    loss_in_prompt: float | None
    latent: tuple[float, ...] = field(repr=False)
    origin: str
    score: float | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """Sorts candidates, best first: by their score; where they have none, by most exact
        answers both ways together, then by least loss."""
        if self.score is not None:
            return -self.score, self.loss
        num_right = self.num_right + (self.num_right_in_prompt or 0)
        return -num_right, self.loss + (self.loss_in_prompt or 0.0)

    @property
    def most_right(self) -> int:
        """Examples right by the better of the two ways.

        One is enough: going on until both work picks texts that suit an adapter's mistakes.
        """
        return max(self.num_right, self.num_right_in_prompt or 0)


@dataclass(frozen=True)
class Induction:
    """The instruction that explains examples.

    Args:
        instruction: the best candidate's.
        candidates: best first.
        latent: the point whose adapter explains the examples best, by descent or encoded.
        num_right: examples that this adapter answers exactly.
        num_examples: how many were given.
        latent_reading: the text whose latent it is, for an adapter that fuses it; empty where
            descent found it.
    """

    instruction: str
    candidates: tuple[Candidate, ...]
    latent: tuple[float, ...] = field(repr=False)
    num_right: int
    num_examples: int
    latent_reading: str = ""

    @property
    def that_fit(self) -> tuple[Candidate, ...]:
        """The candidates that answer every example, through the encoder or in the prompt: more than
        one means that the examples do not tell them apart."""
        return tuple(c for c in self.candidates if c.most_right == self.num_examples)


@dataclass(frozen=True)
class WeightCandidate:
    """An instruction whose adapter is near a given one.

    Args:
        instruction: the text.
        distance: |update - the given one's|^2 / |the given one's|^2 over all sites; 1 is as far as
            no update at all.
        latent: the mean of its posterior.
        origin: known; decoded, out of the latents that descent found; or read, out of what the
            reader (lora_reader.py) took the adapter for.
    """

    instruction: str
    distance: float
    latent: tuple[float, ...] = field(repr=False)
    origin: str


@dataclass(frozen=True)
class WeightInduction:
    """What an adapter's weights say, without inputs.

    Args:
        instruction: the nearest candidate's.
        candidates: nearest first.
        latent: the nearest point that descent found.
        latent_distance: of that point, before it became text.
    """

    instruction: str
    candidates: tuple[WeightCandidate, ...]
    latent: tuple[float, ...] = field(repr=False)
    latent_distance: float


@dataclass(frozen=True)
class Explained:
    """An instruction that may say what an adapter does, and how far it does so.

    Args:
        instruction: the text.
        sources: where it was found: weights, behaviour, bank.
        same: of the inputs, those that the instruction's own adapter answers as the given one does.
        same_in_prompt: of the inputs, those that the bare Task LLM answers so with the text in its
            prompt; None where it does not follow text there.
        agreement: by the better of both ways: the share of the adapter's answers that the text
            gives, or of those that the base does not give by itself, whichever is lower.
        distance: of its adapter's weights from the given ones; 1 is as far as no update at all.
            None where the weights were not compared.
    """

    instruction: str
    sources: tuple[str, ...]
    same: int
    same_in_prompt: int | None
    agreement: float
    distance: float | None


@dataclass(frozen=True)
class Explanation:
    """What an adapter does.

    Args:
        instruction: the best candidate's text; None where no candidate does what the adapter does.
        candidates: best first.
        threshold: agreement from which on a candidate counts as saying it.
        inputs: what the adapter was asked.
        answers: what it answered.
        base_answers: what the bare Task LLM answers.
        updates: module path -> Frobenius norm of what the adapter adds to the weight there; empty
            for kinds that change no weights.
    """

    instruction: str | None
    candidates: tuple[Explained, ...]
    threshold: float
    inputs: tuple[str, ...]
    answers: tuple[str | None, ...]
    base_answers: tuple[str | None, ...]
    updates: dict[str, float]

    @property
    def agreement(self) -> float:
        """Of the best candidate; 0 where there is none."""
        return self.candidates[0].agreement if self.candidates else 0.0

    @property
    def num_changed(self) -> int:
        """Inputs that the adapter answers otherwise than the base."""
        pairs = zip(self.answers, self.base_answers, strict=True)
        return sum(answer != bare for answer, bare in pairs)


@dataclass(frozen=True)
class Reasoning:
    """Answers to the same inputs in three ways, or four.

    Args:
        induction: the instruction and where it comes from.
        by_latent: answers under the adapter of the latent that induction found.
        refined: answers under the adapter of the induced text, encoded again, and with it the given
            examples where the encoder reads both.
        in_prompt: answers of the bare Task LLM with the induced text in the prompt.
        read: answers under the adapter of the examples alone, in one pass and without a text; None
            of a run whose encoder was not trained to read them so.
    """

    induction: Induction
    by_latent: Answers
    refined: Answers
    in_prompt: Answers
    read: Answers | None = None
