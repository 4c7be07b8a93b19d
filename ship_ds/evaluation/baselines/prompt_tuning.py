"""Prompt tuning.

Letters: T tasks, P virtual tokens, H hidden size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ship_ds.data.task import Example, SplitTask
from ship_ds.evaluation.baselines.fitting import fit
from ship_ds.evaluation.baselines.static_adapters import StaticSoftPrompt
from ship_ds.evaluation.baselines.trained import TrainedMethod
from ship_ds.evaluation.budgets import Steps
from ship_ds.inference.deduction import AnswersByTask, Ids
from ship_ds.model.adapters.soft_prompt import SoftPrompt


@dataclass(frozen=True)
class PromptTuningRecipe:
    """How many embeddings are trained, and how fast."""

    num_virtual_tokens: int = 10
    lr: float = 1e-2
    reasoning_lr: float = 3e-2
    reasoning_steps: int = 60


class PromptTuning(TrainedMethod):
    """Embeddings before the prompt are trained, the base is not (Lester et al. 2021).

    deduction: one soft prompt for all seen tasks, without the instruction, so what the task is
    remains unknown to it.
    reasoning: from that prompt on (as SPoT does, Vu et al. 2022), one prompt a task is trained on
    its shown examples alone; all tasks of a batch at once, each example's loss reaching its own
    task's prompt only.
    Simplified: a fixed number of steps instead of a choice by validation, which few examples do not
    allow.
    """

    name: ClassVar[str] = "prompt_tuning"
    about: ClassVar[str] = (
        "one soft prompt for all tasks; in reasoning one a task, trained on the shown examples"
    )
    states_instruction: ClassVar[bool] = False
    recipe: ClassVar[PromptTuningRecipe] = PromptTuningRecipe()
    module: StaticSoftPrompt

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """And how tasks are tuned side by side in reasoning; before, those that show fewer examples
        than others repeated some of theirs."""
        return {**super().settings(), "tuned": "with those that show as many"}

    def build(self) -> nn.Module:
        """Started from the embeddings of random tokens, as published."""
        lm = self.base.task_llm.language_model
        ids_P = torch.randint(lm.vocabulary_size, (self.recipe.num_virtual_tokens,))
        return StaticSoftPrompt(lm.embed_ids(ids_P.to(self.base.device)))

    def train(self) -> None:
        """One prompt for all seen tasks."""

        def losses_at(step: int) -> Iterator[Tensor]:
            draws = self.sampler.draw_step(step)
            rows = [draw.answered for draw in draws]
            return self.base.losses(self.module(), *self._asked(rows))

        self.fit(losses_at, self.budget, self.recipe.lr, self.name)

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        return self._answer(self.module, inputs)

    def reason(
        self, shown: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        return self._answer(self.tune(shown), inputs) if shown else []

    def tune(self, shown: Sequence[Sequence[Example]]) -> StaticSoftPrompt:
        """One soft prompt a task, from its shown examples. Tasks that show equally many are trained
        together: a task's prompt does not depend on the others."""
        prompts = StaticSoftPrompt(self.module.prompt_TPH[0], len(shown)).to(self.base.device)
        for size in sorted({len(row) for row in shown}):
            places = [place for place, row in enumerate(shown) if len(row) == size]
            tuned = self._tune_together([shown[place] for place in places])
            with torch.no_grad():
                prompts.prompt_TPH[places] = tuned.prompt_TPH
        return prompts

    def _tune_together(self, shown: Sequence[Sequence[Example]]) -> StaticSoftPrompt:
        device = self.base.device
        prompts = StaticSoftPrompt(self.module.prompt_TPH[0], len(shown)).to(device)
        fit(
            prompts.parameters(),
            lambda step: self.base.losses_per_task(
                lambda tasks: prompts().rows(torch.tensor(tasks, device=device)),
                *self._asked(shown),
            ),
            Steps(self.recipe.reasoning_steps),
            self.recipe.reasoning_lr,
            f"{self.name}: {len(shown)} tasks",
            clip=math.inf,
        )
        return prompts

    def _asked(
        self, examples: Sequence[Sequence[Example]]
    ) -> tuple[list[list[Ids]], list[list[str]], int]:
        """Prompts and targets, one row a task, and the virtual tokens before each."""
        form = self.base.prompts
        return (
            [[form.task_prompt(example.input) for example in row] for row in examples],
            [[example.target for example in row] for row in examples],
            self.recipe.num_virtual_tokens,
        )

    def _answer(self, prompt: StaticSoftPrompt, inputs: Sequence[Sequence[str]]) -> AnswersByTask:
        questions = [[self.base.prompts.task_prompt(text) for text in row] for row in inputs]
        num_prompts = len(prompt.prompt_TPH)

        def adapter_of(tasks: Sequence[int]) -> SoftPrompt:
            if num_prompts == 1:
                return prompt()
            return prompt().rows(torch.tensor(tasks, device=self.base.device))

        return self.base.answer(questions, adapter_of, self.recipe.num_virtual_tokens)
