"""Text-to-LoRA."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from ship_ds.evaluation.baselines.generated_lora import GeneratedLora, PooledReader
from ship_ds.evaluation.baselines.oracles import OracleRecipe, Oracles
from ship_ds.evaluation.baselines.trained import targets_of


@dataclass(frozen=True)
class TextToLoraRecipe:
    """How the oracles and the hypernetwork after them are trained."""

    oracles: OracleRecipe = OracleRecipe()
    reconstruction_share: float = 0.1
    reconstruction_lr: float = 1e-3
    sft_lr: float = 1.5e-3


class TextToLora(GeneratedLora):
    """A hypernetwork from a frozen embedding of the instruction to a LoRA (Charakorn et al. 2025,
    arXiv 2506.06105).

    Both of its trainings, one after the other: reconstruction of oracle LoRAs (section 3.2), then
    answers through the generated LoRA (section 3.3), which the paper finds the better one on unseen
    tasks. Simplified: the embedding is the frozen base's own (the paper's ablation; its default is
    a separate embedding model), the heads are SHIP's, and the oracles get a share of the same
    minutes.
    """

    name: ClassVar[str] = "text_to_lora"
    about: ClassVar[str] = "a hypernetwork from a frozen embedding of the instruction"
    recipe: ClassVar[TextToLoraRecipe] = TextToLoraRecipe()

    def reader(self, latent_size: int) -> nn.Module:
        return PooledReader(self.base.hidden_size, latent_size)

    def train(self) -> None:
        recipe = self.recipe
        oracles = self.train_oracles(recipe.oracles)
        self.match(oracles)
        left = self.budget.rest(recipe.oracles.share, oracles.used) - recipe.reconstruction_share
        sft = self.budget.share(left)
        self.fit(self._sft_losses, sft, recipe.sft_lr, f"{self.name}: sft")

    def match(self, oracles: Oracles) -> None:
        """The pre-stage, reconstruction: generated LoRAs close to the oracles', without the Task
        LLM; on the tasks that have one."""
        tasks = [task for task in self.setting.splits.seen if task.id in oracles.rows]
        sampler, recipe = replace(self.sampler, tasks=tasks), self.recipe

        def losses_at(step: int) -> Iterator[Tensor]:
            draws = sampler.draw_step(step)
            yield oracles.distance(
                self.generate([draw.wording for draw in draws]), [draw.task_id for draw in draws]
            )

        budget = self.budget.share(recipe.reconstruction_share)
        self.fit(losses_at, budget, recipe.reconstruction_lr, f"{self.name}: reconstruction")

    def _sft_losses(self, step: int) -> Iterator[Tensor]:
        draws = self.sampler.draw_step(step)
        return self.base.losses(
            lambda tasks: self.generate([draws[t].wording for t in tasks]),
            self.questions(draws),
            targets_of(draws),
        )
