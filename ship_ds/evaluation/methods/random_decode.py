"""Random decode: what the decoder says of a z drawn from the prior, without having seen an
example."""

from collections.abc import Sequence
from typing import ClassVar

from ship_ds.data.task import Example
from ship_ds.evaluation.methods.untrained import Untrained
from ship_ds.model.encoder import posterior_noise


class RandomDecode(Untrained):
    """The control of induction: how often a plausible instruction is right by chance."""

    name: ClassVar[str] = "random_decode"

    def induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        # of the task, whichever rank it falls to
        keys = [repr(tuple(examples)) for examples in shown]
        config = self.ship.config
        latent_TZ = posterior_noise(self.seed, 0, keys, config.model.latent_size).to(
            self.ship.model.device
        )
        return self.ship.model.decode(latent_TZ, config.evaluation.max_instruction_tokens)
