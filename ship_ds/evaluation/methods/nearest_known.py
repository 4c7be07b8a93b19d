"""The nearest known instruction: of those seen in training, the one that explains the shown
examples best."""

from typing import ClassVar

from ship_ds.evaluation.methods.searching import Searching
from ship_ds.inference.config import InductionConfig


class NearestKnown(Searching):
    """It invents nothing: on unseen rules it is right only where a seen rule answers alike.

    What explains best is decided by both uses of the text, as an adapter and in the prompt, on
    every shown example. Up to 200 known instructions are all tried on one example first; of more,
    those that a walk over their latents meets. The best 16 are tested on two examples, and the best
    4 of these on all.
    """

    name: ClassVar[str] = "nearest_known"
    about: ClassVar[str] = "the seen instruction that explains the shown examples best"
    recipe: ClassVar[InductionConfig] = InductionConfig(
        method="bank",
        num_known=16,
        num_finalists=4,
        tries_all_known=True,
        walk="brief",
        # A control that SHIP's own decoder helps would depend on what it is there to control.
        asks_decoder=False,
    )
