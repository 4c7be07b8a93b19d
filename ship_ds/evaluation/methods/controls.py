"""Controls of deduction: what the base answers by itself, whether *this* instruction is what helps,
and what no model at all would score.

Letters: C candidates, T tasks, Z latent size. The candidates are the seen tasks.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ship_ds.data.task import Example, SplitTask
from ship_ds.evaluation.methods.untrained import Untrained
from ship_ds.evaluation.metrics import majority_label
from ship_ds.evaluation.questions import another_instruction
from ship_ds.inference.deduction import AnswersByTask, answer_bare, answer_read
from ship_ds.inference.scoring import losses_in_prompt, losses_under_adapters


class BareBase(Untrained):
    """The Task LLM with neither adapter nor instruction."""

    name: ClassVar[str] = "bare_base"
    about: ClassVar[str] = "control: the base with neither adapter nor instruction"
    asks_ship: ClassVar[bool] = False

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        length = self.ship.config.evaluation.max_new_tokens
        return answer_bare(self.ship.model, inputs, length, keeps_cut_off=True)

    def answer_losses(
        self,
        tasks: Sequence[SplitTask],
        wordings: Sequence[str],
        asked: Sequence[Sequence[Example]],
    ) -> list[list[float]]:
        """See `Predicts`."""
        return losses_in_prompt(self.ship.model, [None] * len(asked), asked)


class AnotherInstruction(Untrained, ABC):
    """SHIP under a seen task's instruction in place of the task's own; a subclass says which."""

    answers_as_ship: ClassVar[bool] = True

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        others = self.others(tasks, wordings)
        model, length = self.ship.model, self.ship.config.evaluation.max_new_tokens
        return answer_read(model, others, others, inputs, length, keeps_cut_off=True)

    def answer_losses(
        self,
        tasks: Sequence[SplitTask],
        wordings: Sequence[str],
        asked: Sequence[Sequence[Example]],
    ) -> list[list[float]]:
        """See `Predicts`."""
        return losses_under_adapters(self.ship.model, self.others(tasks, wordings), asked)

    @abstractmethod
    def others(self, tasks: Sequence[SplitTask], wordings: Sequence[str]) -> list[str]:
        """An instruction for each task, a function of the task, its wording and the seed alone:
        whichever tasks are measured beside it and on however many ranks."""


class ShuffledInstruction(AnotherInstruction):
    """Another rule's instruction, drawn for each task by its id."""

    name: ClassVar[str] = "shuffled_instruction"
    about: ClassVar[str] = "control: SHIP under another seen task's instruction"

    def others(self, tasks: Sequence[SplitTask], wordings: Sequence[str]) -> list[str]:
        """See `AnotherInstruction`."""
        return [another_instruction(task, self.seen, self.seed) for task in tasks]


class NeighbourInstruction(AnotherInstruction):
    """The instruction of the seen task whose latent is nearest to that of the task's own: what a
    lookup among the seen tasks would answer. Of a seen task it is the nearest other one."""

    name: ClassVar[str] = "neighbour_instruction"
    about: ClassVar[str] = "control: SHIP under the seen instruction with the nearest latent"

    @cached_property
    def _latent_CZ(self) -> Tensor:
        return self.ship.model.encode([task.task.instruction for task in self.seen])

    def others(self, tasks: Sequence[SplitTask], wordings: Sequence[str]) -> list[str]:
        """See `AnotherInstruction`."""
        latent_TZ = self.ship.model.encode(wordings)
        # By the sum of squares whatever the number of rows, so that a tie falls as it does alone.
        mode = "donot_use_mm_for_euclid_dist"
        distance_TC = torch.cdist(latent_TZ, self._latent_CZ, compute_mode=mode)
        for row_C, task in zip(distance_TC, tasks, strict=True):
            # A task that says the same is no other one. With none left the first has to do.
            text = task.task.instruction
            row_C[[c for c, one in enumerate(self.seen) if one.task.instruction == text]] = (
                torch.inf
            )
        return [self.seen[c].task.instruction for c in distance_TC.argmin(1).tolist()]


class MajorityLabel(Untrained):
    """Answers every input with the most frequent answer of the task's training examples.

    It is told what no other method of deduction is, the task's own answers, and is what label
    accuracy has to beat: four in five reviews may be positive.
    """

    name: ClassVar[str] = "majority_label"
    about: ClassVar[str] = (
        "control: the most frequent answer of the task's own training examples: sees labels"
    )
    sees_labels: ClassVar[bool] = True
    asks_ship: ClassVar[bool] = False

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        return [[majority_label(task)] * len(row) for task, row in zip(tasks, inputs, strict=True)]
