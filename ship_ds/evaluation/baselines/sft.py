"""Plain supervised fine-tuning."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from ship_ds.data.sampler import ReadingDraw
from ship_ds.data.task import SplitTask
from ship_ds.evaluation.baselines.static_adapters import TaskLoras
from ship_ds.evaluation.baselines.trained import TrainedMethod, targets_of
from ship_ds.evaluation.questions import examples_to_read
from ship_ds.evaluation.shots import TakesShots, prompt_with_shots, settings_of_shots
from ship_ds.inference.deduction import AnswersByTask


@dataclass(frozen=True)
class SftRecipe:
    """How fast the LoRA is trained, and on which prompts.

    num_examples: training examples of the task after the instruction. A step draws how many, from
    none to that many, as the encoder's are drawn; asked, there are as many as that.
    """

    lr: float = 2e-3
    num_examples: Annotated[int, Field(ge=0, le=32)] = 0


class Sft(TakesShots, TrainedMethod):
    """One LoRA for all tasks, trained on answers with the instruction in the prompt (Hu et al.
    2021; Wei et al. 2022).

    An upper reference, not a rival at equal cost: every query pays for the instruction. The LoRA
    has SHIP's rank and targets.
    """

    name: ClassVar[str] = "sft"
    about: ClassVar[str] = "one LoRA for all tasks, trained with the instruction in the prompt"
    states_instruction: ClassVar[bool] = True
    recipe: ClassVar[SftRecipe] = SftRecipe()
    module: TaskLoras

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """See `settings_of_shots`: the draw is of what is asked, and training has its own."""
        return super().settings() | settings_of_shots(cls.recipe.num_examples)

    @classmethod
    def numbers(cls) -> dict[str, Any]:
        """Without a number of examples where it is none: it was not named before there were any."""
        numbers = super().numbers()
        return {key: number for key, number in numbers.items() if key != "num_examples" or number}

    def build(self) -> nn.Module:
        return TaskLoras(self.base.sites, self.base.lora)

    def train(self) -> None:
        """On the seen tasks, each in one of its wordings."""
        ship, reading = self.setting.ship, ReadingDraw(max_examples=self.recipe.num_examples)
        sampler = replace(self.sampler, reading=reading)

        def losses_at(step: int) -> Iterator[Tensor]:
            draws = sampler.draw_step(step)
            asked = [
                [
                    prompt_with_shots(
                        ship, one.input, draw.wording, draw.reading.examples, one.target
                    )
                    for one in draw.answered
                ]
                for draw in draws
            ]
            return self.base.losses(self.module(), asked, targets_of(draws))

        self.fit(losses_at, self.budget, self.recipe.lr, self.name)

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        ship, count, seed = self.setting.ship, self.recipe.num_examples, self.setting.seed
        shots = [examples_to_read(task, count, seed) for task in tasks]
        questions = [
            [prompt_with_shots(ship, text, wording, some) for text in row]
            for row, wording, some in zip(inputs, wordings, shots, strict=True)
        ]
        return self.base.answer(questions, lambda _: self.module())
