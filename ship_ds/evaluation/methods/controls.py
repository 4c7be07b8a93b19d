"""Controls of deduction: what the base answers by itself, and whether *this* instruction is what helps."""

import random
from collections.abc import Sequence
from typing import ClassVar

from ship_ds.data.task import SplitTask
from ship_ds.evaluation.answering import answer_tasks, encode_all
from ship_ds.evaluation.method import Answers, Setting


class BareBase:
    """The Task LLM with neither adapter nor instruction."""

    name: ClassVar[str] = "bare_base"
    states_instruction: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        self.ship = setting.ship

    def prepare(self) -> None:
        """Nothing is trained."""

    def deduce(self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]) -> Answers:
        return answer_tasks(self.ship.model, None, inputs, self.ship.config.evaluation.max_new_tokens)


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
        return answer_tasks(model, encode_all(model, others), inputs, self.ship.config.evaluation.max_new_tokens, others)

    def _another(self, task: SplitTask) -> str:
        others = [seen for seen in self.seen if seen.id != task.id]
        return random.Random(f"{self.seed} shuffled {task.id}").choice(others).task.instruction
