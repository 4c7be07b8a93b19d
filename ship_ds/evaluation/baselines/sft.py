"""Plain supervised fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ship_ds.data.task import SplitTask
from ship_ds.evaluation.baselines.fitting import fit
from ship_ds.evaluation.baselines.static_adapters import StaticLora
from ship_ds.evaluation.baselines.trained import TrainedMethod
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
    states_instruction: ClassVar[bool] = True
    recipe: ClassVar[SftRecipe] = SftRecipe()
    module: StaticLora

    def build(self) -> nn.Module:
        return StaticLora(self.base.sites, self.base.lora)

    def train(self) -> None:
        sampler, prompts = self.sampler, self.base.prompts

        def loss_at(step: int) -> Tensor:
            rows = [
                (example, draw.wording)
                for draw in sampler.draw_step(step)
                for example in draw.answered
            ]
            asked = [prompts.task_prompt(example.input, wording) for example, wording in rows]
            return self.base.loss(
                self.module(), self.base.batch(asked, [example.target for example, _ in rows]), 1
            )

        fit(self.module.parameters(), loss_at, self.budget, self.recipe.lr, self.name)

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        questions = [
            [self.base.prompts.task_prompt(text, wording) for text in row]
            for row, wording in zip(inputs, wordings, strict=True)
        ]
        return self.base.answer(questions, lambda _: self.module())
