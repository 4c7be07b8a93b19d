"""Prompting: the bare base with the instruction in every query."""

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field, model_validator

from ship_ds.data.task import Example, SplitTask
from ship_ds.evaluation.methods.untrained import PromptRecipe, Untrained
from ship_ds.evaluation.questions import examples_to_read
from ship_ds.evaluation.shots import TakesShots, prompt_with_shots, settings_of_shots
from ship_ds.inference.deduction import AnswersByTask, Ids, bare_answerer
from ship_ds.inference.scoring import losses_in_prompt


class PromptingRecipe(PromptRecipe):
    """What the prompt holds beside the input."""

    num_examples: int = Field(0, ge=0, le=32)
    """Training examples of the task after the instruction: those that `ship_one_pass` reads, where
    it reads as many."""

    @model_validator(mode="after")
    def _published_words_have_no_place_for_examples(self) -> "PromptingRecipe":
        if self.num_examples and self.prompt == "published":
            raise ValueError("num_examples is of our own prompt: leave prompt=published out")
        return self

    def settings(self) -> dict[str, Any]:
        """See `PromptRecipe`."""
        return super().settings() | settings_of_shots(self.num_examples)


class Prompting(TakesShots, Untrained):
    """The upper reference of deduction: it pays for the instruction in every query."""

    name: ClassVar[str] = "prompting"
    about: ClassVar[str] = "the bare base with the instruction in every prompt"
    states_instruction: ClassVar[bool] = True
    asks_ship: ClassVar[bool] = False
    recipe: ClassVar[PromptingRecipe] = PromptingRecipe()

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """In whose prompt, and with how many examples."""
        return cls.recipe.settings()

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        questions = [
            [self._prompt(text, (wording, self._shots(task), "")) for text in texts]
            for task, wording, texts in zip(tasks, wordings, inputs, strict=True)
        ]
        answering = bare_answerer(self.ship.model, keeps_cut_off=True)
        return answering.answers(questions, self.ship.config.evaluation.max_new_tokens)

    def answer_losses(
        self,
        tasks: Sequence[SplitTask],
        wordings: Sequence[str],
        asked: Sequence[Sequence[Example]],
    ) -> list[list[float]]:
        """See `Predicts`."""
        target = self.ship.model.prompts.target
        stated = [
            # The longest in tokens, which need not have the most characters.
            (
                wording,
                self._shots(task),
                max((one.target for one in row), key=lambda text: len(target(text)), default=""),
            )
            for task, wording, row in zip(tasks, wordings, asked, strict=True)
        ]
        return losses_in_prompt(self.ship.model, stated, asked, self._prompt)

    def _shots(self, task: SplitTask) -> tuple[Example, ...]:
        return examples_to_read(task, self.recipe.num_examples, self.seed)

    def _prompt(self, text: str, stated: tuple[str, Sequence[Example], str]) -> Ids:
        """stated: the instruction, the shots, and the longest target that is scored."""
        instruction, shots, target = stated
        if self.recipe.prompt == "published":
            return self.ship.model.prompts.published_task_prompt(text, instruction)
        return prompt_with_shots(self.ship, text, instruction, shots, target)
