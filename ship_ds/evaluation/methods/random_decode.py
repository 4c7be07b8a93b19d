"""Random decode: what the decoder makes of a z drawn from the prior, without having seen an
example.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from ship_ds.data.task import Example
from ship_ds.evaluation.config import Direction
from ship_ds.evaluation.methods.untrained import Untrained
from ship_ds.model.drawing import keyed_generator


class RandomDecode(Untrained):
    """The control of induction: how often a plausible instruction is right by chance."""

    name: ClassVar[str] = "random_decode"
    about: ClassVar[str] = "control: the decoder's text of a latent drawn from the prior"

    decoded: ClassVar[tuple[Direction, ...]] = ("induction",)

    def induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        """One decoded draw a task."""
        model, length = self.ship.model, self.ship.config.evaluation.max_instruction_tokens
        # keyed by the task's examples, so that it is the same on whichever rank
        keys = [f"{self.seed} 0 {tuple(examples)!r}" for examples in shown]
        draws = [model.prior.sample(1, keyed_generator(key)) for key in keys]
        return model.decode(torch.cat(draws).to(model.device), length) if draws else []
