"""One LoRA a task, trained by gradient: the upper reference of deduction."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch

from ship_ds.api import Ship
from ship_ds.data.task import SplitTask
from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.evaluation.baselines.oracles import OracleRecipe, group_size, train_group
from ship_ds.evaluation.baselines.static_adapters import TaskLoras
from ship_ds.evaluation.config import Direction
from ship_ds.evaluation.method import Setting
from ship_ds.inference.deduction import AnswersByTask


class LoraPerTask:
    """A LoRA of SHIP's rank and sites for each task that is asked, from that task's training
    examples.

    It reads no instruction. Of an unseen task it sees the examples that are not tested, which no
    other method of deduction does: what an adapter could be, no rival. It has a number of steps of
    its own, whatever the trained baselines may spend.
    """

    name: ClassVar[str] = "lora_per_task"
    about: ClassVar[str] = (
        "one LoRA a task, trained by gradient on the task's own training examples, of unseen tasks "
        "too: sees labels"
    )
    states_instruction: ClassVar[bool] = False
    answers_as_ship: ClassVar[bool] = False
    sees_labels: ClassVar[bool] = True
    asks_ship: ClassVar[bool] = False
    recipe: ClassVar[OracleRecipe] = OracleRecipe()

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """How each LoRA is trained."""
        return {"recipe": asdict(cls.recipe)}

    @classmethod
    def cannot(cls, ship: Ship) -> tuple[Direction, ...]:
        """It trains all that it needs."""
        return ()

    @classmethod
    def applies(cls, task: SplitTask, ship: Ship) -> bool:
        """To every task of every run."""
        return True

    def __init__(self, setting: Setting) -> None:
        self.setting, self.base = setting, FrozenBase.of_run(setting.ship)
        self.num_drawn = setting.ship.config.training.examples_per_task

    def prepare(self) -> None:
        """Which tasks will be asked is not known yet."""

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        """Train a group of tasks at a time, and answer under what came out.

        Args:
            tasks: whose training examples their LoRAs learn from.
            wordings: not read.
            inputs: one row a task.

        Returns:
            One row a task, one answer an input; a `CutOff` where it did not end in time.

        Raises:
            UserError: a loss is not finite.
        """
        answers: AnswersByTask = []
        size = group_size(self.base, [task.train for task in tasks], self.num_drawn)
        for start in range(0, len(tasks), size):
            group = tasks[start : start + size]
            title = f"{self.name}: {start + 1} to {start + len(group)} of {len(tasks)} tasks"
            answers += self._answer(group, inputs[start : start + size], title)
        return answers

    def _answer(
        self, group: Sequence[SplitTask], inputs: Sequence[Sequence[str]], title: str
    ) -> AnswersByTask:
        with torch.random.fork_rng():
            # Every LoRA starts from the same weights, whatever its group.
            torch.manual_seed(self.setting.seed)
            first = TaskLoras(self.base.sites, self.base.lora)
        examples = {task.id: task.train for task in group}
        lora = train_group(
            self.base, first, examples, self.recipe, self.num_drawn, self.setting.seed, title
        )
        questions = [[self.base.prompts.task_prompt(text) for text in row] for row in inputs]
        device = self.base.device
        return self.base.answer(
            questions, lambda tasks: lora.rows(torch.tensor(tasks, device=device))
        )
