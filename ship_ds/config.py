"""The run's config: typed, frozen and strict; a YAML recipe plus `a.b=c` overrides. Imports no
torch.

    load_config("quickstart", ["training.steps=10", "run.folder=runs/short"])

An unknown key, a wrong type and an impossible pair each raise UserError with one line. Each
component gets its own slice.
"""

import errno
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from ship_ds.data.mixture import MixtureConfig
from ship_ds.data.rules import RulesConfig
from ship_ds.data.source import source_of
from ship_ds.data.task_files import FilesConfig
from ship_ds.errors import UserError, did_you_mean
from ship_ds.kinds import (
    ADAPTERS,
    FROM_OUTSIDE,
    OBJECTIVES,
    PRIORS,
    SOURCES,
    load_plugins,
    parse_section,
)
from ship_ds.oracle_bank import check_bank
from ship_ds.parsing import parse_yaml, read_text
from ship_ds.section import FieldError, PathText, Section, first_error

ALL_LINEAR = "all-linear"
"""Instead of names: every linear of a block, as `peft` calls it."""
ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _several(value: Any) -> Any:
    """One name is a list of one: `targets: all-linear`."""
    return (value,) if isinstance(value, str) else value


Targets = Annotated[tuple[str, ...], BeforeValidator(_several)]


class RunConfig(Section):
    """Where a run is written, and what it starts from."""

    folder: PathText
    """Everything the run writes goes below it."""
    seed: int = Field(0, ge=0, lt=10**12)
    """Of the initial weights, of the order of examples and of the noise of z."""
    init_from: PathText | None = None
    """A run or bundle folder whose weights this run starts from (pre-training before in-domain
    training). A combination of adapters may start from a run of one of its parts, with the same
    settings; its other parts are new."""


class FullTuning(Section):
    """Every weight of the language model is trained."""

    kind: Literal["full"] = "full"


class LoraTuning(Section):
    """The language model is frozen and a static LoRA over it is trained."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt
    """Of the matrices A and B."""
    alpha: PositiveFloat = 32
    """The update is scaled by alpha / rank."""
    dropout: NonNegativeFloat = 0.05
    """Share of the inputs of A that is zeroed in training."""
    targets: Targets = ALL_PROJECTIONS
    """Last names of the linears that are adapted; all-linear: every one."""


TuningConfig = Annotated[FullTuning | LoraTuning, Field(discriminator="kind")]


SHARD_ABOVE_BYTES = 8e9
"""From here on `shard: auto` partitions the Task LLM: whole on each rank it would leave little of
a GPU, and its traffic pays."""


def base_folder(base: str) -> Path:
    """The folder of a language model.

    Args:
        base: a folder in transformers' format, or "embedded".

    Raises:
        UserError: it is not a model folder.
    """
    embedded = Path(str(resources.files("ship_ds") / "assets" / "tiny_lm"))
    folder = embedded if base == "embedded" else Path(base)
    if not (folder / "config.json").is_file():
        # The name that the recipes have for the one model that a command makes.
        makes = f"`ship-ds base smollm2 --out {base}` makes it"
        remedy = makes if folder.name == "smollm2" else "download the model and give its folder"
        raise UserError(f"{base}: expected a model folder with a config.json; {remedy}")
    return folder


class TaskLlmConfig(Section):
    """The frozen model that answers under the generated adapter."""

    base: PathText = "embedded"
    """A folder in transformers' format, or "embedded" for the tiny LM in ship_ds/assets."""
    quantisation: Literal["nf4", "none"] = "nf4"
    """Of the frozen base; nf4 takes a quarter of 16 bits."""
    shard: Literal["auto", "always", "never"] = "auto"
    """Under ZeRO-3: partition the frozen base over the ranks, or keep it whole on each; auto: only
    above 8 GB of weights."""
    checkpointing: bool = False
    """Compute the activations of a block again in the backward pass instead of keeping them: less
    memory, about a third more time."""
    instruction: Literal["none", "hard", "soft"] = "none"
    """The instruction before each input as well: not at all, as text, or as embeddings of its
    tokens."""
    fading_steps: int = Field(0, ge=0)
    """Steps of training in which the instruction leaves the prompts: of step s a share of
    1 - s / fading_steps of the tasks still states it as text, beside the adapter. Evaluation never
    does. For instruction=none, to which the prompts come; zero: it never stands there."""

    @model_validator(mode="after")
    def _fades_to_none(self) -> "TaskLlmConfig":
        if self.fading_steps and self.instruction != "none":
            raise ValueError(
                f"fading_steps={self.fading_steps} is for instruction=none, to which the prompts "
                f"come; with {self.instruction} it stays in all of them: leave one of the two out"
            )
        return self

    def stated_share(self, step: int) -> float:
        """The share of a step's tasks whose prompts still state the instruction."""
        return max(0.0, 1 - step / self.fading_steps) if self.fading_steps else 0.0

    def shards(self, stored_bytes: Callable[[], float]) -> bool:
        """Whether ZeRO-3 partitions the frozen base over the ranks instead of leaving it whole.

        Args:
            stored_bytes: of its weights as they are held; asked only where the size decides.
        """
        return self.shard == "always" or (
            self.shard == "auto" and stored_bytes() > SHARD_ABOVE_BYTES
        )


class TrainedRoleConfig(Section):
    """A language model that is trained, whole or by a LoRA."""

    base: PathText = ""
    """As the Task LLM's; empty: that very one."""
    quantisation: Literal["nf4", "none"] = "none"
    """Of the base; nf4 needs tuning.kind=lora."""
    tuning: TuningConfig = FullTuning()
    """What of the language model is trained: all of it, or a LoRA over it."""
    checkpointing: bool = False
    """Compute the activations of a block again in the backward pass instead of keeping them: less
    memory, about a third more time."""

    @property
    def lora(self) -> LoraTuning | None:
        """The LoRA that is trained over the base; None: the base itself is trained."""
        return self.tuning if isinstance(self.tuning, LoraTuning) else None

    @model_validator(mode="after")
    def _trainable(self) -> "TrainedRoleConfig":
        if self.quantisation != "none" and self.lora is None:
            raise ValueError(
                "quantisation=nf4 needs tuning.kind=lora, since 4-bit weights cannot "
                "be trained: change one of them"
            )
        return self


class LastPooling(Section):
    """The state after the last token alone, which has read the whole instruction."""

    kind: Literal["last"] = "last"


class AttentionPooling(Section):
    """Learned queries attend to the states after all tokens."""

    kind: Literal["attention"] = "attention"
    num_queries: PositiveInt = 4
    """What they gather lies side by side, so each widens the first layer of the MLP."""
    num_heads: PositiveInt = 4
    """Of each query, with weights of its own for its share of the states; divides the base's hidden
    size."""
    shares: bool = False
    """Each query gives a share of z of its own, by one MLP for all: with a query a block and
    model.hypernetwork.latent=by_layer, HINT's layer queries. False: z is made of all together."""


def _pooling_by_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Pooling = Annotated[
    LastPooling | AttentionPooling, Field(discriminator="kind"), BeforeValidator(_pooling_by_name)
]


class EncoderConfig(TrainedRoleConfig):
    """Reads an instruction, examples, or both, and gives the posterior of z."""

    max_examples: int = Field(0, ge=0, le=32)
    """At most this many examples are shown beside the instruction, none of them among those that
    are answered; each step draws how many. Zero: the instruction alone."""
    drop_instruction: float = Field(0.0, ge=0, lt=1)
    """How often the instruction is left out where examples are shown, so that z can be made of
    examples in one pass."""
    drop_targets: float = Field(0.0, ge=0, lt=1)
    """How often the targets of the shown examples are left out, so that inputs without labels say
    something too."""
    drop_words: float = Field(0.0, ge=0, lt=1)
    """How often a word of the instruction is left out of what is read in training, while the
    decoder has to write all of them: z is then of what the words say together and not of the very
    text (a denoising autoencoder, as SDAE of Hill et al. 2016, arXiv 1602.03483)."""

    chunk_tokens: PositiveInt | None = None
    """A text of more tokens is cut into chunks of at most so many, which the language model reads
    each by itself; what is pooled is of all of them. So a text may be longer than the context, and
    costs as its length and not as its square. None: in one piece."""
    pooling: Pooling = LastPooling()
    """What the MLP that gives the posterior reads of the language model's last layer; a name alone,
    `pooling: attention`, is that kind with its defaults."""

    @property
    def reads_examples_alone(self) -> bool:
        """Whether it was trained on examples without an instruction, too."""
        return self.max_examples > 0 and self.drop_instruction > 0


class DecoderConfig(TrainedRoleConfig):
    """Writes an instruction from z, from examples, or from both."""

    num_soft_tokens: PositiveInt = 4
    """Embeddings made from z that the decoder reads before the examples."""
    max_examples: int = Field(6, ge=0, le=6)
    """At most this many examples are shown beside z; zero: z alone."""
    drop_latent: float = Field(0.0, ge=0, lt=1)
    """How often z is left out where examples are shown."""
    drop_tokens: float = Field(0.0, ge=0, lt=1)
    """How often a token of the instruction is hidden from what comes after it, in training, while
    the decoder has to write all of them: what the words before no longer tell it has to take from z
    or from the examples (word dropout, Bowman et al. 2016, arXiv 1511.06349)."""
    fusion: Literal["mlp", "reshape"] = "mlp"
    """z becomes the soft tokens through an MLP, or is them (as published: latent_size =
    num_soft_tokens x hidden size)."""


class TrunkConfig(Section):
    """What kinds of adapter have in common that are made place by place: z and a learned embedding
    of the place go through one MLP."""

    width: PositiveInt = 128
    """Of the hidden layers between z, or a state that is fused, and what is generated."""
    normalises_latent: bool = False
    """What z adds to a place's embedding gets mean zero and variance one. Otherwise training, which
    a small loss.kl lets make z large, can hide the places from each other."""


class FactorConfig(TrunkConfig):
    """What kinds of adapter have in common that are made of two factors, A before B."""

    heads: Literal["per_module", "per_layer", "per_rank", "diagonal", "square"] = "per_module"
    """One head a module shape, one a layer (largest), or one a shape that makes a single rank (of
    those that make A and B the smallest). diagonal, square: A and B are learned, the same for all
    tasks, and z gives a weight of each rank, or a matrix between them (Zhyper); fewer numbers of z,
    so that the rank may be higher."""
    latent: Literal["whole", "by_layer"] = "whole"
    """Each place reads all of z, or the share of its block alone, of equal shares."""
    starts_at_zero: Literal["b", "a"] = "b"
    """Which factor a fresh adapter has zero, so that it is the base: B beside a random A, as peft
    starts a LoRA, or A beside a random B (Init[B] of Hayou et al. 2024, arXiv 2406.08447)."""

    @model_validator(mode="after")
    def _generates_both(self) -> "FactorConfig":
        if self.starts_at_zero == "a" and self.heads in ("diagonal", "square"):
            raise ValueError(
                f"starts_at_zero=a is for heads that make A and B of z; with heads={self.heads} "
                "what stands between them starts at zero: leave one of the two out"
            )
        return self


class LoraHypernetworkConfig(FactorConfig):
    """A LoRA over linears of the Task LLM, generated whole."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 8
    """Of the generated LoRA."""
    alpha: PositiveFloat = 16
    """The update is scaled by alpha / rank, as peft does."""
    targets: Targets = Field(ALL_PROJECTIONS, min_length=1)
    """Last names of the linears of the Task LLM that are adapted; all-linear: every one of its
    blocks."""

    def as_lora(self) -> "LoraHypernetworkConfig":
        """See `lora_of`."""
        return self


class BottleneckHypernetworkConfig(FactorConfig):
    """Bottleneck adapters: what a linear gives, plus a narrow MLP of that, generated whole."""

    kind: Literal["bottleneck"] = "bottleneck"
    rank: PositiveInt = 8
    """Width of the generated MLP."""
    alpha: PositiveFloat = 16
    """What it adds is scaled by alpha / rank."""
    targets: Targets = Field(("o_proj", "down_proj"), min_length=1)
    """Last names of the linears of the Task LLM after which it stands; all-linear: every one of its
    blocks."""


class PrefixHypernetworkConfig(TrunkConfig):
    """Keys and values that every block attends to before its own, generated whole."""

    kind: Literal["prefix"] = "prefix"
    length: PositiveInt = 8
    """Keys and values of each block."""
    latent: Literal["whole", "by_layer"] = "whole"
    """Each block reads all of z, or its own share alone, of equal shares."""


class LayerPromptHypernetworkConfig(TrunkConfig):
    """Hidden states before each block's input, of which the block's own frozen projections make
    keys and values (IAPT)."""

    kind: Literal["layer_prompt"] = "layer_prompt"
    length: PositiveInt = 4
    """Hidden states of each block."""
    latent: Literal["whole", "by_layer"] = "whole"
    """Each block reads all of z, or its own share alone, of equal shares."""
    rank: PositiveInt | None = None
    """A block's hidden states are made as a product of length x rank numbers and a learned matrix,
    rank x hidden size, the same for all blocks and tasks: fewer weights. None: whole."""


class FusionHypernetworkConfig(TrunkConfig):
    """Instruction fusion (HINT): every state that the encoder gives of the instruction becomes a
    key and a value of every block, beside z. Usually a part of a combination."""

    kind: Literal["fusion"] = "fusion"
    drop: float = Field(0.1, ge=0, le=1)
    """How often training leaves a task's states out, so that what is made of z alone is of use
    where no instruction is known."""


class BlockFusionHypernetworkConfig(Section):
    """Instruction fusion by the base's own attention: what came into each block of the encoder, as
    it read the instruction, is projected to a key and a value by the Task LLM's block of that
    number. Beside z; no weights of its own; encoder and Task LLM have one base."""

    kind: Literal["block_fusion"] = "block_fusion"
    drop: float = Field(0.1, ge=0, le=1)
    """How often training leaves a task's states out, so that what is made of z alone is of use
    where no instruction is known."""

    def conflict(self, model: "ModelConfig") -> str | None:
        """Why it cannot be had of such a model, in one line; None: it can."""
        encoder, base = model.encoder, model.task_llm.base
        if encoder.base != base:
            return (
                f"block_fusion takes the encoder's blocks for the Task LLM's, and their bases are "
                f"{encoder.base} and {base}: leave model.encoder.base out"
            )
        if encoder.chunk_tokens is not None:
            return (
                "block_fusion puts an instruction before the prompt as one text, and "
                f"model.encoder.chunk_tokens={encoder.chunk_tokens} reads it as several: leave "
                "that out"
            )
        if model.hypernetwork is self:
            return (
                "block_fusion makes nothing of z: set kind=combination, with a part that does, "
                "such as {kind: lora}"
            )
        return None


class CombinationConfig(Section):
    """Several kinds at once, each made from the same z."""

    kind: Literal["combination"] = "combination"
    parts: tuple[Annotated[SerializeAsAny[Section], BeforeValidator(ADAPTERS.validate)], ...] = (
        Field(min_length=2)
    )
    """A section of each, with its kind."""

    @model_validator(mode="after")
    def _flat(self) -> "CombinationConfig":
        if any(isinstance(part, CombinationConfig) for part in self.parts):
            raise ValueError("parts: a combination of combinations; write all parts in one list")
        return self


class SoftPromptHypernetworkConfig(Section):
    """Embeddings before the prompt, generated by an MLP."""

    kind: Literal["soft_prompt"] = "soft_prompt"
    num_virtual_tokens: PositiveInt = 10
    """Embeddings put before the prompt of the Task LLM."""
    width: PositiveInt = 128
    """Of the hidden layer between z and the embeddings."""
    rank: PositiveInt | None = None
    """The embeddings are made as a product of num_virtual_tokens x rank numbers and a learned
    matrix, rank x hidden size, the same for all tasks (Decomposed Prompt Tuning): fewer weights.
    None: whole."""


class ReshapeHypernetworkConfig(Section):
    """z itself is the soft prompt, so latent_size is num_virtual_tokens x the Task LLM's hidden
    size."""

    kind: Literal["reshape"] = "reshape"
    num_virtual_tokens: PositiveInt = 10
    """Embeddings that z is cut into."""


class SparseHypernetworkConfig(TrunkConfig):
    """Changes of single weights of the Task LLM's last blocks, a number for each, generated whole
    (SHiRA)."""

    kind: Literal["sparse"] = "sparse"
    rank: PositiveInt = 8
    """As many weights of a linear change as a LoRA of this rank has: rank x (inputs + outputs)."""
    num_blocks: PositiveInt | None = 2
    """The last ones of each stack whose linears change; the backward pass ends there. None: all."""
    targets: Targets = Field(ALL_PROJECTIONS, min_length=1)
    """Last names of the linears of the Task LLM of which weights change; all-linear: every one of
    its blocks."""


class ScatterHypernetworkConfig(Section):
    """The same with z itself as the numbers, spread over the linears by their sizes: latent_size
    weights change (SHIP's "delta" fusion)."""

    kind: Literal["scatter"] = "scatter"
    scale: PositiveFloat = 1.0
    """A weight changes by scale x its number of z."""
    num_blocks: PositiveInt | None = 2
    """The last ones of each stack whose linears change; the backward pass ends there. None: all."""
    targets: Targets = Field(ALL_PROJECTIONS, min_length=1)
    """Last names of the linears of the Task LLM of which weights change; all-linear: every one of
    its blocks."""


_SOFT_PROMPT = "ship_ds.model.adapters.soft_prompt"
_SPARSE = "ship_ds.model.adapters.sparse"
ADAPTERS.register(LoraHypernetworkConfig, "ship_ds.model.adapters.lora:LoraHypernetwork")
ADAPTERS.register(
    BottleneckHypernetworkConfig, "ship_ds.model.adapters.bottleneck:BottleneckHypernetwork"
)
ADAPTERS.register(PrefixHypernetworkConfig, "ship_ds.model.adapters.prefix:PrefixHypernetwork")
ADAPTERS.register(
    LayerPromptHypernetworkConfig, "ship_ds.model.adapters.layer_prompt:LayerPromptHypernetwork"
)
ADAPTERS.register(FusionHypernetworkConfig, "ship_ds.model.adapters.fusion:FusionHypernetwork")
ADAPTERS.register(
    BlockFusionHypernetworkConfig, "ship_ds.model.adapters.block_fusion:BlockFusionHypernetwork"
)
ADAPTERS.register(CombinationConfig, "ship_ds.model.adapters.combination:Combination")
ADAPTERS.register(SoftPromptHypernetworkConfig, f"{_SOFT_PROMPT}:SoftPromptHypernetwork")
ADAPTERS.register(ReshapeHypernetworkConfig, f"{_SOFT_PROMPT}:ReshapeHypernetwork")
ADAPTERS.register(SparseHypernetworkConfig, f"{_SPARSE}:SparseHypernetwork")
ADAPTERS.register(ScatterHypernetworkConfig, f"{_SPARSE}:ScatterHypernetwork")


def parts_of(section: Section) -> tuple[Section, ...]:
    """The parts of a `model.hypernetwork` that combines several kinds; of another it alone."""
    return section.parts if isinstance(section, CombinationConfig) else (section,)


HypernetworkConfig = Annotated[SerializeAsAny[Section], BeforeValidator(ADAPTERS.validate)]


class StandardNormalConfig(Section):
    """N(0, I), as published."""

    kind: Literal["standard_normal"] = "standard_normal"


class MixturePriorConfig(Section):
    """A mixture of diagonal Gaussians, all of it learned: tasks that fall into groups need not
    share one."""

    kind: Literal["mixture"] = "mixture"
    num_components: PositiveInt = 8
    """Gaussians in it; one alone is a Gaussian with a learned mean and variances."""


class FlowPriorConfig(Section):
    """N(0, I) seen through a learned invertible map, RealNVP: a prior of a shape of its own."""

    kind: Literal["flow"] = "flow"
    num_layers: PositiveInt = 4
    """Affine couplings; each moves one half of z by what the other half says."""
    width: PositiveInt = 64
    """Of the hidden layer of each coupling."""


PRIORS.register(StandardNormalConfig, "ship_ds.model.priors:StandardNormal")
PRIORS.register(MixturePriorConfig, "ship_ds.model.mixture_prior:MixturePrior")
PRIORS.register(FlowPriorConfig, "ship_ds.model.flow_prior:FlowPrior")
PriorConfig = Annotated[SerializeAsAny[Section], BeforeValidator(PRIORS.validate)]


class ModelConfig(Section):
    """The three language models, z, and what z becomes."""

    latent_size: PositiveInt = 64
    """Numbers in z."""
    encoder: EncoderConfig = EncoderConfig()
    """Reads an instruction and gives the posterior of z."""
    decoder: DecoderConfig = DecoderConfig()
    """Writes an instruction from z, from examples, or from both."""
    task_llm: TaskLlmConfig = TaskLlmConfig()
    """The frozen model that answers under the generated adapter."""
    hypernetwork: HypernetworkConfig = LoraHypernetworkConfig()
    """Makes the adapter from z; its kind says what an adapter is."""
    prior: PriorConfig = StandardNormalConfig()
    """What z is drawn from, and what the posterior is held close to."""
    backbone: Literal["separate", "shared"] = "separate"
    """separate: encoder, decoder and Task LLM each load their base; shared: they are one frozen
    base, loaded once, and differ by their LoRA. Where generated adapters
    are of low rank (LoRA, soft prompt), the decoder's LoRA has no dropout, ZeRO-3 does not shard it
    and both checkpoint alike, Task LLM and decoder then read in one pass."""
    system_message: str | None = None
    """The system's turn of every prompt's chat template; left out: the template's own, for which
    some write a sentence into each prompt. "": an empty turn, the fewest tokens."""
    attention: Literal["auto", "sdpa", "varlen", "flash"] = "auto"
    """auto: on CUDA of capability 8.0 in 16 bits flash_attn 2 if it is installed, else torch's
    variable-length kernel; SDPA elsewhere."""
    elementwise: Literal["eager", "compiled"] = "eager"
    """How training computes the norms, rotary embeddings and SwiGLU of the families whose code is
    Llama's. compiled: each by torch.compile, one pass over memory; some seconds at each start, on a
    CPU twenty at the first, and it needs a C++ compiler on a CPU, Triton on a GPU."""

    @model_validator(mode="after")
    def _one_base_for_all(self) -> "ModelConfig":
        for name in ("encoder", "decoder"):
            part = getattr(self, name)
            if not part.base:
                object.__setattr__(self, name, part.model_copy(update={"base": self.task_llm.base}))
        for part in parts_of(self.hypernetwork):
            # A kind may have one; most do not look beyond their own section.
            conflict = getattr(part, "conflict", None)
            if conflict is not None and (reason := conflict(self)):
                raise ValueError(f"hypernetwork: {reason}")
        if self.backbone == "shared":
            self._check_shared("encoder", self.encoder)
            self._check_shared("decoder", self.decoder)
        return self

    def _check_shared(self, name: str, role: TrainedRoleConfig) -> None:
        """Raises ValueError where a role cannot be the Task LLM's base with a LoRA."""
        for setting in ("base", "quantisation"):
            value, other = getattr(role, setting), getattr(self.task_llm, setting)
            if value != other:
                raise ValueError(
                    f"backbone=shared needs one {setting} for all: {name}.{setting} is {value} and "
                    f"task_llm.{setting} is {other}; make them the same, or set backbone=separate"
                )
        if role.lora is None:
            raise ValueError(
                f"backbone=shared needs {name}.tuning.kind=lora, since the Task LLM's weights stay "
                "as they are: set it, or backbone=separate"
            )


class ObjectiveConfig(Section):
    """The section of an objective; one with more settings than a weight adds them."""

    wants: ClassVar[tuple[str, ...]] = ()
    """Objectives without whose weight it means nothing."""
    weight: NonNegativeFloat = 1.0
    """The loss is the sum of weight x objective."""

    def weight_at(self, step: int, num_steps: int) -> float:
        """The weight that is in force at a step of so many; `weight`, where it has no schedule.

        A function of the step alone, so that a run that resumes repeats itself to the bit.
        """
        return self.weight

    def scheduled(self, step: int, num_steps: int) -> dict[str, float]:
        """What a schedule has set at a step, by name, for the log; empty where nothing changes."""
        return {}

    def conflict(self, model: ModelConfig) -> str | None:
        """Why it cannot be had of such a model, in one line; None: it can."""
        return None

    def check(self, model: ModelConfig) -> None:
        """Look at what it reads from disk, and at what trains nothing, before a training loads
        torch.

        Raises:
            UserError: it is not there, or not of such a model; one line that names the setting.
        """


class _NumberOrSection(ObjectiveConfig):
    """Written as a bare number where only the weight is set, as config.json of version 0.1.0 has
    it."""

    @model_serializer(mode="wrap")
    def _weight_alone(self, section: SerializerFunctionWrapHandler) -> Any:
        is_plain = self == type(self)(weight=self.weight)
        return self.weight if is_plain else section(self)


class AnswerLossConfig(_NumberOrSection):
    """Cross-entropy of the answers under the generated adapter, nats a token; `loss.task=2` is the
    weight alone."""

    mean_over: Literal["tokens", "answers"] = "tokens"
    """tokens: over those of all answers of a step, so that an answer of forty weighs as much as
    twenty labels of two. answers: over answers, each by the mean over its own tokens, so that a
    label weighs as much as a paragraph."""


class KlConfig(_NumberOrSection):
    """KL(q(z | k) || p(z)), averaged over the dimensions of z, nats; `loss.kl=1e-3` is the weight
    alone."""

    weight: NonNegativeFloat = 1e-3
    """The loss is the sum of weight x objective."""
    free_bits: NonNegativeFloat = 0.0
    """Nats of each task and dimension below which the KL counts as this much and pulls no longer;
    zero: it always pulls."""
    warmup_steps: int = Field(0, ge=0)
    """Over which the weight rises from zero in a straight line; zero: it is whole from the
    start."""
    warmup_share: float = Field(0.0, ge=0, le=1)
    """In place of warmup_steps: the same as a share of the run's steps."""
    capacity: NonNegativeFloat | None = None
    """C, nats a dimension: what is minimised is |KL - C| of each task, so that z is made to carry
    that much. None: the KL itself."""
    capacity_steps: int = Field(0, ge=0)
    """Over which C rises from zero in a straight line; zero: it is whole from the start."""

    @model_validator(mode="after")
    def _pairs(self) -> "KlConfig":
        if self.warmup_steps and self.warmup_share:
            raise ValueError("warmup_steps and warmup_share both say how long: set one to 0")
        if self.capacity is not None and self.free_bits:
            raise ValueError(
                "capacity and free_bits both say how much KL is free: set capacity=null or "
                "free_bits=0"
            )
        if self.capacity_steps and self.capacity is None:
            raise ValueError("capacity_steps needs capacity: set it, or capacity_steps=0")
        return self

    def weight_at(self, step: int, num_steps: int) -> float:
        """Linear from weight / n at the first step to the whole at the n-th (Bowman et al. 2016,
        section 3.1)."""
        return self.weight * _risen(step, self.warmup_steps or self.warmup_share * num_steps)

    def capacity_at(self, step: int) -> float | None:
        """C at a step, linear as the weight (Burgess et al. 2018); None: there is none."""
        if self.capacity is None:
            return None
        return self.capacity * _risen(step, self.capacity_steps)

    def scheduled(self, step: int, num_steps: int) -> dict[str, float]:
        """Weight and capacity, those that rise."""
        values = {}
        if self.warmup_steps or self.warmup_share:
            values["weight"] = self.weight_at(step, num_steps)
        if self.capacity_steps and (capacity := self.capacity_at(step)) is not None:
            values["capacity"] = capacity
        return values


def _risen(step: int, num_steps: float) -> float:
    """From 1 / num_steps at step 0 to 1 at the step before num_steps, and 1 from there on."""
    return min(1.0, (step + 1) / max(1.0, num_steps))


def _weight_by_number(value: Any) -> Any:
    """A number is the weight alone."""
    return value if isinstance(value, dict | Section) else {"weight": value}


class DistillationConfig(ObjectiveConfig):
    """The KL from the same Task LLM with the instruction in its prompt to the one with the adapter,
    nats a token of the answers; off unless named."""

    temperature: PositiveFloat = 1.0
    """Both distributions are softened by it, and the KL is multiplied by its square, so that the
    gradient stays about as large."""

    def check(self, model: ModelConfig) -> None:
        """See `ObjectiveConfig`. Where the student's prompts state the instruction as the teacher's
        do, the teacher is the student without its adapter; runs that were trained so still open."""
        if model.task_llm.instruction != "none":
            raise UserError(
                "loss.distillation: the teacher is the Task LLM with the instruction in its "
                f"prompt, and model.task_llm.instruction={model.task_llm.instruction} puts it into "
                "the student's as well, which leaves the adapter nothing to learn: set it to none"
            )


class ContrastiveConfig(ObjectiveConfig):
    """InfoNCE of two wordings of one task among the other tasks of a micro-batch, nats a task that
    has two; off unless named."""

    temperature: PositiveFloat = 0.1
    """The cosines of posterior means are divided by it."""


class CycleConfig(ObjectiveConfig):
    """How far the text that the decoder writes of a latent is read back from it: half the mean
    squared difference, nats a dimension of z; off unless named."""

    wants: ClassVar = ("reconstruction",)
    latents: Literal["posterior", "prior"] = "posterior"
    """Whose texts are written: the step's own latents, or draws from the prior."""
    num_tokens: PositiveInt = 24
    """That are written of each; what has not ended by then is read as it stands."""


class OraclesConfig(ObjectiveConfig):
    """The distance from the generated LoRA of a task to one that was trained on that task's
    examples, in units of the bank's spread, a task that has one; off unless named."""

    weight: NonNegativeFloat = 0.1
    """The loss is the sum of weight x objective."""
    bank: PathText
    """The folder that `ship-ds oracles` wrote; a run that goes on may find it elsewhere."""

    def conflict(self, model: ModelConfig) -> str | None:
        """Where no LoRA is generated, or prompts state what the oracles' do not."""
        return why_no_oracles(model)

    def check(self, model: ModelConfig) -> None:
        """See `ObjectiveConfig`."""
        lora = lora_of(model.hypernetwork)
        assert lora is not None, "refused before: `conflict`"
        # What `all-linear` means is known with the base alone: `OracleDistance.begin` compares it.
        targets = None if ALL_LINEAR in lora.targets else lora.targets
        check_bank(Path(self.bank), oracle_settings(model), targets)


def lora_of(section: Section) -> LoraHypernetworkConfig | None:
    """The LoRA of a `model.hypernetwork`, its own or that of the one among the parts; None where
    there is none, or more than one.

    A kind whose values are LoRAs has a method `as_lora` in its section: the plain LoRA of its rank,
    scaling and linears, which is trained where one beside the generated ones is: by `tune`, as an
    oracle, as a baseline."""
    loras = [part.as_lora() for part in parts_of(section) if hasattr(part, "as_lora")]
    return loras[0] if len(loras) == 1 else None


def oracle_settings(model: ModelConfig) -> dict[str, Any]:
    """What of a config decides the oracles, as far as it can be told without reading a model:
    setting -> value."""
    lora = lora_of(model.hypernetwork)
    assert lora is not None, "the config refuses it (why_no_oracles)"
    return {
        "model.task_llm.quantisation": model.task_llm.quantisation,
        "model.hypernetwork.rank": lora.rank,
        "model.hypernetwork.alpha": float(lora.alpha),
    }


def why_no_oracles(model: ModelConfig) -> str | None:
    """Why no LoRA trained on a task's examples is what this model's are to be; None: it is."""
    if lora_of(model.hypernetwork) is None:
        return (
            "oracles are LoRAs, and model.hypernetwork generates none, or several: set "
            "model.hypernetwork.kind=lora, or a combination with one"
        )
    if model.task_llm.instruction != "none":
        return (
            "oracles are trained on prompts without the instruction, and "
            f"model.task_llm.instruction={model.task_llm.instruction} states it: set it to none"
        )
    return None


class LossConfig(Section):
    """The weight of each objective; `loss.NAME=WEIGHT` adds a registered one (kinds.py)."""

    model_config = ConfigDict(extra="allow")

    task: Annotated[AnswerLossConfig, BeforeValidator(_weight_by_number)] = AnswerLossConfig()
    """Cross-entropy of the answers under the generated adapter, nats a token: a weight, or a
    section."""
    reconstruction: NonNegativeFloat = 1.0
    """Cross-entropy of the instruction that the decoder reads out of z, nats a token. Zero: the
    decoder neither runs nor is trained, and no instruction is read out of z."""
    kl: Annotated[KlConfig, BeforeValidator(_weight_by_number)] = KlConfig()
    """KL(q(z | k) || p(z)), averaged over the dimensions of z, nats: a weight, or a section."""

    @model_validator(mode="before")
    @classmethod
    def _objectives(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        others = values.keys() - cls.model_fields.keys()
        return values | {name: cls._objective(name, values[name]) for name in others}

    @staticmethod
    def _objective(name: str, values: Any) -> Section:
        """A number is the weight alone."""
        if name not in OBJECTIVES.names():
            raise FieldError(
                (name,),
                "value_error",
                f"unknown key; objectives are {', '.join(OBJECTIVES.names())}, and {FROM_OUTSIDE}",
            )
        try:
            return parse_section(OBJECTIVES.config_class(name), _weight_by_number(values))
        except FieldError as error:
            raise FieldError((name, *error.location), error.kind, str(error)) from None

    @model_validator(mode="after")
    def _has_what_is_wanted(self) -> "LossConfig":
        weights = self.weights()
        for name, section in self.objectives().items():
            for objective in section.wants:
                if weights[name] > 0 and weights.get(objective, 0) == 0:
                    raise ValueError(
                        f"{name}={weights[name]:g} needs loss.{objective} above zero: set that "
                        f"too, or leave {name} out"
                    )
        return self

    def objectives(self) -> dict[str, ObjectiveConfig]:
        """The section of every objective by name, in a fixed order: the three of the paper first.

        The loss is summed in this order, so it is part of what repeats bit for bit.
        """
        published: dict[str, ObjectiveConfig] = {
            "task": self.task,
            "reconstruction": ObjectiveConfig(weight=self.reconstruction),
            "kl": self.kl,
        }
        return published | dict(self.model_extra or {})

    def weights(self) -> dict[str, float]:
        """The weight of every objective, in the order of `objectives`, where all schedules end."""
        return {name: float(section.weight) for name, section in self.objectives().items()}

    def weights_at(self, step: int, num_steps: int) -> dict[str, float]:
        """The weights that are in force at a step of so many."""
        return {
            name: float(section.weight_at(step, num_steps))
            for name, section in self.objectives().items()
        }

    def scheduled(self, step: int, num_steps: int) -> dict[str, float]:
        """What schedules have set at a step: {"kl_weight": 0.0005}; empty without any."""
        return {
            f"{name}_{key}": value
            for name, section in self.objectives().items()
            for key, value in section.scheduled(step, num_steps).items()
        }


_OBJECTIVES = "ship_ds.model.objectives"
OBJECTIVES.register(AnswerLossConfig, f"{_OBJECTIVES}:AnswerLoss", "task")
OBJECTIVES.register(ObjectiveConfig, f"{_OBJECTIVES}:ReconstructionLoss", "reconstruction")
OBJECTIVES.register(KlConfig, f"{_OBJECTIVES}:KlLoss", "kl")
OBJECTIVES.register(DistillationConfig, "ship_ds.model.distillation:Distillation", "distillation")
OBJECTIVES.register(ContrastiveConfig, "ship_ds.model.contrastive:Contrastive", "contrastive")
OBJECTIVES.register(CycleConfig, "ship_ds.model.cycle:Cycle", "cycle")
OBJECTIVES.register(OraclesConfig, "ship_ds.model.oracles:OracleDistance", "oracles")


_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimiserConfig(Section):
    """AdamW and its learning rate."""

    lr: PositiveFloat = 1e-3
    """The highest learning rate. At each step the lower one of warm-up and schedule holds, so that
    a run whose warm-up is long beside its steps never reaches it; it says at its start how far it
    will come."""
    pretrained_lr: PositiveFloat | None = None
    """In its place, for what was pretrained: the language models of encoder and decoder, or the
    LoRAs over them. None: as lr. Warm-up and schedule are the same."""
    weight_decay: NonNegativeFloat = 0.0
    """Of AdamW, decoupled from the gradient."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.98)
    """Adam's; torch's own are 0.9 and 0.999."""
    clip: PositiveFloat = 1.0
    """Gradients are scaled down to this norm over all parameters."""
    warmup_steps: int = Field(50, ge=0)
    """Over which the learning rate rises from zero in a straight line."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Of the learning rate; cosine falls from the first step on, also while it warms up, to 2 % of
    lr at the last."""


class TrainingConfig(Section):
    """How long a run trains, in what batches, and on what."""

    steps: PositiveInt | None = None
    """Optimiser steps of the whole run."""
    epochs: PositiveFloat | None = None
    """Instead of steps: how often each training example of the seen tasks is answered, on
    average."""
    tasks_per_step: PositiveInt = 24
    """Global: ranks and accumulation divide it."""
    examples_per_task: PositiveInt = 4
    """Answered by the Task LLM in a step, for each of its tasks."""
    family_alpha: float = Field(1.0, ge=0, le=1)
    """How often a family of tasks is met grows with its size to this power: at 1 all tasks are met
    equally often, at 0 all families are. Below 1 the tasks of large families get fewer passes than
    `epochs`."""
    balances_labels: bool = False
    """Of a task whose training answers are a closed set of labels, a step draws each label as often
    as the others, among the examples that it answers and among those that encoder and decoder are
    shown: neither how frequent a label is nor the labels of the shown examples say which one is
    right. A task with too few examples of a label for that is drawn as ever. What is evaluated is
    as frequent as in the data."""
    accumulation: PositiveInt = 1
    """Micro-batches whose gradients are summed for one optimiser step: less memory, the same
    step."""
    max_minutes: PositiveFloat | None = None
    """Ends training, evaluations not counted; the schedule ends with it where the steps would take
    longer, and then no two runs are alike to the bit. None: no limit."""
    max_bad_steps: PositiveInt = 5
    """Stop after this many non-finite steps in a row; what is to be saved or evaluated within them
    waits for a finite one."""
    deepspeed: PathText = "zero3"
    """A file of ds_configs/ (without .json) or a path; zero1_auto, zero2_auto and zero3_auto are
    bf16 on devices that multiply in it, else fp32."""
    profile: int = Field(0, ge=0)
    """Record so many steps with torch.profiler, after the first two of a start: a page in
    RUN/profile.md and a trace for TensorBoard; zero: none."""
    threads: PositiveInt | None = None
    """CPU threads a rank; None: torch's own choice."""
    hang_minutes: PositiveFloat | None = 20
    """Without a step for so long while there are steps, until all ranks have met, or before and
    after without a sign of life of another rank, a rank dumps its stacks and ends the run with code
    76; an evaluation or a checkpoint has to take less. At most 25 where a run starts
    (preflight.py). None: never."""
    grace_seconds: PositiveFloat = 270
    """From USR1 or TERM to the forced exit (code 77) when no step boundary comes; below the seconds
    of `#SBATCH --signal`."""


class CheckpointConfig(Section):
    """How often the whole state is saved, and what stays on disk."""

    every_steps: int = Field(0, ge=0)
    """Zero: at the end, and before each evaluation."""
    every_minutes: PositiveFloat | None = None
    """After so many minutes of training without one; what a failure costs is then known, however
    long a step takes. None: by the steps alone."""
    keep_last: PositiveInt = 2
    """Beside these, the best on dev is kept (see evaluation.best_by), and the newest that was not
    written within bad steps."""
    max_gigabytes: PositiveFloat | None = None
    """Disk cap; the newest stays whatever it is, and so do the two that keep_last names."""


class EvaluationConfig(Section):
    """What is measured while training and at its end."""

    every_steps: int = Field(0, ge=0)
    """Deduction on a few seen and dev rules while training, of a step that was just saved; zero:
    never."""
    num_tasks: PositiveInt = 64
    """Seen rules, and dev rules, looked at while training."""
    best_by: Literal["exact_match", "rouge_l", "answer_loss"] = "exact_match"
    """The score of dev in these looks by which a checkpoint is the best one, which stays on disk.
    ROUGE-L tells more where answers are texts, of which few are met word by word, and the loss of
    the right answers tells most of few tasks; scores from before a change of this setting no longer
    count."""
    num_final_tasks: PositiveInt = 1_000_000
    """Tasks of each part in the final report at most."""
    final_share: float | None = Field(0.1, gt=0)
    """Time for the final report as a share of the training's: it measures as many tasks as fit,
    spread over all of them, and says how many it left out. None: all, however long."""
    min_final_tasks: PositiveInt = 1
    """Tasks of each row and part of the final report, whatever time they take, and at least one a
    rank."""
    ends_with_report: bool = True
    """False: the run ends with its bundle."""
    examples_per_task: PositiveInt = 5
    """Test inputs answered for each task, while training and in the final report."""
    max_new_tokens: PositiveInt = 20
    """Of an answer, its end included; a longer one is never the right one. Right answers that are
    longer are counted in one line at the start."""
    max_instruction_tokens: PositiveInt = 40
    """Of an instruction that the decoder writes."""


SOURCES.register(RulesConfig, "ship_ds.data.rules:RulesSource")
SOURCES.register(FilesConfig, "ship_ds.data.task_files:FilesSource")
SOURCES.register(MixtureConfig, "ship_ds.data.mixture:MixtureTasks")
DataConfig = Annotated[SerializeAsAny[Section], BeforeValidator(SOURCES.validate)]


class Config(Section):
    """A whole run; `load_config` makes one."""

    run: RunConfig
    """Where it is written, and what it starts from."""
    data: DataConfig = RulesConfig()
    """Tasks with their instructions and examples."""
    model: ModelConfig = ModelConfig()
    """The three language models, z, and what z becomes."""
    loss: LossConfig = LossConfig()
    """How much each objective weighs."""
    optimiser: OptimiserConfig = OptimiserConfig()
    """AdamW and its learning rate."""
    training: TrainingConfig
    """How long, in what batches, and on what."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """How often the whole state is saved, and what stays on disk."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured while training and at its end."""

    @model_validator(mode="after")
    def _pairs(self) -> "Config":
        if (self.training.steps is None) == (self.training.epochs is None):
            raise ValueError(
                "training.steps or training.epochs: give one of them (and set the other to null)"
            )
        if self.training.tasks_per_step % self.training.accumulation:
            raise ValueError(
                f"training.accumulation ({self.training.accumulation}) must divide "
                "training.tasks_per_step "
                f"({self.training.tasks_per_step}): change one of them"
            )
        bases = [self.model.task_llm.base, self.model.encoder.base, self.model.decoder.base]
        if conflict := source_of(self.data).conflict(bases):
            raise ValueError(conflict)
        for name, objective in self.loss.objectives().items():
            if conflict := objective.conflict(self.model):
                raise ValueError(f"loss.{name}: {conflict}")
        encoder = self.model.encoder
        if (encoder.drop_instruction or encoder.drop_targets) and not encoder.max_examples:
            raise ValueError(
                "model.encoder.drop_instruction and drop_targets need model.encoder.max_examples "
                "above 0: set it, or these to 0"
            )
        if self.model.decoder.drop_latent and not self.model.decoder.max_examples:
            raise ValueError(
                "model.decoder.drop_latent needs model.decoder.max_examples above 0: "
                "set it, or drop_latent to 0"
            )
        return self


def recipe_names() -> list[str]:
    """The shipped recipes, sorted."""
    return sorted(
        path.name.removesuffix(".yaml")
        for path in (resources.files("ship_ds") / "recipes").iterdir()
        if path.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe; its first line is a comment with the command."""
    return (resources.files("ship_ds") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe by name or a YAML file by path, apply overrides, check. Raises UserError."""
    return parse_config(overridden(read_values(source), overrides), source)


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """The same config with overrides on top. Raises UserError."""
    return parse_config(overridden(config.model_dump(), overrides), "overrides")


def overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The values with `section.key=value` on top, the value read as YAML; the last one of a key
    wins, and an item of a list goes by its place from 0. Raises UserError."""
    for override in overrides:
        _override(values, override)
    return values


def parse_config(values: dict[str, Any], source: str) -> Config:
    """The config of these values, defaults filled in.

    Args:
        values: sections as YAML or JSON gives them.
        source: where they are from, for the message.

    Raises:
        UserError: an unknown key, a wrong type or an impossible pair; one line naming the key.
    """
    load_plugins()
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = first_error(error, prefers_unknown=True)
        key = _key(first.location, values)
        hint = _nearest_key(first.location) if first.is_unknown_key else ""
        raise UserError(f"{source}: {key + ': ' if key else ''}{first.text}{hint}") from None


def _nearest_key(location: Sequence[int | str]) -> str:
    """See `did_you_mean`, or where a key stands that was written without its section; "" in a
    section whose class a table chooses, which has hints of its own (kinds.py)."""
    kind: Any = Config
    for part in location[:-1]:
        kind = kind.model_fields[part].annotation if part in kind.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            return ""
    if not location:
        return ""
    key = str(location[-1])
    places = [
        f"{name}.{key}"
        for name, one in Config.model_fields.items()
        if len(location) == 1 and key in getattr(one.annotation, "model_fields", ())
    ]
    meant = f"; did you mean {' or '.join(places)}?" if places else ""
    return meant or did_you_mean(key, kind.model_fields)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        leaves |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
        )
    return leaves


_TAGS = ("full", "lora", "last", "attention")


def _key(location: Sequence[int | str], values: Any) -> str:
    """The key as the user wrote it: pydantic puts the kind of `tuning` or `pooling`, which is no
    key of it, in between."""
    parts = []
    for part in location:
        if part in _TAGS and not (isinstance(values, dict) and part in values):
            continue
        parts.append(str(part))
        values = values.get(part) if isinstance(values, dict) else None
    return ".".join(parts)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False  # a name that no file can have, such as a whole config


def read_values(source: str) -> dict[str, Any]:
    """What a recipe, by its name, or a YAML file holds, not yet checked.

    Raises:
        UserError: there is neither, or it is not YAML, or no mapping.
    """
    path = Path(source)
    if source in recipe_names():
        text = recipe_text(source)
    elif _is_file(path):
        text = read_text(path)
    else:
        raise UserError(
            f"{source}: no such config file, and no recipe of that name; the recipes "
            f"are {', '.join(recipe_names())}"
        )
    values = parse_yaml(text, source)
    if not isinstance(values, dict):
        raise UserError(
            f"{source}: expected a mapping of sections at the top, such as `run:`, got "
            f"{'nothing' if values is None else type(values).__name__}"
        )
    return values


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override}: an override has the form section.key=value")
    value = parse_yaml(text, override)
    section, *below = key.split(".")
    if section == "loss" and len(below) == 2:
        _make_section(values.get(section), below[0])
    _set(values, [section, *below], value, override)


def _make_section(loss: Any, name: str) -> None:
    """An objective that was given as its weight takes settings beside it: `loss.kl.free_bits=0.1`
    over `loss: {kl: 1e-3}`."""
    if isinstance(loss, dict) and isinstance(loss.get(name), int | float):
        loss[name] = _weight_by_number(loss[name])


def _set(values: Any, keys: Sequence[str], value: Any, override: str) -> None:
    """Put the value at the end of the keys, where a list's are its places from 0, as in
    data.sources.0.path."""
    key: Any = keys[0]
    if isinstance(values, list):
        if not (key.isdecimal() and int(key) < len(values)):
            places = f"0 to {len(values) - 1}" if values else "none"
            raise UserError(f"{override}: {key} is no place of the list; it has {places}")
        key = int(key)
    if len(keys) == 1:
        values[key] = value
        return
    inner = values[key] if isinstance(values, list) else values.setdefault(key, {})
    if isinstance(inner, tuple):
        inner = values[key] = list(inner)
    if not isinstance(inner, dict | list):
        raise UserError(f"{override}: {key} is a value, not a section")
    _set(inner, keys[1:], value, override)
