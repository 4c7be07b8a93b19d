"""Contrast: two wordings of one task are to have latents that are nearer to each other than to
those of other tasks.

    loss: {contrastive: 0.1}         {contrastive: {weight: 0.1, temperature: 0.05}}

Letters: T tasks, Z latent size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ship_ds.config import ContrastiveConfig
from ship_ds.data.sampler import TaskDraw
from ship_ds.errors import UserError
from ship_ds.model.batch import OnDevice, TokenBatch
from ship_ds.model.objectives import Objective, Training
from ship_ds.model.step import Outputs, ShipBatch

if TYPE_CHECKING:
    from ship_ds.model.collate import Collator


@dataclass(frozen=True)
class SecondWordings(OnDevice):
    """Another wording of each task of a micro-batch.

    instructions: what the encoder reads of them, T rows; of a task that has one wording, that one
    once more. has_two_T: whether a task has two. are_apart_TT: whether two tasks may be told apart:
    false for one task that was drawn twice and for tasks that share a wording. count: tasks that
    have two.
    """

    instructions: TokenBatch
    has_two_T: Tensor
    are_apart_TT: Tensor
    count: int


class Contrastive(Objective):
    """InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, equation 4) in both directions, as CLIP
    has it, of the posterior means of two wordings: the cosine of a task's own two, over the
    temperature, against those with the other tasks of the rank's micro-batch.

    A task with one wording is no positive pair, since that would be the same text twice: it is left
    out of the sum and of the count, and is one of the others for the rest. It is read a second time
    all the same, so that every rank makes the same passes.

    The others are those of a micro-batch. So this objective, unlike the rest, is another one on
    another number of ranks or under accumulation, and a micro-batch of one task teaches it nothing.
    """

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__(config)
        self.temperature = config.temperature

    def begin(self, training: Training) -> str:
        """Say how many tasks it learns from.

        Raises:
            UserError: none.
        """
        texts = [{one.task.instruction, *one.task.paraphrases} for one in training.tasks]
        num = sum(len(words) > 1 for words in texts)
        if not num:
            raise UserError(
                f"loss.contrastive: none of the {len(texts)} seen tasks has two wordings, so that "
                "there is nothing to learn from: add `paraphrases` to the tasks, or leave it out"
            )
        training.log(f"loss.contrastive: {num} of {len(texts)} seen tasks have two wordings")
        return ""

    def prepare(
        self, draws: Sequence[TaskDraw], collator: "Collator", device: torch.device
    ) -> SecondWordings:
        """The draws' other wordings."""
        texts = [draw.other_wording or draw.wording for draw in draws]
        words = [{draw.wording, text} for draw, text in zip(draws, texts, strict=True)]
        are_apart = [
            [
                one.task_id != other.task_id and not words[row] & words[column]
                for column, other in enumerate(draws)
            ]
            for row, one in enumerate(draws)
        ]
        has_two = [draw.other_wording is not None for draw in draws]
        return SecondWordings(
            collator.readings(texts, torch.device("cpu")),
            torch.tensor(has_two, device="cpu"),
            torch.tensor(are_apart, device="cpu"),
            sum(has_two),
        ).to(device)

    def prepare_shapes(self, batch: ShipBatch) -> SecondWordings:
        """As many instructions, as long."""
        tasks, device = batch.num_tasks, batch.noise_TZ.device
        return SecondWordings(
            batch.instructions,
            torch.ones(tasks, dtype=torch.bool, device=device),
            torch.ones(tasks, tasks, dtype=torch.bool, device=device),
            tasks,
        )

    def count(self, batch: ShipBatch) -> int:
        """Tasks with two wordings."""
        return int(batch.extras["contrastive"].count)

    def sum(self, outputs: Outputs) -> Tensor:
        """Over tasks with two wordings, the mean of both directions."""
        second: SecondWordings = outputs.batch.extras["contrastive"]
        other_TZ = outputs.parts.encoder(second.instructions, without_states=True)[0]
        cosine_TT = normalize(outputs.posterior.mean_TZ, dim=1) @ normalize(other_TZ, dim=1).T
        # The diagonal stays, though no task is apart from itself: it is the right answer, and a row
        # of -inf alone would have a loss that is no number.
        own_TT = torch.eye(len(other_TZ), dtype=torch.bool, device=other_TZ.device)
        logits_TT = (cosine_TT / self.temperature).masked_fill(
            ~(second.are_apart_TT | own_TT), -torch.inf
        )
        rows_T = torch.arange(len(other_TZ), device=other_TZ.device)
        losses_T = cross_entropy(logits_TT, rows_T, reduction="none")
        losses_T = losses_T + cross_entropy(logits_TT.T, rows_T, reduction="none")
        return (losses_T * second.has_two_T).sum() / 2
