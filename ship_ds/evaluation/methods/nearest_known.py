"""The nearest known instruction: of those seen in training, the one that explains the shown examples best."""

from typing import ClassVar

from ship_ds.evaluation.methods.searching import Searching
from ship_ds.inference.induction import InductionConfig


class NearestKnown(Searching):
    """It invents nothing: on unseen rules it is right only where a seen rule answers alike."""

    name: ClassVar[str] = "nearest_known"
    search: ClassVar[InductionConfig] = InductionConfig(method="bank")
