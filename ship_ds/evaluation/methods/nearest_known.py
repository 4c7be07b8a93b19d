"""The nearest known instruction: of those seen in training, the one that explains the shown
examples best."""

from typing import ClassVar

from ship_ds.evaluation.methods.searching import Searching
from ship_ds.inference.config import InductionConfig


class NearestKnown(Searching):
    """It invents nothing: on unseen rules it is right only where a seen rule answers alike.

    What explains best is decided by both uses of the text, as an adapter and in the prompt where
    the base follows text there, on every shown example. Up to 2,000 known instructions are all
    tried on one example first; of more, those that a walk over their latents meets. The best 48 are
    tested on two examples, and of these on all.
    """

    name: ClassVar[str] = "nearest_known"
    about: ClassVar[str] = "the seen instruction that explains the shown examples best"
    recipe: ClassVar[InductionConfig] = InductionConfig(
        method="bank",
        num_known=48,
        num_finalists=48,
        tries_all_known=True,
        # A control that SHIP's own decoder helps would depend on what it is there to control.
        asks_decoder=False,
    )
