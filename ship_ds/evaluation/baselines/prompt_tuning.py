"""Prompt tuning.

Letters: T tasks, P virtual tokens, H hidden size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ship_ds.data.task import Example, SplitTask
from ship_ds.evaluation.baselines.fitting import Steps, fit
from ship_ds.evaluation.baselines.static_adapters import StaticSoftPrompt
from ship_ds.evaluation.baselines.trained import TrainedMethod
from ship_ds.inference.deduction import AnswersByTask
from ship_ds.model import budget
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
    states_instruction: ClassVar[bool] = False
    recipe: ClassVar[PromptTuningRecipe] = PromptTuningRecipe()
    module: StaticSoftPrompt

    def build(self) -> nn.Module:
        """Started from the embeddings of random tokens, as published."""
        lm = self.base.task_llm.language_model
        ids_P = torch.randint(lm.vocabulary_size, (self.recipe.num_virtual_tokens,))
        return StaticSoftPrompt(lm.embed_ids(ids_P.to(self.base.device)))

    def train(self) -> None:
        sampler = self.sampler

        def loss_at(step: int) -> Tensor:
            return self._loss(self.module, [draw.answered for draw in sampler.draw_step(step)], 1)

        fit(self.module.parameters(), loss_at, self.budget, self.recipe.lr, self.name)

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        return self._answer(self.module, inputs)

    def reason(
        self, shown: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        answers: AnswersByTask = []
        at_once = self._num_tuned_together(shown)
        for start in range(0, len(shown), at_once):
            prompts = self.tune(shown[start : start + at_once])
            answers += self._answer(prompts, inputs[start : start + at_once])
        return answers

    def _num_tuned_together(self, shown: Sequence[Sequence[Example]]) -> int:
        """Tasks of a batch: what their examples keep for the backward pass has to fit."""
        form, costs = self.base.prompts, self.base.task_llm.language_model.costs
        targets = [len(form.target(e.target)) for row in shown for e in row]
        asked = [len(form.task_prompt(e.input)) for row in shown for e in row]
        longest = max(targets, default=1)
        width = self.recipe.num_virtual_tokens + max(asked, default=1) + longest
        task_bytes = max(map(len, shown), default=1) * costs.trained_row(width, longest)
        return max(1, budget.bytes_free(self.base.device) // task_bytes)

    def tune(self, shown: Sequence[Sequence[Example]]) -> StaticSoftPrompt:
        """One soft prompt a task, from its shown examples; tasks that show fewer than others repeat
        theirs."""
        width = max(map(len, shown))
        even = [[row[i % len(row)] for i in range(width)] for row in shown]
        prompts = StaticSoftPrompt(self.module.prompt_TPH[0], len(shown)).to(self.base.device)
        fit(
            prompts.parameters(),
            lambda step: self._loss(prompts, even, len(shown)),
            Steps(self.recipe.reasoning_steps),
            self.recipe.reasoning_lr,
            f"{self.name}: {len(shown)} tasks",
            clip=math.inf,
        )
        return prompts

    def _loss(
        self, prompt: StaticSoftPrompt, examples: Sequence[Sequence[Example]], num_tasks: int
    ) -> Tensor:
        rows = [example for row in examples for example in row]
        asked = [self.base.prompts.task_prompt(example.input) for example in rows]
        batch = self.base.batch(
            asked, [example.target for example in rows], self.recipe.num_virtual_tokens
        )
        return self.base.loss_per_task(prompt(), batch, num_tasks)

    def _answer(self, prompt: StaticSoftPrompt, inputs: Sequence[Sequence[str]]) -> AnswersByTask:
        questions = [[self.base.prompts.task_prompt(text) for text in row] for row in inputs]
        num_prompts = len(prompt.prompt_TPH)

        def adapter_of(tasks: Sequence[int]) -> SoftPrompt:
            if num_prompts == 1:
                return prompt()
            return prompt().rows(torch.tensor(tasks, device=self.base.device))

        return self.base.answer(questions, adapter_of, self.recipe.num_virtual_tokens)
