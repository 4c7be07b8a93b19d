"""Instruction Induction (Honovich et al. 2022, arXiv 2205.10782): the base names the task when shown examples of it."""

from collections.abc import Sequence
from typing import ClassVar

from ship_ds.data.task import Example
from ship_ds.evaluation.method import Setting
from ship_ds.model.batch import TokenBatch

_ROWS = 120


class InstructionInduction:
    """The bare base, greedily, with the prompt that SHIP's decoder reads ("This task is to:") instead of the paper's own."""

    name: ClassVar[str] = "instruction_induction"
    states_instruction: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        self.model, self.max_new_tokens = setting.ship.model, setting.ship.config.evaluation.max_instruction_tokens

    def prepare(self) -> None:
        """Nothing is trained."""

    def induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        form, texts = self.model.prompts, []
        for start in range(0, len(shown), _ROWS):
            ids = [form.decoder_prompt(examples) for examples in shown[start : start + _ROWS]]
            batch = TokenBatch.build(ids, None, form.pad_id, device=self.model.device)
            rows = self.model.task_llm.generate(None, batch, form.eos_id, self.max_new_tokens)
            texts += [form.text(row) for row in rows]
        return texts
