"""Prompting: the bare base with the instruction in every query."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ship_ds.data.task import Example, SplitTask
from ship_ds.evaluation.methods.untrained import PromptRecipe, Untrained
from ship_ds.inference.deduction import AnswersByTask, answer_stated
from ship_ds.inference.scoring import PromptOf, losses_in_prompt


class Prompting(Untrained):
    """The upper reference of deduction: it pays for the instruction in every query."""

    name: ClassVar[str] = "prompting"
    about: ClassVar[str] = "the bare base with the instruction in every prompt"
    states_instruction: ClassVar[bool] = True
    recipe: ClassVar[PromptRecipe] = PromptRecipe()

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """In whose prompt."""
        return cls.recipe.settings()

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        model, length = self.ship.model, self.ship.config.evaluation.max_new_tokens
        return answer_stated(
            model, wordings, inputs, length, prompt=self._prompt, keeps_cut_off=True
        )

    def answer_losses(
        self,
        tasks: Sequence[SplitTask],
        wordings: Sequence[str],
        asked: Sequence[Sequence[Example]],
    ) -> list[list[float]]:
        """See `Predicts`."""
        return losses_in_prompt(self.ship.model, wordings, asked, self._prompt)

    @property
    def _prompt(self) -> PromptOf:
        prompts = self.ship.model.prompts
        is_published = self.recipe.prompt == "published"
        return prompts.published_task_prompt if is_published else prompts.task_prompt
