"""The methods of the harness by name, in the order of its tables.

`TRAINED` ones train for `Setting.minutes` before they are asked; the others cost no time of their
own.
"""

from dataclasses import asdict
from typing import Any

from ship_ds.config import ModelConfig
from ship_ds.evaluation.baselines import Itd, PromptTuning, Sft, Tagi, TextToLora, TrainedMethod
from ship_ds.evaluation.baselines.trained import TRAINING
from ship_ds.evaluation.method import Method
from ship_ds.evaluation.methods.controls import BareBase, ShuffledInstruction
from ship_ds.evaluation.methods.icl import InContextLearning
from ship_ds.evaluation.methods.instruction_induction import InstructionInduction
from ship_ds.evaluation.methods.nearest_known import NearestKnown
from ship_ds.evaluation.methods.prompting import Prompting
from ship_ds.evaluation.methods.random_decode import RandomDecode
from ship_ds.evaluation.methods.searching import Searching
from ship_ds.evaluation.methods.ship import ShipMethod

_IN_ORDER: tuple[type[Method], ...] = (
    ShipMethod,
    NearestKnown,
    Prompting,
    InContextLearning,
    Sft,
    PromptTuning,
    Tagi,
    Itd,
    InstructionInduction,
    TextToLora,
    RandomDecode,
    BareBase,
    ShuffledInstruction,
)
METHODS = {method.name: method for method in _IN_ORDER}
TRAINED = frozenset(method.name for method in (Sft, PromptTuning, Tagi, Itd, TextToLora))


def states_instruction(method: type[Method], config: ModelConfig) -> bool:
    """What answers through SHIP's Task LLM states it as well where that was trained so."""
    through_ship = issubclass(method, (Searching, ShuffledInstruction))
    return method.states_instruction or (through_ship and config.task_llm.instruction != "none")


def own_settings(method: type[Method]) -> dict[str, Any]:
    """What a method has to set by itself; where it changes, the method is measured again."""
    if issubclass(method, Searching):
        return {"search": method.recipe.model_dump(mode="json")}
    return (
        {"recipe": asdict(method.recipe), "training": TRAINING}
        if issubclass(method, TrainedMethod)
        else {}
    )
