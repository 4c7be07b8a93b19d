"""Controls of deduction: what the base answers by itself, and whether *this* instruction is what helps."""

import random
from collections.abc import Sequence
from typing import ClassVar

from ship_ds.data.task import SplitTask
from ship_ds.evaluation.method import Answers, Setting
from ship_ds.evaluation.methods.icl import InContextLearning
from ship_ds.inference.bank import encode_all
from ship_ds.inference.deduction import answer_latents


class BareBase:
    """The Task LLM with neither adapter nor instruction."""

    name: ClassVar[str] = "bare_base"
    states_instruction: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        self.without_shots = InContextLearning(setting)

    def prepare(self) -> None:
        """Nothing is trained."""

    def deduce(self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]) -> Answers:
        return self.without_shots.reason([()] * len(inputs), inputs)


class ShuffledInstruction:
    """SHIP under another rule's instruction: a seen one, drawn for each task by its id."""

    name: ClassVar[str] = "shuffled_instruction"
    states_instruction: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        self.ship, self.seen, self.seed = setting.ship, setting.splits.seen, setting.seed

    def prepare(self) -> None:
        """Nothing is trained."""

    def deduce(self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]) -> Answers:
        others = [self._another(task) for task in tasks]
        model = self.ship.model
        return answer_latents(model, encode_all(model, others), others, inputs, self.ship.config.evaluation.max_new_tokens)

    def _another(self, task: SplitTask) -> str:
        others = [seen for seen in self.seen if seen.id != task.id]
        return random.Random(f"{self.seed} shuffled {task.id}").choice(others).task.instruction
