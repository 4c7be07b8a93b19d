"""Controls of deduction: what the base answers by itself, whether *this* instruction is what helps,
and what no model at all would score."""

import random
from collections.abc import Sequence
from typing import ClassVar

from ship_ds.data.task import Example, SplitTask
from ship_ds.evaluation.method import Setting
from ship_ds.evaluation.methods.untrained import Untrained
from ship_ds.evaluation.metrics import majority_label
from ship_ds.inference.deduction import AnswersByTask, answer_bare, answer_latents
from ship_ds.inference.scoring import losses_in_prompt, losses_under_adapters


class BareBase(Untrained):
    """The Task LLM with neither adapter nor instruction."""

    name: ClassVar[str] = "bare_base"
    about: ClassVar[str] = "control: the base with neither adapter nor instruction"

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


class ShuffledInstruction(Untrained):
    """SHIP under another rule's instruction: a seen one, drawn for each task by its id.

    So it depends on the task and the seed alone, whichever tasks are measured beside it and on
    however many ranks.
    """

    name: ClassVar[str] = "shuffled_instruction"
    about: ClassVar[str] = "control: SHIP under another seen task's instruction"
    answers_as_ship: ClassVar[bool] = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.seen = setting.splits.seen

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        others = [self._another(task) for task in tasks]
        model = self.ship.model
        return answer_latents(
            model,
            model.encode(others),
            others,
            inputs,
            self.ship.config.evaluation.max_new_tokens,
            keeps_cut_off=True,
        )

    def answer_losses(
        self,
        tasks: Sequence[SplitTask],
        wordings: Sequence[str],
        asked: Sequence[Sequence[Example]],
    ) -> list[list[float]]:
        """See `Predicts`."""
        return losses_under_adapters(self.ship.model, [self._another(t) for t in tasks], asked)

    def _another(self, task: SplitTask) -> str:
        # With one seen task there is no other: its own instruction is all that can be drawn.
        others = [seen for seen in self.seen if seen.id != task.id] or self.seen
        return random.Random(f"{self.seed} shuffled {task.id}").choice(others).task.instruction


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

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        return [[majority_label(task)] * len(row) for task, row in zip(tasks, inputs, strict=True)]
