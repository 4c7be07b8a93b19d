"""SHIP itself: the run that is evaluated.

Letters: T tasks, Z latent size.
"""

from collections.abc import Sequence
from typing import ClassVar

from ship_ds.data.task import SplitTask
from ship_ds.evaluation.methods.searching import Searching
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import AnswersByTask

_DECODED_AT_ONCE = 48


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
        model, texts = self.ship.model, list[str]()
        for start in range(0, len(wordings), _DECODED_AT_ONCE):
            latent_TZ = model.encode(wordings[start : start + _DECODED_AT_ONCE])
            texts += model.decode(latent_TZ, self.search.max_new_tokens, self.any_unfinished)
        return texts
