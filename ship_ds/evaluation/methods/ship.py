"""SHIP itself: the run that is evaluated.

Letters: T tasks, Z latent size.
"""

from collections.abc import Sequence
from typing import ClassVar

from ship_ds.data.task import SplitTask
from ship_ds.evaluation.methods.searching import Searching
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import AnswersByTask


class ShipMethod(Searching):
    """Deduction by the instruction's adapter; induction by the default search; reconstruction by
    the decoder."""

    name: ClassVar[str] = "ship"
    recipe: ClassVar[InductionConfig] = InductionConfig()

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        return self.answer(wordings, inputs)

    def reconstruct(self, wordings: Sequence[str]) -> list[str]:
        """What the decoder makes of each instruction's posterior mean, without examples."""
        model = self.ship.model
        return model.decode(model.encode(wordings), self.search.max_new_tokens)
