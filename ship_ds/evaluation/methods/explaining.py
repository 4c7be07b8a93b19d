"""Adapters that gradient descent made of the shown examples, put into words by `Ship.explain`."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from ship_ds.data.task import Example
from ship_ds.evaluation.methods.searching import ASKED
from ship_ds.evaluation.methods.weights import ReadTrainedLora
from ship_ds.inference.explaining import NUM_INPUTS, explain_many


class ExplainTrainedLora(ReadTrainedLora):
    """By weights, by its answers to inputs of other tasks, and by the known instructions."""

    name: ClassVar[str] = "explain"
    about: ClassVar[str] = (
        "a LoRA trained by gradient on the shown examples, put into words by its weights and by "
        "its answers to inputs of seen tasks; empty where no text gives enough of them"
    )

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Of the search, of the LoRA, and how many inputs it is asked."""
        return {**super().settings(), "num_inputs": NUM_INPUTS, **ASKED}

    @cached_property
    def inputs(self) -> list[str]:
        return self.ship.inputs_to_try()

    def induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        """One LoRA and one text a task; none is an empty text."""
        adapters = [self._lora(examples) for examples in shown]
        explanations = explain_many(
            self.ship.model,
            self.bank,
            adapters,
            [self.inputs] * len(adapters),
            self.ship.searching(self.search),
            self.ship.config.evaluation.max_new_tokens,
            self.ship.explaining_threshold().value,
            self.ship.lora_reader(),
            self.seed,
        )
        return [one.instruction or "" for one in explanations]
