"""What the methods share that take the run as it is."""

from typing import Any, ClassVar, Literal

from ship_ds.api import Ship
from ship_ds.data.task import SplitTask
from ship_ds.evaluation.config import Direction
from ship_ds.evaluation.method import Setting
from ship_ds.kinds import ADAPTERS
from ship_ds.section import Section


class PromptRecipe(Section):
    """Of a method that asks the bare base."""

    prompt: Literal["own", "published"] = "own"
    """In our words, or in those of the instruction-induction paper (Honovich et al. 2022)."""

    def settings(self) -> dict[str, Any]:
        """What a cell depends on; our own words were not named before there were others."""
        return {} if self.prompt == "own" else {"prompt": self.prompt}


class Untrained:
    """Nothing of its own is trained, so it costs no time before it is asked."""

    states_instruction: ClassVar[bool] = False
    answers_as_ship: ClassVar[bool] = False
    sees_labels: ClassVar[bool] = False
    asks_ship: ClassVar[bool] = True
    decoded: ClassVar[tuple[Direction, ...]] = ("reconstruction",)
    """Directions that need a decoder which was trained."""

    @classmethod
    def applies(cls, task: SplitTask, ship: Ship) -> bool:
        """To every task of every run."""
        return True

    @classmethod
    def cannot(cls, ship: Ship) -> tuple[Direction, ...]:
        """What is read out of a latent, of a run that trained no decoder."""
        return () if ship.model.decodes else cls.decoded

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """None."""
        return {}

    def __init__(self, setting: Setting) -> None:
        self.ship, self.seed, self.seen = setting.ship, setting.seed, setting.splits.seen

    def prepare(self) -> None:
        """Nothing is trained."""


def makes_lora(ship: Ship) -> bool:
    """Whether what the run's hypernetwork generates is a LoRA and nothing else."""
    return ADAPTERS.implementation(ship.config.model.hypernetwork).leaves == "lora"
