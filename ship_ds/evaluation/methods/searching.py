"""What SHIP and its control, the nearest known instruction, share: a search for the text, and
answers by an adapter of it.

Letters: T tasks, Z latent size.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch

from ship_ds.api import Ship
from ship_ds.console import log
from ship_ds.data.task import Example
from ship_ds.evaluation.method import Setting
from ship_ds.evaluation.methods.untrained import Untrained
from ship_ds.inference.bank import Bank
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import (
    AnswersByTask,
    answer_latents,
    answer_read,
    answer_stated,
)
from ship_ds.inference.example_index import COUNTED
from ship_ds.inference.induction import induce_many
from ship_ds.inference.reasoning import examples_alone, with_examples
from ship_ds.inference.results import LOSS_WEIGHT, RIGHT_WEIGHT, Induction

ASKED = {"asked": "where text is followed"}
"""Of a `union`'s settings: before, a base that follows no text was asked for one all the same."""


def search_settings(recipe: InductionConfig) -> dict[str, Any]:
    """What a search's results depend on, as JSON: its numbers, and those of the examples' index and
    of what it counts for where that is asked."""
    by_examples = recipe.searches_by_examples(0)
    settings = {
        "search": recipe.model_dump(mode="json"),
        "on_language": recipe.suited_to(0, by_examples).model_dump(mode="json"),
        **(ASKED if recipe.method == "union" else {}),
    }
    index: dict[str, Any] = {"index": COUNTED, "weights": [RIGHT_WEIGHT, LOSS_WEIGHT]}
    return settings | (index if by_examples else {})


def with_run_length(recipe: InductionConfig, ship: Ship) -> InductionConfig:
    """The search with texts as long as the run's own limit, unless one was set (`--set
    METHOD.max_new_tokens=40`)."""
    if "max_new_tokens" in recipe.model_fields_set:
        return recipe
    length = ship.config.evaluation.max_instruction_tokens
    return recipe.model_copy(update={"max_new_tokens": length})


class Searching(Untrained):
    """Induction by `recipe`, with texts as long as the run's own limit.

    What was induced from the same examples before is not searched for again: induction and
    reasoning are asked with the same ones, and the search is what costs.
    """

    answers_as_ship: ClassVar[bool] = True
    reads_examples: ClassVar[bool] = False
    """Whether its answers come of the shown examples too, where the encoder reads them beside a
    text; a control that read them would not be one."""
    recipe: ClassVar[InductionConfig]

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Of the search, and of what it becomes where people wrote the instructions."""
        more = {"reads_examples": True} if cls.reads_examples else {}
        return search_settings(cls.recipe) | more

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.search = with_run_length(self.recipe, self.ship)
        self.induced: dict[tuple[Example, ...], Induction] = {}

    @cached_property
    def bank(self) -> Bank:
        return self.ship.bank_to_search(self.search, log, self.seen)

    def induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        return [induction.instruction for induction in self._inductions(shown)]

    def reason(
        self, shown: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        """By the refined latent: the induced text, encoded again, with the shown examples where the
        encoder reads both."""
        texts = self.induce(shown)
        if not self.reads_examples:
            return self.answer(texts, inputs)
        model, length = self.ship.model, self.ship.config.evaluation.max_new_tokens
        readings = with_examples(model, texts, shown)
        return answer_read(model, readings, texts, inputs, length, keeps_cut_off=True)

    def reason_otherwise(
        self, shown: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]
    ) -> dict[str, AnswersByTask]:
        """By the latent that the search found, with the induced text in the prompt, and by the
        examples alone where the encoder reads them so."""
        inductions = self._inductions(shown)
        texts = [induction.instruction for induction in inductions]
        latent_TZ = torch.tensor([induction.latent for induction in inductions])
        readings = [induction.latent_reading for induction in inductions]
        model, length = self.ship.model, self.ship.config.evaluation.max_new_tokens
        answers = {
            "found": answer_latents(model, latent_TZ, texts, inputs, length, readings=readings),
            "stated": answer_stated(model, texts, inputs, length),
        }
        if self.reads_examples and model.config.encoder.reads_examples_alone:
            answers["read"] = answer_read(
                model, examples_alone(model, shown), texts, inputs, length
            )
        return answers

    def _inductions(self, shown: Sequence[Sequence[Example]]) -> list[Induction]:
        keys = [tuple(examples) for examples in shown]
        new = list(dict.fromkeys(key for key in keys if key not in self.induced))
        if new:
            search = self.ship.searching(self.search, log, self.seen)
            inductions = induce_many(self.ship.model, self.bank, new, search, self.seed, log)
            self.induced |= zip(new, inductions, strict=True)
        return [self.induced[key] for key in keys]

    def answer(self, wordings: Sequence[str], inputs: Sequence[Sequence[str]]) -> AnswersByTask:
        model, length = self.ship.model, self.ship.config.evaluation.max_new_tokens
        return answer_read(model, wordings, wordings, inputs, length, keeps_cut_off=True)
