"""An objective of somebody else's: distillation from the same Task LLM with the instruction in its
prompt, the KL between next-token distributions at the answers' labels. The package's own
(ship_ds/model/distillation.py) does with less memory.

    SHIP_DS_PLUGINS=tests.toys.objective ... loss.toy_distillation=0.5

Letters: K labelled positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor

from ship_ds.config import ObjectiveConfig
from ship_ds.data.sampler import TaskDraw
from ship_ds.kinds import OBJECTIVES
from ship_ds.model.batch import TokenBatch
from ship_ds.model.collate import Collator
from ship_ds.model.objectives import Objective
from ship_ds.model.step import Outputs, ShipBatch


class DistillationConfig(ObjectiveConfig):
    temperature: PositiveFloat = 1.0


class Distillation(Objective):
    def __init__(self, config: DistillationConfig) -> None:
        self.temperature = config.temperature

    def prepare(
        self, draws: Sequence[TaskDraw], collator: Collator, device: torch.device
    ) -> TokenBatch:
        """The teacher's batch: the instruction as text, the same answers."""
        prompts = collator.prompts.task_llm
        pairs = [(example, draw.wording) for draw in draws for example in draw.answered]
        return TokenBatch.build(
            [prompts.task_prompt(example.input, wording) for example, wording in pairs],
            [prompts.target(example.target) for example, _ in pairs],
            prompts.pad_id,
            device=device,
        )

    def prepare_shapes(self, batch: ShipBatch) -> TokenBatch:
        return batch.answers

    def count(self, batch: ShipBatch) -> int:
        return batch.answers.num_targets

    def sum(self, outputs: Outputs) -> Tensor:
        teacher_batch: Any = outputs.batch.extras["toy_distillation"]
        task_llm = outputs.parts.task_llm
        with torch.no_grad():
            teacher_KV, _ = task_llm.score(None, teacher_batch, outputs.batch.num_tasks)
        aims_KV = (teacher_KV.float() / self.temperature).log_softmax(1)
        logits_KV = (outputs.answers.logits_KV.float() / self.temperature).log_softmax(1)
        return (aims_KV.exp() * (aims_KV - logits_KV)).sum()


OBJECTIVES.register(DistillationConfig, Distillation, "toy_distillation")
