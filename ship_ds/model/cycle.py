"""Cycle consistency: what the decoder writes of a latent is to be read back as that latent.

    z -> text -> z'                      loss: {cycle: 0.1}

    loss: {cycle: {weight: 0.1, latents: prior, num_tokens: 24}}

z is the step's own (then the way is text -> z -> text -> z') or a draw from the prior, of which no
task has a text. The text is written greedily and carries no gradient; what learns is the encoder.

Letters: T tasks, Z latent size, Y generated tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ship_ds.config import CycleConfig
from ship_ds.data.sampler import TaskDraw
from ship_ds.errors import UserError
from ship_ds.model.batch import OnDevice, TokenBatch
from ship_ds.model.decoder import Decoder
from ship_ds.model.drawing import keyed_generator
from ship_ds.model.generation import greedy_of_length
from ship_ds.model.objectives import Objective
from ship_ds.model.priors import Prior
from ship_ds.model.step import Outputs, Parts, ShipBatch

if TYPE_CHECKING:
    from ship_ds.model.collate import Collator


@dataclass(frozen=True)
class CycleInputs(OnDevice):
    """What stands before the texts of a micro-batch, and what needs more than shapes: a plan has
    others.

    undecoded: what the decoder reads of z alone, T rows. draw: the prior and the posterior's noise
    (T, Z) -> each task's latent from the prior, (T, Z). read: written token ids (T, Y) -> what the
    encoder reads of them, T rows.
    """

    undecoded: TokenBatch
    draw: Callable[[Prior, Tensor], Tensor]
    read: Callable[[Tensor], TokenBatch]


class Cycle(Objective):
    """|z - E q(z' | text)|^2 / 2Z, the KL in nats between Gaussians of variance one around the two,
    a dimension; the sleep phase of wake-sleep (Hinton et al. 1995, "The wake-sleep algorithm for
    unsupervised neural networks") where z is drawn from the prior.

    Every text has `num_tokens` tokens before it is cut at its end: a rank whose texts end sooner
    makes as many passes of the decoder as the others, as ZeRO-3 needs, and the host waits for the
    device once and not once a token. A text that has not ended by then is read as it stands.
    """

    def __init__(self, config: CycleConfig) -> None:
        super().__init__(config)
        self.config = config

    def meet(self, parts: Parts) -> None:
        """See `Objective`."""
        self.context = parts.decoder.language_model.context_length

    def prepare(
        self, draws: Sequence[TaskDraw], collator: "Collator", device: torch.device
    ) -> CycleInputs:
        """Of texts alone.

        Raises:
            UserError: the decoder's context has no room for as many tokens as are to be written.
        """
        prompts = collator.prompts.decoder

        def read(ids_TY: Tensor) -> TokenBatch:
            texts = [_readable(prompts.text(row), collator) for row in ids_TY.tolist()]
            return collator.readings(texts, torch.device("cpu")).to(ids_TY.device)

        undecoded = collator.undecoded(len(draws), torch.device("cpu"))
        before, num_tokens = max(undecoded.lengths), self.config.num_tokens
        if self.context is not None and before + num_tokens > self.context:
            raise UserError(
                f"loss.cycle.num_tokens ({num_tokens}): the decoder reads at most {self.context} "
                f"tokens, {before} of which stand before the text: set {self.context - before} or "
                "less"
            )
        return CycleInputs(undecoded, _drawn, read).to(device)

    def prepare_shapes(self, batch: ShipBatch) -> CycleInputs:
        """Prompts as long as the decoder's are with their examples, and texts that never end."""
        tasks, device, decoded = batch.num_tasks, batch.noise_TZ.device, batch.decoded
        places = decoded.num_virtual_tokens
        length = max(decoded.lengths) - places - max(decoded.target_lengths)
        # The words around an instruction are no more than the longest one that the batch has.
        longest = max(batch.instructions.lengths) + self.config.num_tokens
        return CycleInputs(
            TokenBatch.of_lengths(tasks, length, 0, places, device),
            lambda _, noise_TZ: torch.zeros_like(noise_TZ),
            lambda ids_TY: TokenBatch.of_lengths(tasks, longest, 0, device=device),
        )

    def count(self, batch: ShipBatch) -> int:
        """Tasks."""
        return batch.num_tasks

    def sum(self, outputs: Outputs) -> Tensor:
        """Over tasks."""
        parts, inputs = outputs.parts, outputs.batch.extras["cycle"]
        latent_TZ = outputs.latent_TZ.detach()
        if self.config.latents == "prior":
            with torch.no_grad():
                latent_TZ = inputs.draw(parts.prior, outputs.batch.noise_TZ).to(latent_TZ)
        ids_TY = _written(parts.decoder, latent_TZ, inputs.undecoded, self.config.num_tokens)
        mean_TZ = parts.encoder(inputs.read(ids_TY), without_states=True)[0]
        return (latent_TZ - mean_TZ).square().mean(1).sum() / 2


def _drawn(prior: Prior, noise_TZ: Tensor) -> Tensor:
    """A latent for each task, keyed by its noise, as that is by seed, step and task: the same on
    any number of ranks, and another one at each step."""
    keys = noise_TZ[:, 0].float().tolist()
    return torch.cat([prior.sample(1, keyed_generator(f"cycle {key!r}")) for key in keys])


def _readable(text: str, collator: "Collator") -> str:
    """The text, or as much of its beginning as the encoder's context has room for: its tokenizer
    may make more of it than the decoder's."""
    most = collator.encoder_context
    while most is not None and text and len(collator.read_prompt(text)) > most:
        text = text[: len(text) // 2]
    return text


@torch.no_grad()
def _written(decoder: Decoder, latent_TZ: Tensor, undecoded: TokenBatch, num_tokens: int) -> Tensor:
    """What the decoder writes of each latent, (T, Y), without its dropout."""
    was_training = decoder.training
    decoder.eval()
    try:
        return greedy_of_length(decoder.stream(latent_TZ, None, undecoded), num_tokens)
    finally:
        decoder.train(was_training)
