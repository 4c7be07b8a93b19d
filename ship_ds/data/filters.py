"""Which examples and tasks a run leaves out, counted by reason (SHIP's own filter: inputs under 20 words, 27 examples a task)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, PositiveInt

from ship_ds.data.task import Task


class FilterConfig(BaseModel):
    """None: no limit. An input's words are parted by single spaces, as in SHIP's code; an instruction's by white space."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_input_words: PositiveInt | None = None
    """Examples whose input has this many words or more are left out."""
    max_instruction_words: PositiveInt | None = None
    max_examples_per_task: PositiveInt | None = None
    """The first ones in file order are kept."""
    min_examples_per_task: PositiveInt = 2
    drop_empty_targets: bool = False


def apply_filters(tasks: Sequence[Task], config: FilterConfig) -> tuple[list[Task], dict[str, int]]:
    """The tasks that stay, and how many examples and tasks each reason left out."""
    counts: Counter[str] = Counter()
    kept = []
    for task in tasks:
        if config.max_instruction_words is not None and len(task.instruction.split()) > config.max_instruction_words:
            counts[f"tasks: instruction of more than {config.max_instruction_words} words"] += 1
            continue
        examples = list(task.examples)
        if config.drop_empty_targets:
            full = [example for example in examples if example.target]
            counts["examples: empty target"] += len(examples) - len(full)
            examples = full
        if config.max_input_words is not None:
            short = [example for example in examples if len(example.input.split(" ")) < config.max_input_words]
            counts[f"examples: input of {config.max_input_words} words or more"] += len(examples) - len(short)
            examples = short
        if config.max_examples_per_task is not None:
            counts[f"examples: beyond the first {config.max_examples_per_task} of a task"] += max(
                0, len(examples) - config.max_examples_per_task
            )
            examples = examples[: config.max_examples_per_task]
        if len(examples) < config.min_examples_per_task:
            counts[f"tasks: fewer than {config.min_examples_per_task} examples left"] += 1
            continue
        kept.append(replace(task, examples=tuple(examples)))
    return kept, {reason: count for reason, count in counts.items() if count}
