"""The nearest known instruction: of those seen in training, the one that explains the shown
examples best."""

from typing import ClassVar

from ship_ds.evaluation.methods.searching import Searching
from ship_ds.inference.config import InductionConfig


class NearestKnown(Searching):
    """It invents nothing: on unseen rules it is right only where a seen rule answers alike."""

    name: ClassVar[str] = "nearest_known"
    recipe: ClassVar[InductionConfig] = InductionConfig(
        method="bank", num_known=48, num_finalists=48, tries_all_known=True
    )
