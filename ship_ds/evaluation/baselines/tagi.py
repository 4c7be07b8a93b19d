"""TAGI: task adapters generation from instructions.

Letters: K labelled positions, V vocabulary, E sequences, S padded length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ship_ds.data.sampler import TaskDraw
from ship_ds.evaluation.baselines.fitting import fit
from ship_ds.evaluation.baselines.generated_lora import AttentionReader, GeneratedLora
from ship_ds.evaluation.baselines.oracles import OracleRecipe, Oracles
from ship_ds.loss import sum_cross_entropy


@dataclass(frozen=True)
class TagiRecipe:
    """How the oracles and the hypernetwork after them are trained."""

    oracles: OracleRecipe = OracleRecipe()
    lr: float = 1.5e-3
    num_layers: int = 1
    num_queries: int = 4
    logit_weight: float = 0.5
    parameter_weight: float = 0.1


class Tagi(GeneratedLora):
    """A hypernetwork taught by task-specific models at three levels (Liao et al. 2024, arXiv
    2406.12382).

    First an oracle LoRA is trained on each seen task's examples; then the hypernetwork's LoRA is
    matched to it in its parameters, in the logits that it gives (KL from the oracle's
    distribution), and to the labels. Simplified: no pre-training of the hypernetwork on plain text
    (there is none here), the instruction is read by trained attention over the frozen base's states
    instead of a T5 encoder, and the base reads no instruction (the published one may).
    """

    name: ClassVar[str] = "tagi"
    recipe: ClassVar[TagiRecipe] = TagiRecipe()

    def reader(self, latent_size: int) -> nn.Module:
        return AttentionReader(
            self.base.hidden_size, latent_size, self.recipe.num_layers, self.recipe.num_queries
        )

    def train(self) -> None:
        oracles, sampler = self.train_oracles(self.recipe.oracles), self.sampler
        budget = self.budget.share(1 - self.recipe.oracles.share)
        fit(
            self.module.parameters(),
            lambda step: self.student_loss(oracles, sampler.draw_step(step)),
            budget,
            self.recipe.lr,
            self.name,
        )

    def student_loss(self, oracles: Oracles, draws: Sequence[TaskDraw]) -> Tensor:
        """Labels of all tasks; logits and parameters of those that have an oracle."""
        student, batch = self.generate([draw.wording for draw in draws]), self.answered(draws)
        logits_KV, labels_K = self.base.label_logits(student, batch, len(draws))
        loss = sum_cross_entropy(logits_KV, labels_K) / len(labels_K)
        taught = torch.tensor(
            [t for t, draw in enumerate(draws) if draw.task_id in oracles.rows],
            device=self.base.device,
        )
        if not len(taught):
            return loss
        taught_draws = [draws[t] for t in taught.tolist()]
        names = [draw.task_id for draw in taught_draws]
        with torch.no_grad():
            target_KV, _ = self.base.label_logits(
                oracles.of(names), self.answered(taught_draws), len(taught_draws)
            )
        is_taught_K = torch.isin(batch.label_row_K * len(draws) // len(batch.ids_ES), taught)
        return (
            loss
            + self.recipe.logit_weight * kl_divergence(target_KV, logits_KV[is_taught_K])
            + self.recipe.parameter_weight * oracles.distance(student.rows(taught), names)
        )


def kl_divergence(target_KV: Tensor, logits_KV: Tensor) -> Tensor:
    """KL(target || given) of next-token distributions in nats, the mean over tokens."""
    target_KV, logits_KV = target_KV.float().log_softmax(-1), logits_KV.float().log_softmax(-1)
    return torch.nn.functional.kl_div(logits_KV, target_KV, reduction="batchmean", log_target=True)
