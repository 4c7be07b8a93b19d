"""TAGI: task adapters generation from instructions.

Letters: K labelled positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ship_ds.data.sampler import TaskDraw
from ship_ds.evaluation.baselines.generated_lora import AttentionReader, GeneratedLora
from ship_ds.evaluation.baselines.oracles import OracleRecipe, Oracles
from ship_ds.evaluation.baselines.trained import targets_of
from ship_ds.loss import sum_cross_entropy
from ship_ds.model.batch import TokenBatch
from ship_ds.model.budget import Piece


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
    about: ClassVar[str] = "a hypernetwork from the instruction, taught by one LoRA a seen task"
    recipe: ClassVar[TagiRecipe] = TagiRecipe()

    def reader(self, latent_size: int) -> nn.Module:
        return AttentionReader(
            self.base.hidden_size, latent_size, self.recipe.num_layers, self.recipe.num_queries
        )

    def train(self) -> None:
        """The oracles, and then the hypernetwork."""
        oracles, sampler = self.train_oracles(self.recipe.oracles), self.sampler
        budget = self.budget.share(self.budget.rest(self.recipe.oracles.share, oracles.used))
        self.fit(
            lambda step: self.student_losses(oracles, sampler.draw_step(step)),
            budget,
            self.recipe.lr,
            self.name,
        )

    def student_losses(self, oracles: Oracles, draws: Sequence[TaskDraw]) -> Iterator[Tensor]:
        """Labels of all tasks; logits and parameters of those that have an oracle. In pieces that
        add up to the mean over target tokens, and over tasks."""
        asked, targets = self.questions(draws), targets_of(draws)
        weights = self._weights(oracles, draws)
        # Student and oracle: an adapter with its gradient, and one more without.
        task_bytes = 2 * self.base.adapter_bytes
        for parts, batch in self.base.pieces(asked, targets, task_bytes=task_bytes):
            yield self._piece(oracles, [draws[part.task] for part in parts], parts, batch, weights)

    def _weights(self, oracles: Oracles, draws: Sequence[TaskDraw]) -> "_Weights":
        def num_labels(some: Sequence[TaskDraw]) -> int:
            rows = (example.target for draw in some for example in draw.answered)
            return sum(len(self.base.prompts.target(text)) for text in rows)

        taught = [draw for draw in draws if draw.task_id in oracles.rows]
        num_rows = sum(len(draw.answered) for draw in taught)
        return _Weights(
            1 / num_labels(draws),
            self.recipe.logit_weight / max(1, num_labels(taught)),
            self.recipe.parameter_weight / max(1, num_rows),
        )

    def _piece(
        self,
        oracles: Oracles,
        draws: Sequence[TaskDraw],
        parts: Sequence[Piece],
        batch: TokenBatch,
        weights: "_Weights",
    ) -> Tensor:
        student = self.generate([draw.wording for draw in draws])
        logits_KV, labels_K = self.base.label_logits(student, batch, len(draws))
        loss = weights.label * sum_cross_entropy(logits_KV, labels_K)
        places = [t for t, draw in enumerate(draws) if draw.task_id in oracles.rows]
        if not places:
            return loss
        names = [draw.task_id for draw in draws]
        # A task without an oracle borrows another's, so that one batch serves both: what it gives
        # is left out below.
        borrowed = [name if name in oracles.rows else names[places[0]] for name in names]
        with torch.no_grad():
            target_KV, _ = self.base.label_logits(oracles.of(borrowed), batch, len(draws))
        taught = torch.tensor(places, device=self.base.device)
        num_rows = parts[0].stop - parts[0].start
        is_taught_K = torch.isin(batch.label_row_K // num_rows, taught)
        divergence = kl_divergence(target_KV[is_taught_K], logits_KV[is_taught_K])
        distance = oracles.distance(student.rows(taught), [names[t] for t in places])
        return (
            loss
            + weights.logit * int(is_taught_K.sum()) * divergence
            + weights.parameter * len(places) * num_rows * distance
        )


@dataclass(frozen=True)
class _Weights:
    """Of a label token, of a token under an oracle, and of a row of a task that has one."""

    label: float
    logit: float
    parameter: float


def kl_divergence(target_KV: Tensor, logits_KV: Tensor) -> Tensor:
    """KL(target || given) of next-token distributions in nats, the mean over tokens."""
    target_KV, logits_KV = target_KV.float().log_softmax(-1), logits_KV.float().log_softmax(-1)
    return torch.nn.functional.kl_div(logits_KV, target_KV, reduction="batchmean", log_target=True)
