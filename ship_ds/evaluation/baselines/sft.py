"""Plain supervised fine-tuning."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ship_ds.data.task import SplitTask
from ship_ds.evaluation.baselines.static_adapters import TaskLoras
from ship_ds.evaluation.baselines.trained import TrainedMethod, targets_of
from ship_ds.inference.deduction import AnswersByTask


@dataclass(frozen=True)
class SftRecipe:
    """How fast the LoRA is trained."""

    lr: float = 2e-3


class Sft(TrainedMethod):
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

    def build(self) -> nn.Module:
        return TaskLoras(self.base.sites, self.base.lora)

    def train(self) -> None:
        """On the seen tasks, each in one of its wordings."""
        prompts = self.base.prompts

        def losses_at(step: int) -> Iterator[Tensor]:
            draws = self.sampler.draw_step(step)
            asked = [
                [prompts.task_prompt(example.input, draw.wording) for example in draw.answered]
                for draw in draws
            ]
            return self.base.losses(self.module(), asked, targets_of(draws))

        self.fit(losses_at, self.budget, self.recipe.lr, self.name)

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        questions = [
            [self.base.prompts.task_prompt(text, wording) for text in row]
            for row, wording in zip(inputs, wordings, strict=True)
        ]
        return self.base.answer(questions, lambda _: self.module())
