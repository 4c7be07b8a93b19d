"""The methods of the harness by name, in the order of its tables."""

from ship_ds.evaluation import baselines
from ship_ds.evaluation.config import METHOD_NAMES
from ship_ds.evaluation.method import Method
from ship_ds.evaluation.methods.composing import AdapterSum
from ship_ds.evaluation.methods.controls import (
    BareBase,
    MajorityLabel,
    NeighbourInstruction,
    ShuffledInstruction,
)
from ship_ds.evaluation.methods.doubting import Doubting
from ship_ds.evaluation.methods.explaining import ExplainTrainedLora
from ship_ds.evaluation.methods.icl import InContextLearning
from ship_ds.evaluation.methods.instruction_induction import InstructionInduction
from ship_ds.evaluation.methods.nearest_known import NearestKnown
from ship_ds.evaluation.methods.one_pass import OnePass
from ship_ds.evaluation.methods.prompting import Prompting
from ship_ds.evaluation.methods.published import ShipDirect, ShipIndirect
from ship_ds.evaluation.methods.random_decode import RandomDecode
from ship_ds.evaluation.methods.retrieval import Retrieval
from ship_ds.evaluation.methods.rounds import ShipRounds
from ship_ds.evaluation.methods.ship import SearchWithoutDecoder, ShipMethod
from ship_ds.evaluation.methods.weights import ReadOwnAdapter, ReadTrainedLora

_CLASSES: tuple[type[Method], ...] = (
    ShipMethod,
    OnePass,
    Doubting,
    SearchWithoutDecoder,
    NearestKnown,
    Retrieval,
    Prompting,
    InContextLearning,
    InstructionInduction,
    RandomDecode,
    BareBase,
    ShuffledInstruction,
    NeighbourInstruction,
    MajorityLabel,
    ShipIndirect,
    ShipDirect,
    ShipRounds,
    AdapterSum,
    ReadOwnAdapter,
    ReadTrainedLora,
    ExplainTrainedLora,
    baselines.LoraPerTask,
    *baselines.TRAINED,
)
_BY_NAME = {method.name: method for method in _CLASSES}
METHODS: dict[str, type[Method]] = {name: _BY_NAME[name] for name in METHOD_NAMES}
TRAINED_NAMES = frozenset(method.name for method in baselines.TRAINED)
"""Those that train for `Setting.budget` before they are asked; the others cost no time of their
own."""
