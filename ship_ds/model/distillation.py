"""Distillation: the Task LLM that reads the instruction teaches the one that has the adapter.

    loss: {distillation: 0.5}        {distillation: {weight: 0.5, temperature: 2}}

Both are the same frozen model, at the same tokens of the same answers: the teacher without an
adapter and with the instruction as text in its prompt, the student as it is trained.

Letters: E sequences, S padded length, K labelled positions, H hidden size.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ship_ds.config import DistillationConfig
from ship_ds.data.sampler import TaskDraw
from ship_ds.loss import num_pieces, sum_divergence_in_pieces
from ship_ds.model.batch import TokenBatch
from ship_ds.model.objectives import Objective
from ship_ds.model.step import Outputs, ShipBatch

if TYPE_CHECKING:
    from ship_ds.model.collate import Collator


class Distillation(Objective):
    """KL(teacher || student) of next tokens at the answers' labels (Hinton et al. 2015, arXiv
    1503.02531, section 2, where it is written as a cross-entropy with soft targets).

    The teacher's pass keeps nothing for the backward pass, and of both only the states before the
    labels stay: their logits are made a piece at a time, as the cross-entropy's are. It costs a
    pass of the Task LLM over prompts that are longer by the instruction. With
    `model.task_llm.instruction=hard` the student reads the instruction too.
    """

    def __init__(self, config: DistillationConfig) -> None:
        super().__init__(config)
        self.temperature = config.temperature

    def prepare(
        self, draws: Sequence[TaskDraw], collator: "Collator", device: torch.device
    ) -> TokenBatch:
        """The teacher's batch: the wording that the encoder reads as text, the same answers."""
        prompts = collator.prompts.task_llm
        pairs = [(example, draw.wording) for draw in draws for example in draw.answered]
        return TokenBatch.build(
            [prompts.task_prompt(example.input, wording) for example, wording in pairs],
            [prompts.target(example.target) for example, _ in pairs],
            prompts.pad_id,
            device=device,
        )

    def prepare_shapes(self, batch: ShipBatch) -> TokenBatch:
        """Prompts that are longer by the instruction, and no virtual tokens."""
        answers = batch.answers
        target_length = max(answers.target_lengths)
        question_length = max(answers.lengths) - answers.num_virtual_tokens - target_length
        return TokenBatch.of_lengths(
            len(answers.lengths),
            question_length + max(batch.instructions.lengths),
            target_length,
            device=answers.ids_ES.device,
        )

    def count(self, batch: ShipBatch) -> int:
        """Target tokens of the answers."""
        return batch.answers.num_targets

    def sum(self, outputs: Outputs) -> Tensor:
        """Over target tokens, times the temperature's square (section 2)."""
        batch, student = outputs.batch, outputs.answers
        lm = student.language_model
        with torch.no_grad():
            teacher_KH, _ = outputs.parts.task_llm(
                None, batch.extras["distillation"], batch.num_tasks, lm.packs
            )
        pieces = num_pieces(len(student.labels_K), lm.vocabulary_size, lm.is_sharded)
        divergence = sum_divergence_in_pieces(
            lm.head, student.states_KH, teacher_KH, self.temperature, pieces
        )
        return self.temperature**2 * divergence
