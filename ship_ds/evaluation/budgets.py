"""What the training of a baseline may spend: time, steps, examples, or as long as dev rises."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

_WARMUP = 0.1
"""Of a bounded budget: a fixed number of steps would be all that a short training has."""
_WARMUP_STEPS = 20
"""Of an open-ended one."""


@dataclass(frozen=True)
class Spent:
    """What a training has used: steps, seconds without those on dev, and answered examples."""

    steps: int = 0
    seconds: float = 0.0
    examples: int = 0

    def after(self, steps: int, examples: int, seconds: float) -> "Spent":
        """With so many steps and examples more, at so many seconds since the start.

        Args:
            steps: taken since.
            examples: answered since.
            seconds: in all, without those on dev; they take the place of the ones before.
        """
        return Spent(self.steps + steps, seconds, self.examples + examples)


class Budget(ABC):
    """What a training may spend."""

    @abstractmethod
    def spent(self, used: Spent) -> float:
        """The share that is used; at 1 the training is over."""

    @abstractmethod
    def share(self, part: float) -> "Budget":
        """That part of it, for one stage."""

    def rest(self, part: float, used: Spent) -> float:
        """The share that is left for later stages by a first one that was allowed `part` of it:
        what it did not need is theirs, and what it used beyond is not taken from them."""
        return 1 - min(part, self.spent(used))

    def without_dev(self) -> "Budget":
        """For a stage that no score on dev can end: itself, where it has a bound of its own."""
        return self

    def rate(self, used: Spent) -> float:
        """What the learning rate is multiplied by: a warm-up, and a cosine over the budget."""
        spent = self.spent(used)
        return min(1.0, 0.05 + spent / _WARMUP) * (1 + math.cos(math.pi * spent)) / 2


@dataclass(frozen=True)
class Minutes(Budget):
    """Wall-clock time. How many steps that makes depends on the machine, so two trainings
    differ."""

    minutes: float

    def spent(self, used: Spent) -> float:
        """By the clock."""
        return used.seconds / 60 / self.minutes

    def share(self, part: float) -> "Minutes":
        """Of the minutes."""
        return Minutes(self.minutes * part)


@dataclass(frozen=True)
class Steps(Budget):
    """A number of steps: the same training every time."""

    steps: int

    def spent(self, used: Spent) -> float:
        """By steps."""
        return used.steps / self.steps

    def share(self, part: float) -> "Steps":
        """Of the steps, at least one."""
        return Steps(max(1, round(self.steps * part)))


@dataclass(frozen=True, repr=False)
class AnsweredExamples(Budget):
    """A number of answered examples, as many as SHIP's own training had: equal data, whatever a
    step costs."""

    examples: int

    def __repr__(self) -> str:
        """As baselines and cells of earlier versions have it, which are found by it."""
        return f"Examples(examples={self.examples})"

    def spent(self, used: Spent) -> float:
        """By answered examples."""
        return used.examples / self.examples

    def share(self, part: float) -> "AnsweredExamples":
        """Of the examples, at least one."""
        return AnsweredExamples(max(1, round(self.examples * part)))


@dataclass(frozen=True)
class UntilDevStops(Budget):
    """As long as the dev score rises: over when so many evaluations in a row have not raised it.
    The weights of the best one are kept.

    patience: in evaluations. examples: that a stage without a score on dev may answer.
    """

    patience: int
    examples: int

    def spent(self, used: Spent) -> float:
        """Nothing, since there is no bound."""
        return 0.0

    def share(self, part: float) -> "UntilDevStops":
        """Every stage goes on until it stops by itself."""
        return self

    def without_dev(self) -> AnsweredExamples:
        """Bounded by answered examples."""
        return AnsweredExamples(self.examples)

    def rate(self, used: Spent) -> float:
        """A warm-up, and then always the same: nobody knows where it ends."""
        return min(1.0, (1 + used.steps) / _WARMUP_STEPS)
