"""What the methods share that take the run as it is."""

from typing import Any, ClassVar

from ship_ds.evaluation.method import Setting


class Untrained:
    """Nothing of its own is trained, so it costs no time before it is asked."""

    states_instruction: ClassVar[bool] = False
    answers_as_ship: ClassVar[bool] = False

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """None."""
        return {}

    def __init__(self, setting: Setting) -> None:
        self.ship, self.seed = setting.ship, setting.seed

    def prepare(self) -> None:
        """Nothing is trained."""
