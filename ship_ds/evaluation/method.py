"""What the harness measures: SHIP, its controls and every baseline behind one signature.

A method answers in one or more of four directions; the class says in which by the protocols below
that it fulfils. Each is made from a `Setting` alone, so that all of them stand on the same split,
base model and time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from ship_ds.api import Ship
from ship_ds.data.task import Example, Splits, SplitTask
from ship_ds.evaluation.budgets import Budget
from ship_ds.evaluation.config import Direction
from ship_ds.inference.deduction import AnswersByTask


@dataclass(frozen=True)
class Setting:
    """What every method starts from.

    folder: the method's own, for weights that it trains once and loads afterwards. budget: what a
    baseline may spend on its training; None for methods that have none. num_looks: at dev during
    that (baselines/fitting.py); 0: none.
    """

    ship: Ship
    splits: Splits
    folder: Path
    budget: Budget | None
    seed: int
    num_looks: int = 0


class Method(Protocol):
    """What the harness measures: it is made, prepared once, and then asked."""

    name: ClassVar[str]
    about: ClassVar[str]
    """What its row in the tables is, in a few words."""
    sees_labels: ClassVar[bool]
    """Whether deduction knows examples of the very task, an unseen one too: no rival then."""
    states_instruction: ClassVar[bool]
    """Whether each query's prompt holds the instruction: such a method pays for it again in every
    query."""
    answers_as_ship: ClassVar[bool]
    """Whether it answers as SHIP's Task LLM was trained to, which may be with the instruction in
    the prompt (`model.task_llm.instruction`)."""
    asks_ship: ClassVar[bool]
    """Whether it asks what SHIP's training made: encoder, hypernetwork or decoder. Of another it is
    the same in all runs of one base and data, but for what it takes of the config."""

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """The method's own numbers, as JSON: where they change, it is measured again."""

    @classmethod
    def applies(cls, task: SplitTask, ship: Ship) -> bool:
        """Whether the task is one that it is asked, of this run."""

    @classmethod
    def cannot(cls, ship: Ship) -> tuple[Direction, ...]:
        """Directions in which this run has nothing to ask it in."""

    def __init__(self, setting: Setting) -> None: ...

    def prepare(self) -> None:
        """Train, or load what an earlier call trained; called once, on every rank alike, before
        anything is asked."""


@runtime_checkable
class Deduces(Protocol):
    """Answers inputs from an instruction."""

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        """Answer each task's inputs, knowing the wording of it alone.

        Args:
            tasks: that the inputs are of.
            wordings: the instruction as it is given, one a task.
            inputs: one row a task.
        """


@runtime_checkable
class Predicts(Protocol):
    """Deduces, and gives every text a probability, the right answers among them."""

    def answer_losses(
        self,
        tasks: Sequence[SplitTask],
        wordings: Sequence[str],
        asked: Sequence[Sequence[Example]],
    ) -> list[list[float]]:
        """Cross-entropy of each example's target, nats a token, its end among them.

        Args:
            tasks, wordings: see `Deduces.deduce`.
            asked: examples, one row a task.

        Returns:
            One row a task, one number an example.
        """


@runtime_checkable
class Doubts(Protocol):
    """Deduces, and says of each answer how far it can be relied on."""

    def agreement(
        self,
        wordings: Sequence[str],
        inputs: Sequence[Sequence[str]],
        answers: AnswersByTask,
    ) -> list[list[float]]:
        """Of each answer that `deduce` gave, from 0 to 1, without labels.

        Args:
            wordings, inputs: see `Deduces.deduce`.
            answers: what it gave.

        Returns:
            One row a task, one number an answer.
        """


@runtime_checkable
class Induces(Protocol):
    """Writes instructions from examples."""

    def induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        """One instruction for each task's shown examples."""


@runtime_checkable
class Reasons(Protocol):
    """Answers inputs from examples."""

    def reason(
        self, shown: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        """Answer each task's inputs, knowing its shown examples alone."""


@runtime_checkable
class ReasonsOtherwise(Protocol):
    """Reasons by other routes as well."""

    def reason_otherwise(
        self, shown: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]
    ) -> dict[str, AnswersByTask]:
        """The same answered by other routes, each scored as `exact_match_<name>`."""


@runtime_checkable
class Reconstructs(Protocol):
    """Decodes instructions from their own latents."""

    def reconstruct(self, wordings: Sequence[str]) -> list[str]:
        """Each instruction as it is decoded from its own latent, without examples."""


@runtime_checkable
class ReadsLatents(Protocol):
    """Reconstructs, and gives every text a probability, the instruction among them."""

    def text_losses(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str]
    ) -> tuple[list[float], list[float]]:
        """Cross-entropy of each task's wording, nats a token, its end among them: beside its own
        latent, and beside that of another task's instruction."""
