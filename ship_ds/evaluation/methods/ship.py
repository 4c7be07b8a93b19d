"""SHIP itself: the run that is evaluated."""

from collections.abc import Sequence
from typing import ClassVar

from ship_ds.data.task import SplitTask
from ship_ds.evaluation.answering import answer_tasks, encode_all
from ship_ds.evaluation.method import Answers, Setting


class ShipMethod:
    name: ClassVar[str] = "ship"
    states_instruction: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        self.ship = setting.ship

    def prepare(self) -> None:
        """It is trained already."""

    def deduce(self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]) -> Answers:
        model = self.ship.model
        return answer_tasks(model, encode_all(model, wordings), inputs, self.ship.config.evaluation.max_new_tokens, wordings)
