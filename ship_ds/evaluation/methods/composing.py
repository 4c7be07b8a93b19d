"""Two instructions at once, by the sum of their adapters."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from ship_ds.api import Ship
from ship_ds.data.task import SplitTask
from ship_ds.evaluation.methods.untrained import Untrained, makes_lora
from ship_ds.inference.deduction import AnswersByTask, answer_under
from ship_ds.model.adapters.adapter import Adapter

_JOINT = " and then "


class AdapterSum(Untrained):
    """`ship-ds compose`: the adapters of A and of B, added, for a rule that is worded "A and then
    B". Asked of such rules alone; SHIP's own row has what their one instruction gives."""

    name: ClassVar[str] = "adapter_sum"
    about: ClassVar[str] = (
        'of generated rules "A and then B" alone: the adapters of A and of B, added'
    )
    answers_as_ship: ClassVar[bool] = True

    @classmethod
    def applies(cls, task: SplitTask, ship: Ship) -> bool:
        """To a generated rule of two steps, where adapters are LoRAs; elsewhere the words mean what
        they like."""
        is_two_steps = task.task.source == "rules" and task.task.instruction.count(_JOINT) == 1
        return is_two_steps and makes_lora(ship)

    @torch.no_grad()
    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        """Each task's answers under the sum of the adapters of its instruction's two steps.

        Args:
            tasks: whose instructions, and not the wordings, are parted into steps.
            wordings: one a task, for a Task LLM that reads an instruction too.
            inputs: one row a task.

        Returns:
            One row a task, one answer an input; a `CutOff` where it did not end in time.
        """
        model, length = self.ship.model, self.ship.config.evaluation.max_new_tokens
        return [
            # By the instruction, whatever the wording: that may join its steps by other words.
            answer_under(
                model,
                self._sum(task.task.instruction.split(_JOINT)),
                wording,
                texts,
                length,
                keeps_cut_off=True,
            )
            for task, wording, texts in zip(tasks, wordings, inputs, strict=True)
        ]

    def _sum(self, steps: Sequence[str]) -> Adapter:
        model = self.ship.model
        exports = model.hypernetwork.exports(model.adapt(model.encode(steps)))
        total, _, _ = type(exports[0]).summed([(1.0, export) for export in exports], None)
        return total.live()
