"""SHIP on the meta device: every weight has its shape and takes no memory.

A base is a folder with a config.json (weights are not needed), "embedded", or the name of a public
shape.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import nn
from transformers import (
    AutoConfig,
    PreTrainedConfig,
)

from ship_ds.config import (
    AttentionPooling,
    LossConfig,
    ModelConfig,
    TaskLlmConfig,
    base_folder,
)
from ship_ds.errors import UserError
from ship_ds.kinds import ADAPTERS
from ship_ds.model import nf4
from ship_ds.model.adapters.adapter import Hypernetwork
from ship_ds.model.assemble import build_ship
from ship_ds.model.elementwise import ElementwiseMode
from ship_ds.model.language_model import LanguageModel, without_weights
from ship_ds.model.lean_modules import make_lean
from ship_ds.model.loading import Quantisation, read_settings
from ship_ds.model.ship import ShipModel
from ship_ds.planner.attention import PLANNED
from ship_ds.planner.public_shapes import PUBLIC_SHAPES, WAY_OUT


def public_shapes() -> Mapping[str, PreTrainedConfig]:
    """The config of each model that can be planned with by name."""
    return {name: AutoConfig.for_model(**shape) for name, shape in PUBLIC_SHAPES.items()}


@dataclass(frozen=True)
class Weight:
    """One parameter: how many values, whether it is trained, whether it lies in NF4, and how often
    roles read it one after the other in a forward and in a backward pass."""

    path: str
    numel: int
    is_trained: bool
    is_nf4: bool
    reads: tuple[int, int] = (1, 1)

    def stored_bytes(self, dtype_bytes: int) -> int:
        return nf4.packed_bytes(self.numel) if self.is_nf4 else self.numel * dtype_bytes

    @property
    def stored_elements(self) -> int:
        """As DeepSpeed counts them: two 4-bit values are one uint8."""
        return nf4.packed_bytes(self.numel) if self.is_nf4 else self.numel

    @property
    def quant_state_bytes(self) -> int:
        """Scales (a byte a block, scaled in turn) and code books; never sharded."""
        return nf4.constants_bytes(self.numel) if self.is_nf4 else 0


SHALLOW = (2, 4)
"""Layers of the two models that stand in for one of more than DEEP: what a block holds is the same
in every layer, so what many hold follows from two counts, in a tenth of the time."""
DEEP = 8


@dataclass(frozen=True, eq=False)
class Shapes:
    """SHIP on the meta device, put together by the same function as the one that trains.

    shallow: the same of SHALLOW layers, where it is deep.
    """

    config: ModelConfig
    dtype: torch.dtype
    ship: ShipModel
    nf4_paths: frozenset[str]
    shallow: "tuple[Shapes, ...]" = ()

    @property
    def depths(self) -> dict[str, int]:
        """Layers of each language model; what the hypernetwork makes is for the Task LLM's."""
        models = {
            "encoder": self.ship.encoder.language_model,
            "task LLM": self.ship.task_llm.language_model,
            "decoder": self.ship.decoder.language_model,
        }
        return {name: len(model.blocks()) for name, model in models.items()}

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts with weights, by the names that a plan shows."""
        others = {"prior": self.ship.prior, "objectives": self.ship.objective_modules}
        return {
            "encoder": self.ship.encoder,
            "hypernetwork": self.ship.hypernetwork,
            "decoder": self.ship.decoder,
            "task LLM": self.ship.task_llm,
            **{name: part for name, part in others.items() if any(True for _ in part.parameters())},
        }

    def weights(self, part: str) -> list[Weight]:
        """Every parameter of a part; a base that several roles share is the Task LLM's alone."""
        return self._weights[part]

    def _reads(self, part: str, parameter: nn.Parameter) -> tuple[int, int]:
        """See `Weight.reads`. Under ZeRO-3 no two roles share a pass."""
        roles = {"encoder": self.ship.encoder, "decoder": self.ship.decoder}
        role = roles.get(part, self.ship.task_llm)
        language_model = role.language_model
        is_output = parameter is language_model.output_weight
        is_shared = part == "task LLM" and self.config.backbone == "shared"
        writers = 1 + self.ship.decodes if is_shared else 1
        readers = writers + is_shared  # the encoder reads states alone
        if parameter is language_model.embedding_weight and not parameter.requires_grad:
            # Nothing before it has a gradient; a tied one is met again as the output layer.
            return readers, writers if is_output else 0
        return (writers, writers) if is_output else (readers, readers)

    @cached_property
    def _weights(self) -> dict[str, list[Weight]]:
        shared = {id(parameter) for parameter in self.ship.task_llm.parameters()}
        return {
            part: [
                Weight(
                    path,
                    parameter.numel(),
                    parameter.requires_grad,
                    f"{part}.{path}" in self.nf4_paths,
                    self._reads(part, parameter),
                )
                for path, parameter in module.named_parameters()
                if part == "task LLM" or id(parameter) not in shared
            ]
            for part, module in self.parts.items()
        }


class MetaWeights:
    """Language models of a config's shapes, on the meta device; see assemble.Weights.

    They are not quantised: what would be is remembered instead, so that a plan counts its bytes.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        max_layers: int | None = None,
        elementwise: ElementwiseMode = "eager",
    ) -> None:
        self.dtype, self.max_layers, self.elementwise = dtype, max_layers, elementwise
        self.nf4: set[int] = set()

    def language_model(self, base: str, quantisation: Quantisation, sharded: bool) -> nn.Module:
        """The base's shapes.

        Args:
            base: see `base_config`.
            quantisation: "nf4": the linears that would be in NF4 are remembered; no weight is in 4
                bits.
            sharded: is not read: where weights lie changes no shape.

        Raises:
            UserError: the base is no public shape, and no folder with a config.json that can be
                read.
        """
        lm = meta_lm(base, self.dtype, self.max_layers, self.elementwise)
        if quantisation == "nf4":
            self.nf4 |= {id(linear.weight) for linear in nf4.quantised_linears(lm).values()}
        return lm

    def prompts(self, base: str, system_message: str | None) -> None:
        """A published shape has no tokenizer, and a plan reads no text."""

    def shards(self, config: TaskLlmConfig) -> bool:
        """Where the Task LLM lies changes no shape."""
        return True


@lru_cache(maxsize=4)
def build_shapes(config: ModelConfig, dtype: torch.dtype, loss: LossConfig | None = None) -> Shapes:
    """SHIP's shapes, with those of two shallow models beside them where it is deep; kept for the
    next call with the same arguments.

    Args:
        config: the run's `model` section.
        dtype: the engine's, of every floating-point parameter.
        loss: the run's `loss` section, which names the objectives; None: the paper's three.

    Raises:
        UserError: what the real model would refuse too: a missing base or target, sizes that do not
            fit.
    """
    whole = build_whole(config, dtype, loss)
    shallow = _shallow(config, whole)
    if max(whole.depths.values()) <= max(DEEP, *shallow):
        return whole
    config = _without_shares(config)
    return replace(whole, shallow=tuple(_build(config, dtype, loss, n) for n in shallow))


def build_whole(config: ModelConfig, dtype: torch.dtype, loss: LossConfig | None) -> Shapes:
    """SHIP's shapes without shallow ones beside them, and not kept: all that the weights' sizes
    need.

    Args:
        config: the run's `model` section.
        dtype: the engine's, of every floating-point parameter.
        loss: the run's `loss` section, which names the objectives; None: the paper's three.

    Raises:
        UserError: what the real model would refuse too: a missing base or target, sizes that do not
            fit.
    """
    return _build(config, dtype, loss, None)


def _shallow(config: ModelConfig, whole: Shapes) -> tuple[int, ...]:
    """SHALLOW, or more where adapters are in so many last blocks: both models have all of these,
    and differ in blocks below them.

    Also more where blocks differ: the fewer have all that comes before a pattern, and the others
    one turn of it more, so that what goes on growing is a whole turn.
    """
    kind: type[Hypernetwork] = ADAPTERS.implementation(config.hypernetwork)
    roles = (whole.ship.encoder, whole.ship.task_llm, whole.ship.decoder)
    patterns = [pattern(one) for role in roles for one in _signatures(role.language_model)]
    before = max(first for first, _ in patterns)
    turn = math.lcm(*(period for _, period in patterns))
    few = _at_least(SHALLOW[0], before, turn)
    more = max(0, kind.num_last_blocks(config.hypernetwork) - few)
    return few + more, few + more + max(turn, SHALLOW[1] - SHALLOW[0])


def _at_least(number: int, before: int, turn: int) -> int:
    """The least number of layers, not below this one, that is `before` and a turn or more."""
    return number if (before, turn) == (0, 1) else max(number, before + turn)


def _signatures(language_model: LanguageModel) -> list[list[object]]:
    """What the storages of a block depend on, stack by stack: its modules, its weights' shapes, and
    how far it sees."""
    kinds = getattr(language_model.module.config, "layer_types", None) or ()
    stacks: dict[str, list[object]] = {}
    for path, block in language_model.blocks().items():
        stack = stacks.setdefault(path.rpartition(".")[0], [])
        stack.append(
            (
                kinds[len(stack)] if len(stack) < len(kinds) else None,
                tuple(type(module).__name__ for module in block.modules()),
                tuple((name, tuple(one.shape)) for name, one in block.named_parameters()),
            )
        )
    return list(stacks.values())


def pattern(signatures: Sequence[object]) -> tuple[int, int]:
    """(how many blocks come before it, how many make one turn of it) of the pattern in which the
    others go on until the last: (0, 1) where all are alike.

    Args:
        signatures: one a block; equal ones are of blocks that are alike.
    """
    count = len(signatures)
    return min(
        ((_first_of(signatures, turn), turn) for turn in range(1, count + 1)),
        key=sum,
        default=(0, 1),
    )


def _first_of(signatures: Sequence[object], turn: int) -> int:
    """From which block on every one is like that a turn further."""
    first = max(0, len(signatures) - turn)
    while first and signatures[first - 1] == signatures[first - 1 + turn]:
        first -= 1
    return first


def _without_shares(config: ModelConfig) -> ModelConfig:
    """For models of fewer blocks, which z need not part into: how a place reads it changes what a
    head between them holds, and nothing that grows with the layers."""
    hypernetwork = ADAPTERS.implementation(config.hypernetwork).without_shares(config.hypernetwork)
    pooling = config.encoder.pooling
    if isinstance(pooling, AttentionPooling):
        pooling = pooling.model_copy(update={"shares": False})
    encoder = config.encoder.model_copy(update={"pooling": pooling})
    return config.model_copy(update={"hypernetwork": hypernetwork, "encoder": encoder})


def _build(
    config: ModelConfig, dtype: torch.dtype, loss: LossConfig | None, max_layers: int | None
) -> Shapes:
    weights = MetaWeights(dtype, max_layers, config.elementwise)
    with torch.device("meta"):
        ship = build_ship(config, weights, loss)
    shapes = Shapes(config, dtype, ship, frozenset())
    paths = {
        f"{part}.{path}"
        for part, module in shapes.parts.items()
        for path, parameter in module.named_parameters()
        if id(parameter) in weights.nf4
    }
    ship.to(dtype)
    return Shapes(config, dtype, ship, frozenset(paths))


def base_config(base: str) -> PreTrainedConfig:
    """The config of a base: a public shape, the embedded model or a folder. Raises UserError."""
    if base in public_shapes():
        return public_shapes()[base]
    try:
        return read_settings(base_folder(base))
    except UserError as error:
        raise UserError(f"{error}; {WAY_OUT}") from None


def meta_lm(
    base: str,
    dtype: torch.dtype,
    max_layers: int | None = None,
    elementwise: ElementwiseMode = "eager",
) -> nn.Module:
    """The language model of a base on the meta device: shapes without memory.

    Args:
        base: see `base_config`.
        dtype: of its weights.
        max_layers: the layers after these are left out; None: none are.
        elementwise: what a block keeps for its backward pass depends on it.
    """
    config = base_config(base)
    if max_layers is not None and config.num_hidden_layers > max_layers:
        config = copy.deepcopy(config)
        config.num_hidden_layers = max_layers
        if getattr(config, "num_decoder_layers", None):  # of the stack that writes
            config.num_decoder_layers = min(config.num_decoder_layers, max_layers)
    model = without_weights(config, dtype=dtype, attn_implementation=PLANNED)
    return make_lean(model, elementwise)
