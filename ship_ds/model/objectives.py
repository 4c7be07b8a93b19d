"""Objectives: what training minimises, each by its name, with a sum, a count and a weight.

The model's forward gives the sum of every objective over a micro-batch; the trainer divides by the
count over the whole step, all ranks and accumulation included, and adds up by the weights of the
config's `loss` section. Trainer, log, TensorBoard, figures and planner loop over the names. The
paper's three are here; others have files of their own (distillation.py, contrastive.py, cycle.py,
oracles.py).

A new objective is a class with a config class in the table `kinds.OBJECTIVES`; it may be an
nn.Module, whose parameters then train along. They belong into submodules such as nn.Linear: `sum`
is no forward, so ZeRO-3 would not gather a parameter of the objective itself. And every rank has to
call the same modules in every micro-step, or the ranks wait for each other for ever.
docs/extending.md has an example.

Letters: E sequences, K labelled positions, T tasks, Z latent size.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ship_ds.config import AnswerLossConfig, KlConfig
from ship_ds.console import Log
from ship_ds.data.sampler import TaskDraw
from ship_ds.data.task import SplitTask
from ship_ds.kinds import OBJECTIVES
from ship_ds.model.batch import TokenBatch
from ship_ds.model.step import Outputs, Parts, ShipBatch
from ship_ds.section import Section

if TYPE_CHECKING:
    from ship_ds.model.collate import Collator


@dataclass(frozen=True)
class Training:
    """What a run tells its objectives before it trains.

    tasks: that it trains on. base: fingerprints of the Task LLM's base, named `the base`
    (`bundle.fingerprints`). prompts: the description of its prompt format. log: takes lines of
    progress.
    """

    tasks: Sequence[SplitTask]
    base: Mapping[str, str]
    prompts: Mapping[str, Any]
    log: Log


class Objective(ABC):
    """One term of the loss; made from its section of the config, whose weight is the trainer's."""

    reads_texts: ClassVar[bool] = False
    """Whether it needs what the decoder predicts: a run in which no objective of a weight above
    zero does trains no decoder."""

    def __init__(self, config: Section) -> None:
        super().__init__()

    def meet(self, parts: Parts) -> None:
        """Remember what it has to know of the model that it is an objective of; called once, as the
        model is put together, of real weights or of shapes."""
        return

    def begin(self, training: Training) -> str:
        """The fingerprint of what it reads from disk as it trains, which a run that goes on has to
        find again; "": nothing. Called once, before a training makes its first batch, on every
        rank; whoever opens a run or plans one needs none of it.

        Raises:
            UserError: it does not fit the run.
        """
        return ""

    def prepare(
        self, draws: Sequence[TaskDraw], collator: "Collator", device: torch.device
    ) -> Any | None:
        """What `sum` needs of a micro-batch's texts.

        Args:
            draws: this rank's tasks of the micro-step.
            collator: the model's, which knows its prompts.
            device: where the model is.

        Returns:
            That, on `device`; `sum` will find it in `outputs.batch.extras` under the objective's
            name. None: nothing.

        Raises:
            UserError: it does not fit the run.
        """
        return None

    def prepare_shapes(self, batch: ShipBatch) -> Any | None:
        """As `prepare` for a plan, which has no texts: the batch's shapes, on the meta device."""
        return None

    @abstractmethod
    def count(self, batch: ShipBatch) -> int:
        """Over how many things `sum` sums, known on the host: no tensor on a device is read."""

    @abstractmethod
    def sum(self, outputs: Outputs) -> Tensor:
        """A scalar in nats, with its gradient."""


class AnswerLoss(Objective):
    """Cross-entropy of the answers, -log p(y | x, z), by target token, or by answer of the mean
    over its own tokens.

    A step has labels of two tokens beside answers of forty, which have nearly all of its tokens.
    """

    def __init__(self, config: AnswerLossConfig) -> None:
        super().__init__(config)
        self.by_answer = config.mean_over == "answers"

    def count(self, batch: ShipBatch) -> int:
        """Target tokens of the answers, or answers."""
        return len(batch.answers.lengths) if self.by_answer else batch.answers.num_targets

    def sum(self, outputs: Outputs) -> Tensor:
        """Over target tokens, or over the means of answers."""
        weights_K = _one_over_length(outputs.batch.answers) if self.by_answer else None
        return outputs.answers.sum_cross_entropy(weights_K)


def _one_over_length(answers: TokenBatch) -> Tensor:
    """For each label 1 / (labels of its answer), (K,), fp32: on the device alone, no number of it
    is read."""
    row_K = answers.label_row_K
    # In fp32, whatever the engine's dtype: bf16 counts no further than 256.
    ones_K = torch.ones(len(row_K), device=row_K.device)
    length_E = ones_K.new_zeros(len(answers.lengths)).index_add(0, row_K, ones_K)
    return length_E.reciprocal()[row_K]


class ReconstructionLoss(Objective):
    """Cross-entropy of the instruction that the decoder reads, -log p(k | z[, x, y]), by token;
    zero where no decoder is trained."""

    reads_texts: ClassVar[bool] = True

    def count(self, batch: ShipBatch) -> int:
        """Tokens of the instructions."""
        return batch.decoded.num_targets

    def sum(self, outputs: Outputs) -> Tensor:
        """Over the tokens of the instructions."""
        if outputs.texts is None:
            return outputs.kl_TZ.new_zeros(())
        return outputs.texts.sum_cross_entropy()


class KlLoss(Objective):
    """KL(q(z | k) || p(z)), averaged over the dimensions of z as published.

    Free bits (Kingma et al. 2016, arXiv 1606.04934): what of a task's KL in a dimension is below
    `free_bits` counts as that and has no gradient. They average over the minibatch before they
    compare; here each task is compared by itself, since a rank knows its own tasks alone and the
    step may not depend on how many ranks there are.

    Capacity (Burgess et al. 2018, arXiv 1804.03599): |KL - C| of each task.
    """

    def __init__(self, config: KlConfig) -> None:
        super().__init__(config)
        self.config = config

    def count(self, batch: ShipBatch) -> int:
        """Tasks."""
        return batch.num_tasks

    def sum(self, outputs: Outputs) -> Tensor:
        """Over tasks."""
        kl_TZ = outputs.kl_TZ
        if self.config.free_bits:
            # Before the mean: free bits are of each dimension, capacity of a task.
            kl_TZ = kl_TZ.clamp(min=self.config.free_bits)
        kl_T = kl_TZ.mean(1)
        capacity = self.config.capacity_at(outputs.batch.step)
        return (kl_T if capacity is None else (kl_T - capacity).abs()).sum()


def trains_decoder(weights: Mapping[str, float]) -> bool:
    """Whether an objective of a weight above zero needs what the decoder predicts.

    Args:
        weights: of the objectives by name.
    """
    return any(
        weight > 0 and OBJECTIVES.implementation(name).reads_texts
        for name, weight in weights.items()
    )


def build_objectives(sections: Mapping[str, Section]) -> dict[str, Objective]:
    """Every objective of the config by name, in its order, which is the order of the sum."""
    return {name: OBJECTIVES.implementation(name)(section) for name, section in sections.items()}
