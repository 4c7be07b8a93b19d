"""What goes into SHIP's forward and what comes out of it: the batch, the parts, the sums.

Letters: K labelled positions, T tasks, V vocabulary, H hidden size, Z latent size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ship_ds.loss import num_pieces, sum_cross_entropy_in_pieces
from ship_ds.model.adapters.adapter import Adapter, Hypernetwork
from ship_ds.model.batch import OnDevice, TokenBatch
from ship_ds.model.decoder import Decoder
from ship_ds.model.encoder import Encoder, Posterior
from ship_ds.model.language_model import LanguageModel
from ship_ds.model.priors import Prior
from ship_ds.model.task_llm import TaskLlm


@dataclass(frozen=True)
class ShipBatch(OnDevice):
    """A rank's share of one micro-step, tensors only.

    instructions: what the encoder reads, T rows. answers: what the Task LLM reads, task-major.
    decoded: what the decoder reads, T rows. noise_TZ: the posterior's. chance_T: see
    `adapters.adapter.States`. extras: what objectives prepared for themselves, by their names.
    decodes: whether a decoder is trained, which reads it. step: the global step that it is of, for
    what follows a schedule.
    """

    instructions: TokenBatch
    answers: TokenBatch
    decoded: TokenBatch
    shows_latent_T: Tensor
    noise_TZ: Tensor
    chance_T: Tensor
    extras: Mapping[str, Any] = field(default_factory=dict)
    decodes: bool = True
    step: int = 0

    def with_extra(self, name: str, value: Any) -> "ShipBatch":
        """The same with what the objective `name` prepared."""
        return replace(self, extras={**self.extras, name: value})

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.noise_TZ)

    @property
    def num_tokens(self) -> int:
        """Tokens of all that are read, padding left out."""
        parts = (self.answers, self.instructions, *((self.decoded,) if self.decodes else ()))
        return sum(part.num_tokens for part in parts)


@dataclass(frozen=True)
class Parts:
    """SHIP's parts; ShipModel registers them, objectives may call them."""

    encoder: Encoder
    prior: Prior
    hypernetwork: Hypernetwork
    task_llm: TaskLlm
    decoder: Decoder


@dataclass(frozen=True)
class Predictions:
    """What a language model predicts of labels (K,): states (K, H), of which its output layer makes
    logits when they are wanted, all at once or for a loss in pieces."""

    language_model: LanguageModel
    states_KH: Tensor
    labels_K: Tensor

    @cached_property
    def logits_KV(self) -> Tensor:
        """All of them; a large vocabulary makes them the largest tensor of a step."""
        return self.language_model.head(self.states_KH)

    def sum_cross_entropy(self, weights_K: Tensor | None = None) -> Tensor:
        """Sum of token losses in nats, each times its weight (K,) where there are any."""
        lm = self.language_model
        pieces = num_pieces(len(self.labels_K), lm.vocabulary_size, lm.is_sharded)
        return sum_cross_entropy_in_pieces(
            lm.head, self.states_KH, self.labels_K, pieces, weights_K
        )


@dataclass(frozen=True)
class Outputs:
    """All that the forward of a micro-batch computed; one sample of z feeds everything.

    answers: the Task LLM's under the generated adapter. texts: the decoder's; None where none is
    trained. kl_TZ: from the
    posterior to the model's prior, by dimension.
    """

    parts: Parts
    batch: ShipBatch
    posterior: Posterior
    latent_TZ: Tensor
    kl_TZ: Tensor
    adapter: Adapter
    answers: Predictions
    texts: Predictions | None


@dataclass(frozen=True)
class StepSums:
    """Sums over a micro-batch: every objective's by name, in the order of the config's weights.

    kl_TZ: from the posterior to the prior, without gradient; which latent units are in use.
    """

    objectives: dict[str, Tensor]
    kl_TZ: Tensor
