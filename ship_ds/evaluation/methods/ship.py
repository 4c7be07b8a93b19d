"""SHIP itself: the run that is evaluated."""

from collections.abc import Sequence
from typing import ClassVar

from ship_ds.data.task import SplitTask
from ship_ds.evaluation.method import Answers
from ship_ds.evaluation.methods.searching import Searching
from ship_ds.inference.induction import InductionConfig


class ShipMethod(Searching):
    """Deduction by the instruction's adapter; induction by the default search."""

    name: ClassVar[str] = "ship"
    recipe: ClassVar[InductionConfig] = InductionConfig()

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> Answers:
        return self.answer(wordings, inputs)
