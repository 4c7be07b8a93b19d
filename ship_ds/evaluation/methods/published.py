"""The two inductions of the paper (arXiv 2502.02315, section 3.3): gradient descent to a latent,
which the decoder reads."""

from typing import ClassVar

from ship_ds.evaluation.config import Direction
from ship_ds.evaluation.methods.searching import Searching
from ship_ds.inference.config import InductionConfig


class ShipIndirect(Searching):
    """Descent on the embeddings of a neutral instruction, through the encoder."""

    name: ClassVar[str] = "ship_indirect"
    about: ClassVar[str] = (
        "SHIP's induction as published, indirect: descent on the embeddings of a neutral "
        "instruction, then decoded"
    )
    recipe: ClassVar[InductionConfig] = InductionConfig.of_preset("published", "indirect")
    decoded: ClassVar[tuple[Direction, ...]] = ("induction", "reasoning")


class ShipDirect(Searching):
    """Descent on z."""

    name: ClassVar[str] = "ship_direct"
    about: ClassVar[str] = "SHIP's induction as published, direct: descent on z, then decoded"
    recipe: ClassVar[InductionConfig] = InductionConfig.of_preset("published", "direct")
    decoded: ClassVar[tuple[Direction, ...]] = ("induction", "reasoning")
