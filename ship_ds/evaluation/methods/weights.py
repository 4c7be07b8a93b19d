"""Instructions read out of an adapter's weights alone, without an example."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from ship_ds.api import Ship
from ship_ds.data.task import Example, SplitTask
from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.evaluation.baselines.oracles import OracleRecipe, train_group
from ship_ds.evaluation.baselines.static_adapters import TaskLoras
from ship_ds.evaluation.method import Setting
from ship_ds.evaluation.methods.searching import with_run_length
from ship_ds.evaluation.methods.untrained import Untrained, makes_lora
from ship_ds.inference.adapter_reading import induce_from_weights
from ship_ds.inference.bank import Bank
from ship_ds.inference.config import InductionConfig
from ship_ds.model.adapters.adapter import Adapter


class _WeightsReader(Untrained):
    """The instruction whose adapter lies nearest a given one."""

    answers_as_ship: ClassVar[bool] = True
    recipe: ClassVar[InductionConfig] = InductionConfig()

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.known = [task.task.instruction for task in self.seen]
        self.search = with_run_length(self.recipe, self.ship)

    @cached_property
    def bank(self) -> Bank:
        return Bank.build(self.ship.model, self.known)

    def read(self, adapter: Adapter) -> str:
        induction = induce_from_weights(self.ship.model, self.bank, adapter, self.search, self.seed)
        return induction.instruction


class ReadOwnAdapter(_WeightsReader):
    """Of the adapters that SHIP itself makes of each instruction."""

    name: ClassVar[str] = "read_own_adapter"
    about: ClassVar[str] = (
        "the weights of SHIP's own adapter read back as text; a seen task's instruction is among "
        "the known ones that are compared"
    )

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Of the search."""
        return {"search": cls.recipe.model_dump(mode="json")}

    def reconstruct(self, wordings: Sequence[str]) -> list[str]:
        """Instruction, latent, adapter, text."""
        model = self.ship.model
        latents = model.encode(wordings)
        return [
            self.read(model.adapt(latents[row : row + 1]))
            for row in tqdm(range(len(wordings)), desc=self.name, mininterval=5)
        ]


class ReadTrainedLora(_WeightsReader):
    """Of a LoRA that gradient descent makes of the shown examples."""

    name: ClassVar[str] = "read_trained_lora"
    about: ClassVar[str] = (
        "a LoRA trained by gradient on the shown examples, its weights read as text"
    )
    lora: ClassVar[OracleRecipe] = OracleRecipe()

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Of the search, and how the LoRA is trained."""
        return {"search": cls.recipe.model_dump(mode="json"), "lora": vars(cls.lora)}

    @classmethod
    def applies(cls, task: SplitTask, ship: Ship) -> bool:
        """Where the run's own adapters are LoRAs, which can be compared with one."""
        return makes_lora(ship)

    @cached_property
    def base(self) -> FrozenBase:
        return FrozenBase.of_run(self.ship)

    def induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        """One LoRA and one text a task."""
        return [self.read(self._lora(examples)) for examples in shown]

    def _lora(self, examples: Sequence[Example]) -> Adapter:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            first = TaskLoras(self.base.sites, self.base.lora)
        return train_group(
            self.base,
            first,
            {repr(examples): examples},
            self.lora,
            len(examples),
            self.seed,
            self.name,
        )
