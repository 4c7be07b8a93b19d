"""Reasoning in rounds: what the induced text answers is given to induction again."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ship_ds.console import log
from ship_ds.data.task import Example
from ship_ds.evaluation.methods.searching import search_settings, with_run_length
from ship_ds.evaluation.methods.untrained import Untrained
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import AnswersByTask
from ship_ds.inference.reasoning import reason_many

_NUM_ROUNDS = 2


class ShipRounds(Untrained):
    """`ship-ds reason --rounds 2`, whose first round is SHIP's own row."""

    name: ClassVar[str] = "ship_rounds"
    about: ClassVar[str] = (
        "SHIP's reasoning in two rounds: the second induces from the shown examples and its own "
        "answers"
    )
    answers_as_ship: ClassVar[bool] = True
    recipe: ClassVar[InductionConfig] = InductionConfig()

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Of the search, and that answers that were cut off are scored as other methods' are."""
        return {**search_settings(cls.recipe), "rounds": _NUM_ROUNDS, "keeps_cut_off": True}

    def reason(
        self, shown: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        """By the text encoded again, as SHIP's own row."""
        search = with_run_length(self.recipe, self.ship)
        reasonings = reason_many(
            self.ship.model,
            self.ship.bank_to_search(search, log, self.seen),
            shown,
            inputs,
            self.ship.searching(search, log, self.seen),
            self.ship.config.evaluation.max_new_tokens,
            _NUM_ROUNDS,
            self.seed,
            keeps_cut_off=True,
        )
        return [reasoning.refined for reasoning in reasonings]
