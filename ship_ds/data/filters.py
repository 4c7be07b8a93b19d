"""Which examples and tasks a run leaves out, counted by reason (SHIP's own filter: inputs under 20
words, 27 examples a task)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from pydantic import PositiveInt

from ship_ds.data.splits import HeldOutExample
from ship_ds.data.task import Example, Task
from ship_ds.section import Section


class FilterConfig(Section):
    """None: no limit. An input's words are parted by single spaces, as in SHIP's code; an
    instruction's by white space.

    Whatever the limits, exact repeats of an example are left out, and tasks with nothing to train
    or to test on.
    """

    max_input_words: PositiveInt | None = None
    """Examples whose input has this many words or more are left out."""
    max_instruction_words: PositiveInt | None = None
    """Tasks whose instruction has more words are left out."""
    max_examples_per_task: PositiveInt | None = None
    """The first ones in file order are kept; the format's own test examples do not count."""
    min_examples_per_task: PositiveInt = 2
    """Tasks with fewer examples left are left out."""
    drop_empty_targets: bool = False
    """Leave out examples whose target is the empty text."""


def apply_filters(tasks: Sequence[Task], config: FilterConfig) -> tuple[list[Task], dict[str, int]]:
    """The tasks that stay, and how many examples and tasks each reason left out."""
    counts: Counter[str] = Counter()
    remaining = []
    for task in tasks:
        if (
            config.max_instruction_words is not None
            and len(task.instruction.split()) > config.max_instruction_words
        ):
            counts[f"tasks: instruction of more than {config.max_instruction_words} words"] += 1
            continue
        examples = _keep_examples(task.examples, config, counts)
        inputs = {example.input for example in examples}
        if len(examples) < config.min_examples_per_task:
            counts[f"tasks: fewer than {config.min_examples_per_task} examples left"] += 1
        elif len(inputs) < 2:
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
