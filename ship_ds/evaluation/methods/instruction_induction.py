"""Instruction Induction (Honovich et al. 2022, arXiv 2205.10782): the base names the task when
shown examples of it."""

from collections.abc import Sequence
from typing import ClassVar

from ship_ds.data.task import Example
from ship_ds.evaluation.methods.untrained import Untrained
from ship_ds.model.batch import TokenBatch

_ROWS = 120


class InstructionInduction(Untrained):
    """The bare base, greedily, with the prompt that SHIP's decoder reads ("This task is to:")
    instead of the paper's own."""

    name: ClassVar[str] = "instruction_induction"

    def induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        model, num_tokens = self.ship.model, self.ship.config.evaluation.max_instruction_tokens
        form, texts = model.prompts, []
        for start in range(0, len(shown), _ROWS):
            ids = [form.decoder_prompt(examples) for examples in shown[start : start + _ROWS]]
            batch = TokenBatch.build(ids, None, form.pad_id, device=model.device)
            rows = model.task_llm.generate(None, batch, form.eos_id, num_tokens)
            texts += [form.text(row) for row in rows]
        return texts
