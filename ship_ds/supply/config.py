"""Settings of `ship-ds supply`, a class a kind; `--set key=value` changes one of them.

Imports no torch, so that a wrong one is told at once.
"""

from collections.abc import Sequence
from string import Formatter
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from ship_ds.config import overridden
from ship_ds.errors import UserError
from ship_ds.section import Section, first_error

Share = Annotated[float, Field(ge=0, le=1)]


class ProposeConfig(Section):
    """New instructions, answered by execution."""

    by: Literal["decoder", "task_llm", "endpoint"] = "decoder"
    """Who proposes: the run's decoder, out of latents; or the run's Task LLM or an endpoint, shown
    known instructions."""
    num_at_once: PositiveInt = 32
    """Instructions that a round proposes."""
    max_rounds: PositiveInt = 64
    """After which it stops, with fewer tasks than were asked for."""
    prior_share: Share = 0.25
    """Of the decoder's latents: drawn from the prior; the others around known instructions'."""
    between_share: Share = 0.25
    """Of these others: around a point on the way from one known instruction to another."""
    spread: NonNegativeFloat = 4.0
    """Of the others, in deviations of the known instruction's posterior."""
    temperature: PositiveFloat = 0.7
    """At which decoder and endpoint write."""
    num_in_context: PositiveInt = 8
    """Known instructions that Task LLM and endpoint are shown."""
    max_rouge: Share = 0.7
    """An instruction is new where its ROUGE-L with every known and kept one is below this
    (Self-Instruct)."""
    num_inputs: PositiveInt = 16
    """Of the nearest known task, that are answered."""
    min_agreement: Share = 0.75
    """Of eight samples of the posterior, so many have to give an answer for it to be kept
    (Ensemble-Instruct)."""
    min_examples: PositiveInt = 8
    """A task has this many answers that are kept, or goes."""
    num_shown: PositiveInt = 4
    """Kept answers from which the instruction is induced; the others are asked (Cycle-Instruct)."""
    min_cycle: Share = 0.75
    """Of those asked, so many have to be answered alike under the induced instruction."""


class DisagreementConfig(Section):
    """Weights by how much answers change when words of the instruction are dropped."""

    num_dropped: PositiveInt = 8
    """Shortened instructions of each task (Active Instruction Tuning)."""
    drop_share: float = Field(0.2, gt=0, lt=1)
    """Of the words, each dropped by a draw of its own; one at least."""
    num_inputs: PositiveInt = 8
    """Of each task, that are answered."""
    num_at_once: PositiveInt = 16
    """Tasks that are answered together; what is done stays after each part."""
    floor: PositiveFloat = 0.1
    """Added to a task's disagreement before weights are scaled to a mean of 1, so that no task is
    never drawn."""


class CompressConfig(Section):
    """Shortened instructions that the run answers as well by."""

    tolerance: NonNegativeFloat = 0.02
    """By how much the loss of the examples may rise above that of the whole instruction, in nats a
    target token."""
    num_examples: PositiveInt = 8
    """Of each task, whose loss is looked at."""
    min_words: PositiveInt = 3
    """That a shortened instruction keeps."""
    most_words: PositiveInt = 128
    """Above which words are no longer dropped one by one, sentences alone."""


class ChainsConfig(Section):
    """Two tasks in a row."""

    max_pairs: PositiveInt = 512
    """Of tasks that are tried."""
    num_at_once: PositiveInt = 16
    """Pairs that are answered together; what is done stays after each part."""
    num_inputs: PositiveInt = 16
    """Of the first task, that are answered."""
    min_agreement: Share = 0.75
    """Of the inputs, so many have to be answered by "first A, then B" as by A and then B."""
    min_examples: PositiveInt = 8
    """A chain has this many inputs with an answer, or goes."""
    joint: str = "{first} and then {second}"
    """How two instructions become one."""

    @field_validator("joint")
    @classmethod
    def _joins(cls, joint: str) -> str:
        fields = sorted({name for _, name, _, _ in Formatter().parse(joint) if name is not None})
        if fields != ["first", "second"]:
            raise ValueError("expected a text with {first} and {second} in it, and no other braces")
        return joint


class AnswersConfig(Section):
    """Answers to inputs without labels."""

    by: Literal["task_llm", "endpoint"] = "task_llm"
    """Who answers: the run's bare Task LLM, with the instruction in its prompt; or an endpoint."""
    num_inputs: PositiveInt = 16
    """Of each task that are answered, at most."""
    relabels: bool = False
    """Inputs that have a label are answered, too, and their own labels go. One that
    is not asked, beyond num_inputs, keeps its own."""
    min_examples: PositiveInt = 2
    """A task has this many answers and labels, or goes."""
    num_at_once: PositiveInt = 16
    """Tasks that are answered together; what is done stays after each part."""


SupplyConfig = ProposeConfig | DisagreementConfig | CompressConfig | ChainsConfig | AnswersConfig
SUPPLY_KINDS: dict[str, type[SupplyConfig]] = {
    "propose": ProposeConfig,
    "compress": CompressConfig,
    "chains": ChainsConfig,
    "disagreement": DisagreementConfig,
    "answers": AnswersConfig,
}


def parse_settings(kind: str, changes: Sequence[str]) -> SupplyConfig:
    """The settings of a kind with these changes.

    Args:
        kind: of the table above.
        changes: such as ["max_rouge=0.8"].

    Raises:
        UserError: there is no such kind or setting; the line names it.
    """
    if kind not in SUPPLY_KINDS:
        raise UserError(f"supply: {kind}: expected one of {', '.join(SUPPLY_KINDS)}")
    try:
        config = SUPPLY_KINDS[kind].model_validate(overridden({}, changes))
    except ValidationError as error:
        first = first_error(error)
        known = (
            f"; there are {', '.join(SUPPLY_KINDS[kind].model_fields)}"
            if first.is_unknown_key
            else ""
        )
        raise UserError(f"--set {first.line}{known}") from None
    if isinstance(config, ProposeConfig) and config.min_examples <= config.num_shown:
        raise UserError(
            f"--set min_examples: {config.min_examples}: expected more than num_shown "
            f"({config.num_shown}), so that some are left to ask"
        )
    if isinstance(config, ProposeConfig | ChainsConfig) and config.min_examples > config.num_inputs:
        raise UserError(
            f"--set min_examples: {config.min_examples}: expected num_inputs "
            f"({config.num_inputs}) at most"
        )
    return config
