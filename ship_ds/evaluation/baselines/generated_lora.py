"""What TAGI and Text-to-LoRA have in common: an instruction becomes a LoRA in one forward pass,
with no decoder.

Letters: T tasks, S padded length, H hidden size, Q learned queries, Z latent size.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ship_ds.data.sampler import TaskDraw
from ship_ds.data.task import SplitTask
from ship_ds.evaluation.baselines.oracles import OracleRecipe, Oracles, train_oracles
from ship_ds.evaluation.baselines.trained import TrainedMethod
from ship_ds.inference.deduction import AnswersByTask, Ids
from ship_ds.model.adapters.adapter import Target
from ship_ds.model.adapters.lora import LoraAdapter, LoraHypernetwork


class PooledReader(nn.Module):
    """A frozen embedding of the instruction, its last and its mean hidden state, through a trained
    MLP."""

    def __init__(self, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(2 * hidden_size),
            nn.Linear(2 * hidden_size, 2 * latent_size),
            nn.SiLU(),
            nn.Linear(2 * latent_size, latent_size),
        )

    def forward(self, hidden_TSH: Tensor, real_TS: Tensor) -> Tensor:
        num_real_T1 = real_TS.sum(1, keepdim=True)
        mean_TH = (hidden_TSH * real_TS[..., None]).sum(1) / num_real_T1
        # Padded on the right (`FrozenBase.read`), so the last real token stands at their number.
        last_TH = hidden_TSH.take_along_dim(num_real_T1[..., None] - 1, 1)[:, 0]
        latent_TZ: Tensor = self.layers(torch.cat([last_TH, mean_TH], 1))
        return latent_TZ


class AttentionReader(nn.Module):
    """Trained self-attention over the frozen hidden states, and learned queries that gather from
    them."""

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        num_layers: int,
        num_queries: int,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            hidden_size,
            num_heads,
            4 * hidden_size,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.queries_QH = nn.Parameter(torch.randn(num_queries, hidden_size))
        self.gather = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.to_latent = nn.Linear(num_queries * hidden_size, latent_size)

    def forward(self, hidden_TSH: Tensor, real_TS: Tensor) -> Tensor:
        hidden_TSH = self.encoder(self.norm(hidden_TSH), src_key_padding_mask=~real_TS)
        queries_TQH = self.queries_QH.expand(len(hidden_TSH), -1, -1)
        gathered_TQH, _ = self.gather(
            queries_TQH, hidden_TSH, hidden_TSH, key_padding_mask=~real_TS, need_weights=False
        )
        latent_TZ: Tensor = self.to_latent(gathered_TQH.flatten(1))
        return latent_TZ


class Generator(nn.Module):
    """A reader of frozen hidden states and SHIP's own LoRA hypernetwork behind it."""

    def __init__(self, reader: nn.Module, hypernetwork: LoraHypernetwork) -> None:
        super().__init__()
        self.reader, self.hypernetwork = reader, hypernetwork

    def forward(self, hidden_TSH: Tensor, real_TS: Tensor) -> LoraAdapter:
        adapter: LoraAdapter = self.hypernetwork(self.reader(hidden_TSH, real_TS))
        return adapter


class GeneratedLora(TrainedMethod):
    """Deduction by a generated LoRA, and the pieces that both trainings are made of."""

    states_instruction: ClassVar[bool] = False
    in_stages: ClassVar[bool] = True
    module: Generator

    def build(self) -> nn.Module:
        latent_size = self.base.lora.width
        return Generator(
            self.reader(latent_size),
            LoraHypernetwork(
                self.base.lora, latent_size, Target(self.base.sites, self.base.hidden_size)
            ),
        )

    @abstractmethod
    def reader(self, latent_size: int) -> nn.Module:
        """From the hidden states of an instruction (T, S, H) and where they are real (T, S) to (T,
        Z)."""

    def generate(self, wordings: Sequence[str]) -> LoraAdapter:
        return self.module(*self.base.read(wordings))

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        questions = [[self.base.prompts.task_prompt(text) for text in row] for row in inputs]
        return self.base.answer(
            questions, lambda tasks: self.generate([wordings[t] for t in tasks])
        )

    def train_oracles(self, recipe: OracleRecipe) -> Oracles:
        """Of the seen tasks; what an oracle is worth for others, no score on dev tells."""
        return train_oracles(
            self.base,
            self.setting.splits.seen,
            self.budget.without_dev().share(recipe.share),
            recipe,
            self.setting.ship.config.training.examples_per_task,
            self.setting.seed,
        )

    def questions(self, draws: Sequence[TaskDraw]) -> list[list[Ids]]:
        """The prompts of the draws' examples, one row a task, without the instruction."""
        return [
            [self.base.prompts.task_prompt(example.input) for example in draw.answered]
            for draw in draws
        ]
