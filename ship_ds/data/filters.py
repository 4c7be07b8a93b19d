"""Which examples and tasks a run leaves out, counted by reason; what SHIP's authors leave out is a
preset."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from ship_ds.data.splits import HeldOutExample
from ship_ds.data.task import Example, Task
from ship_ds.section import Section

_UNUSED_IN_P3 = (
    *(1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 55, 56, 60, 61, 66, 67, 68, 71, 72, 73, 74, 86, 87),
    *(89, 90, 93, 94, 96, 98, 99, 102, 103, 139, 140, 141, 142, 162, 165, 166, 167, 168),
    *range(182, 198),
    *(199, 200, 201, 202, 203, 204, 208, 209, 210, 211, 212, 230, 231, 232, 234, 240, 256),
)
"""Tasks of the processed P3 sample whose instruction is of no use, as SHIP's authors found."""

PRESETS: dict[str, dict[str, Any]] = {
    "published-sni": {
        "max_input_words": 20,
        "max_instruction_words": 32,
        "max_examples_per_task": 27,
        "min_examples_per_task": 27,
    },
    "published-p3": {
        "max_input_letters": 1000,
        "max_examples_per_task": 25,
        "min_examples_per_task": 25,
        "leave_out": tuple(f"p3-{number}" for number in _UNUSED_IN_P3),
    },
}
"""The filters of SHIP's authors for Super-NaturalInstructions and for P3: exactly 27 and 25
examples a task, the first ones."""


class FilterConfig(Section):
    """None: no limit. An input's words are parted by single spaces, as in SHIP's code; an
    instruction's by white space.

    Whatever the limits, exact repeats of an example are left out, and tasks with nothing to train
    or to test on. Tasks with one distinct input can be trained on and not tested: they stay where
    min_examples_per_task is 1.
    """

    preset: Literal["published-sni", "published-p3"] | None = None
    """What SHIP's authors leave out of these data: sets the keys below that are not written out,
    and no others; a key that is written out wins, null too."""
    max_input_words: PositiveInt | None = None
    """Examples whose input has this many words or more are left out."""
    max_input_letters: PositiveInt | None = None
    """Examples whose input has this many letters or more are left out."""
    max_instruction_words: PositiveInt | None = None
    """Tasks whose instruction has more words are left out."""
    max_examples_per_task: PositiveInt | None = None
    """The first ones in file order are kept; the format's own test examples do not count."""
    min_examples_per_task: PositiveInt | None = None
    """Tasks with fewer examples left are left out; null: 1 in the formats alpaca, messages and
    plain-text, 2 in the others."""
    drop_empty_targets: bool = False
    """Leave out examples whose target is the empty text."""
    leave_out: tuple[str, ...] = ()
    """Ids of tasks that are left out; one that is not there changes nothing."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, Mapping) else None
        return PRESETS[name] | values if isinstance(name, str) and name in PRESETS else values


def apply_filters(
    tasks: Sequence[Task], config: FilterConfig, usual_min: int = 2
) -> tuple[list[Task], dict[str, int]]:
    """The tasks that stay, and how many examples and tasks each reason left out.

    Args:
        tasks: as they were read, or cut.
        config: the limits.
        usual_min: examples a task, at least, where the config has no number.
    """
    counts: Counter[str] = Counter()
    remaining = []
    fewest = config.min_examples_per_task or usual_min
    for task in tasks:
        if task.id in config.leave_out:
            counts["tasks: named in filters.leave_out"] += 1
            continue
        if (
            config.max_instruction_words is not None
            and len(task.instruction.split()) > config.max_instruction_words
        ):
            counts[f"tasks: instruction of more than {config.max_instruction_words} words"] += 1
            continue
        examples = _keep_examples(task.examples, config, counts)
        inputs = {example.input for example in examples}
        if len(examples) < fewest:
            counts[f"tasks: fewer than {fewest} examples left"] += 1
        elif len(inputs) < 2 and fewest > 1:
            counts["tasks: the same input in every example"] += 1
        elif inputs == {
            example.input for example in examples if isinstance(example, HeldOutExample)
        }:
            counts["tasks: only the format's test examples left"] += 1
        else:
            remaining.append(replace(task, examples=tuple(examples)))
    return remaining, dict(counts)


def _keep_examples(
    examples: Sequence[Example], config: FilterConfig, counts: Counter[str]
) -> list[Example]:
    remaining: dict[Example, None] = {}
    num_counted = 0
    for example in examples:
        if example in remaining:
            counts["examples: exact repeats"] += 1
        elif config.drop_empty_targets and not example.target:
            counts["examples: empty target"] += 1
        elif (
            config.max_input_words is not None
            and len(example.input.split(" ")) >= config.max_input_words
        ):
            counts[f"examples: input of {config.max_input_words} words or more"] += 1
        elif (
            config.max_input_letters is not None and len(example.input) >= config.max_input_letters
        ):
            counts[f"examples: input of {config.max_input_letters} letters or more"] += 1
        elif isinstance(example, HeldOutExample):
            remaining[example] = None
        elif (
            config.max_examples_per_task is not None and num_counted >= config.max_examples_per_task
        ):
            counts[f"examples: beyond the first {config.max_examples_per_task} of a task"] += 1
        else:
            remaining[example] = None
            num_counted += 1
    return list(remaining)
