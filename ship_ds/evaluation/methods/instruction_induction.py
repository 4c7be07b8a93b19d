"""Instruction Induction (Honovich et al. 2022, arXiv 2205.10782): the base names the task when
shown examples of it."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ship_ds.data.task import Example
from ship_ds.evaluation.methods.untrained import PromptRecipe, Untrained
from ship_ds.inference.proposals import asked_texts, without_preamble


class InstructionInduction(Untrained):
    """The bare base, greedily, with the prompt that SHIP's decoder reads ("This task is to:"), or
    with the paper's own."""

    name: ClassVar[str] = "instruction_induction"
    about: ClassVar[str] = "the bare base names the task when shown the examples"
    asks_ship: ClassVar[bool] = False
    recipe: ClassVar[PromptRecipe] = PromptRecipe()

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """In whose prompt."""
        return cls.recipe.settings()

    def induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        length = self.ship.config.evaluation.max_instruction_tokens
        model = self.ship.model
        if self.recipe.prompt == "own":
            return asked_texts(model, shown, length)
        texts = asked_texts(model, shown, length, model.prompts.published_induction_prompt)
        return [without_preamble(text) for text in texts]
