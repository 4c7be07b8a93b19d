"""The run's config: typed, frozen and strict; a YAML recipe plus `a.b=c` overrides. Imports no
torch.

    load_config("quickstart", ["training.steps=10", "run.folder=runs/short"])

An unknown key, a wrong type and an impossible pair each raise UserError with one line. Each
component gets its own slice.
"""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from ship_ds.data.files import FilesConfig
from ship_ds.data.rules import RulesConfig
from ship_ds.errors import UserError
from ship_ds.kinds import (
    ADAPTERS,
    OBJECTIVES,
    PRIORS,
    SOURCES,
    KindError,
    first_error,
    load_plugins,
    parse_section,
)
from ship_ds.section import Section

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class RunConfig(Section):
    folder: str
    """Everything the run writes goes below it."""
    seed: int = 0
    init_from: str | None = None
    """A run or bundle folder whose weights this run starts from (pre-training before in-domain
    training)."""


class FullTuning(Section):
    """Every weight of the language model is trained."""

    kind: Literal["full"] = "full"


class LoraTuning(Section):
    """The language model is frozen and a static LoRA over it is trained."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt
    alpha: PositiveFloat = 32
    dropout: NonNegativeFloat = 0.05
    targets: tuple[str, ...] = ALL_PROJECTIONS


Tuning = Annotated[FullTuning | LoraTuning, Field(discriminator="kind")]


class TaskLlmConfig(Section):
    base: str = "embedded"
    """A folder in transformers' format, or "embedded" for the tiny LM in ship_ds/assets."""
    quantisation: Literal["nf4", "none"] = "nf4"
    shard: Literal["auto", "always", "never"] = "auto"
    """Under ZeRO-3: partition the frozen base over the ranks, or keep it whole on each; auto: only
    above 8 GB of weights."""
    checkpointing: bool = False
    instruction: Literal["none", "hard", "soft"] = "none"
    """The instruction before each input as well: not at all, as text, or as embeddings of its
    tokens (see ship.py)."""


class EncoderConfig(Section):
    base: str = ""
    """As the Task LLM's; empty: that very one."""
    quantisation: Literal["nf4", "none"] = "none"
    tuning: Tuning = FullTuning()

    @model_validator(mode="after")
    def _trainable(self) -> "EncoderConfig":
        if self.quantisation != "none" and isinstance(self.tuning, FullTuning):
            raise ValueError(
                "quantisation=nf4 needs tuning.kind=lora, since 4-bit weights cannot "
                "be trained: change one of them"
            )
        return self


class DecoderConfig(EncoderConfig):
    num_soft_tokens: PositiveInt = 4
    max_examples: int = Field(6, ge=0, le=6)
    """At most this many examples are shown beside z; zero: z alone."""
    drop_latent: float = Field(0.0, ge=0, lt=1)
    """How often z is left out where examples are shown."""
    fusion: Literal["mlp", "reshape"] = "mlp"
    """z becomes the soft tokens through an MLP, or is them (as published: latent_size =
    num_soft_tokens x hidden size)."""


class LoraHypernetworkConfig(Section):
    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16
    targets: tuple[str, ...] = Field(ALL_PROJECTIONS, min_length=1)
    width: PositiveInt = 128
    heads: Literal["per_module", "per_layer", "per_rank"] = "per_module"
    """One head a module shape, one a layer (largest), or one a shape that makes a single rank
    (smallest)."""


class SoftPromptHypernetworkConfig(Section):
    kind: Literal["soft_prompt"] = "soft_prompt"
    num_virtual_tokens: PositiveInt = 10
    width: PositiveInt = 128


class ReshapeHypernetworkConfig(Section):
    """z itself is the soft prompt, so latent_size is num_virtual_tokens x the Task LLM's hidden
    size."""

    kind: Literal["reshape"] = "reshape"
    num_virtual_tokens: PositiveInt = 10


ADAPTERS.register(LoraHypernetworkConfig, "ship_ds.model.hypernetwork:LoraHypernetwork")
ADAPTERS.register(SoftPromptHypernetworkConfig, "ship_ds.model.hypernetwork:SoftPromptHypernetwork")
ADAPTERS.register(ReshapeHypernetworkConfig, "ship_ds.model.hypernetwork:ReshapeHypernetwork")
HypernetworkConfig = Annotated[SerializeAsAny[Section], BeforeValidator(ADAPTERS.validate)]


class StandardNormalConfig(Section):
    """N(0, I), as published."""

    kind: Literal["standard_normal"] = "standard_normal"


PRIORS.register(StandardNormalConfig, "ship_ds.model.priors:StandardNormal")
PriorConfig = Annotated[SerializeAsAny[Section], BeforeValidator(PRIORS.validate)]


class ModelConfig(Section):
    latent_size: PositiveInt = 64
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    task_llm: TaskLlmConfig = TaskLlmConfig()
    hypernetwork: HypernetworkConfig = LoraHypernetworkConfig()
    prior: PriorConfig = StandardNormalConfig()
    """What z is drawn from, and what the posterior is held close to."""
    attention: Literal["auto", "sdpa", "varlen", "flash"] = "auto"
    """auto: flash_attn if it is installed, else torch's variable-length kernel; SDPA where there is
    no CUDA."""

    @model_validator(mode="after")
    def _one_base_for_all(self) -> "ModelConfig":
        for name in ("encoder", "decoder"):
            part = getattr(self, name)
            if not part.base:
                object.__setattr__(self, name, part.model_copy(update={"base": self.task_llm.base}))
        return self


class ObjectiveConfig(Section):
    """An objective beside the three of the paper; one with more settings adds them."""

    weight: NonNegativeFloat = 1.0


class LossConfig(Section):
    """The weight of each objective; `loss.NAME=WEIGHT` adds a registered one (kinds.py)."""

    model_config = ConfigDict(extra="allow")

    task: NonNegativeFloat = 1.0
    """Cross-entropy of the answers under the generated adapter, nats a token."""
    reconstruction: NonNegativeFloat = 1.0
    """Cross-entropy of the instruction that the decoder reads out of z, nats a token."""
    kl: NonNegativeFloat = 1e-3
    """KL(q(z | k) || p(z)), averaged over the dimensions of z, nats."""

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
            raise KindError((name,), "extra_forbidden", "unknown key")
        section = values if isinstance(values, dict | Section) else {"weight": values}
        try:
            return parse_section(OBJECTIVES.config_class(name), section)
        except KindError as error:
            raise KindError((name, *error.location), error.kind, str(error)) from None

    def objectives(self) -> dict[str, Section]:
        """The section of every objective by name, in a fixed order: the three of the paper first.

        The loss is summed in this order, so it is part of what repeats bit for bit.
        """
        published = {name: ObjectiveConfig(weight=getattr(self, name)) for name in PUBLISHED}
        return published | dict(self.model_extra or {})

    def weights(self) -> dict[str, float]:
        """The weight of every objective, in the order of `objectives`."""
        return {name: float(getattr(s, "weight")) for name, s in self.objectives().items()}  # noqa: B009


PUBLISHED = ("task", "reconstruction", "kl")
_OBJECTIVES = "ship_ds.model.objectives"
OBJECTIVES.register(ObjectiveConfig, f"{_OBJECTIVES}:AnswerLoss", "task")
OBJECTIVES.register(ObjectiveConfig, f"{_OBJECTIVES}:ReconstructionLoss", "reconstruction")
OBJECTIVES.register(ObjectiveConfig, f"{_OBJECTIVES}:KlLoss", "kl")


_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimiserConfig(Section):
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[_Decay, _Decay] = (0.9, 0.98)
    """Adam's; torch's own are 0.9 and 0.999."""
    clip: PositiveFloat = 1.0
    warmup_steps: int = Field(50, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"


class TrainingConfig(Section):
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    """Instead of steps: how often each training example of the seen tasks is answered, on
    average."""
    tasks_per_step: PositiveInt = 24
    """Global: ranks and accumulation divide it."""
    examples_per_task: PositiveInt = 4
    family_alpha: float = Field(1.0, ge=0, le=1)
    """How often a family of tasks is met grows with its size to this power: at 1 all tasks are met
    equally often, at 0 all families are. Below 1 the tasks of large families get fewer passes than
    `epochs`."""
    accumulation: PositiveInt = 1
    max_minutes: PositiveFloat | None = None
    """Ends training, evaluations not counted; the schedule ends with it where the steps would take
    longer, and then no two runs are alike to the bit. None: no limit."""
    max_bad_steps: PositiveInt = 5
    """Stop after this many non-finite steps in a row."""
    deepspeed: str = "zero3"
    """A file of ds_configs/ (without .json) or a path."""
    threads: PositiveInt | None = None
    """CPU threads a rank; None: torch's own choice."""
    hang_minutes: PositiveFloat | None = 20
    """Without a step for so long, a rank dumps its stacks and ends the run with code 76; an
    evaluation or a checkpoint has to take less. At most 25 where a run starts (preflight.py). None:
    never."""
    grace_seconds: PositiveFloat = 270
    """From USR1 or TERM to the forced exit (code 77) when no step boundary comes; below the seconds
    of `#SBATCH --signal`."""


class CheckpointConfig(Section):
    every_steps: int = Field(0, ge=0)
    """Zero: at the end alone."""
    keep_last: PositiveInt = 2
    """Beside these, the best on dev is kept."""
    max_gigabytes: PositiveFloat | None = None
    """Disk cap; the newest and the best stay whatever it is."""


class EvaluationConfig(Section):
    every_steps: int = Field(0, ge=0)
    """Deduction on a few seen and dev rules while training; zero: never."""
    num_tasks: PositiveInt = 64
    """Seen rules, and dev rules, looked at while training."""
    num_final_tasks: PositiveInt = 1_000_000
    """Seen rules in the final report; all dev and unseen ones are always used."""
    ends_with_report: bool = True
    """False: the run ends with its bundle."""
    examples_per_task: PositiveInt = 5
    max_new_tokens: PositiveInt = 20
    max_instruction_tokens: PositiveInt = 40


SOURCES.register(RulesConfig, "ship_ds.data.source:RulesSource")
SOURCES.register(FilesConfig, "ship_ds.data.source:FilesSource")
DataConfig = Annotated[SerializeAsAny[Section], BeforeValidator(SOURCES.validate)]


class Config(Section):
    run: RunConfig
    data: DataConfig = RulesConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

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
        if isinstance(self.data, RulesConfig) and self.data.seed and "embedded" in bases:
            raise ValueError(
                f"data.seed={self.data.seed}: the embedded model learnt the seen rules of seed 0, "
                "unseen ones of this seed among "
                "them: keep 0, or give bases of your own"
            )
        if self.model.decoder.drop_latent and not self.model.decoder.max_examples:
            raise ValueError(
                "model.decoder.drop_latent needs model.decoder.max_examples above 0: "
                "set it, or drop_latent to 0"
            )
        return self


def recipe_names() -> list[str]:
    return sorted(
        path.name.removesuffix(".yaml")
        for path in (resources.files("ship_ds") / "recipes").iterdir()
        if path.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe; its first line is a comment with the command."""
    return (resources.files("ship_ds") / "recipes" / f"{name}.yaml").read_text()


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe by name or a YAML file by path, apply overrides, check. Raises UserError."""
    values = _read(source)
    for override in overrides:
        _override(values, override)
    return parse_config(values, source)


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """The same config with overrides on top. Raises UserError."""
    values = config.model_dump()
    for override in overrides:
        _override(values, override)
    return parse_config(values, "overrides")


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
        first = first_error(error)
        key = _key(first.location, values)
        message = "unknown key" if first.kind == "extra_forbidden" else str(first)
        raise UserError(f"{source}: {key + ': ' if key else ''}{message}") from None


_TUNINGS = ("full", "lora")


def _key(location: Sequence[int | str], values: Any) -> str:
    """The key as the user wrote it: pydantic puts the kind of `tuning`, which is no key of it, in
    between."""
    parts = []
    for part in location:
        if part in _TUNINGS and not (isinstance(values, dict) and part in values):
            continue
        parts.append(str(part))
        values = values.get(part) if isinstance(values, dict) else None
    return ".".join(parts)


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    if source in recipe_names():
        text = recipe_text(source)
    elif path.is_file():
        text = path.read_text()
    else:
        raise UserError(
            f"{source}: no such config file, and no recipe of that name; the recipes "
            f"are {', '.join(recipe_names())}"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{source}: expected a mapping of sections at the top, got {type(values).__name__}"
        )
    return values


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override}: an override has the form section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{override}: {section} is a value, not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"{override}: the value is not YAML: {' '.join(str(error).split())}"
        ) from None
