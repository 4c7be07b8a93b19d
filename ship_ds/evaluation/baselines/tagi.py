"""TAGI: task adapters generation from instructions."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ship_ds.evaluation.baselines.fitting import fit
from ship_ds.evaluation.baselines.generated_lora import AttentionReader, GeneratedLora
from ship_ds.loss import sum_cross_entropy


@dataclass(frozen=True)
class TagiRecipe:
    oracle_share: float = 0.3
    oracle_lr: float = 5e-3
    lr: float = 1e-3
    num_layers: int = 1
    num_queries: int = 4
    logit_weight: float = 0.5
    parameter_weight: float = 0.1


class Tagi(GeneratedLora):
    """A hypernetwork taught by task-specific models at three levels (Liao et al. 2024, arXiv 2406.12382).

    First an oracle LoRA is trained on each seen task's examples; then the hypernetwork's LoRA is matched to it in its
    parameters, in the logits that it gives (KL from the oracle's distribution), and to the labels. Simplified: no
    pre-training of the hypernetwork on plain text (there is none here), the instruction is read by trained attention over the
    frozen base's states instead of a T5 encoder, and the base reads no instruction (the published one may).
    """

    name: ClassVar[str] = "tagi"
    recipe: ClassVar[TagiRecipe] = TagiRecipe()

    def reader(self, latent_size: int) -> nn.Module:
        return AttentionReader(self.base.hidden_size, latent_size, self.recipe.num_layers, self.recipe.num_queries)

    def train(self) -> None:
        recipe, sampler = self.recipe, self.sampler()
        oracles = self.train_oracles(recipe.oracle_share, recipe.oracle_lr)

        def loss_at(step: int) -> Tensor:
            draws = sampler.draw_step(step)
            names, batch = [draw.task_id for draw in draws], self.answered(draws)
            student = self.generate([draw.wording for draw in draws])
            logits_KV, labels_K = self.base.label_logits(student, batch, len(draws))
            with torch.no_grad():
                wanted_KV, _ = self.base.label_logits(oracles.of(names, self.base.device), batch, len(draws))
            divergence = torch.nn.functional.kl_div(
                logits_KV.float().log_softmax(-1), wanted_KV.float().log_softmax(-1), reduction="batchmean", log_target=True
            )
            labels = sum_cross_entropy(logits_KV, labels_K) / len(labels_K)
            return labels + recipe.logit_weight * divergence + recipe.parameter_weight * oracles.distance(student, names)

        fit(self.module.parameters(), loss_at, self.budget.share(1 - recipe.oracle_share), recipe.lr, self.name)
