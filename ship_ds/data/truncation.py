"""Cutting instructions, inputs and targets to a number of tokens, before anything else sees them; every cut is counted.

The text itself is cut at a token's edge, so that training, evaluation and the printed samples speak of the same text.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from ship_ds.data.task import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Policy = Literal["cut_end", "cut_middle", "cut_start", "drop"]


class FieldLimit(BaseModel):
    """At most `tokens` (None: any number). `drop` leaves out the example, or for an instruction the task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: PositiveInt | None = None
    policy: Policy = "cut_end"


class InputLimit(FieldLimit):
    """Both ends of an input often matter: a question before or after its context."""

    tokens: PositiveInt | None = 512
    policy: Policy = "cut_middle"


class TargetLimit(FieldLimit):
    """Half an answer would be a wrong one."""

    tokens: PositiveInt | None = 128
    policy: Policy = "drop"


class InstructionLimit(FieldLimit):
    tokens: PositiveInt | None = 256


class TruncationConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    instruction: InstructionLimit = InstructionLimit()
    input: InputLimit = InputLimit()
    target: TargetLimit = TargetLimit()


class _Cutter:
    """One field's limit with its counts."""

    def __init__(self, name: str, limit: FieldLimit, tokenizer: "PreTrainedTokenizerBase", counts: Counter[str]) -> None:
        self.name, self.limit, self.tokenizer, self.counts = name, limit, tokenizer, counts

    def __call__(self, text: str) -> str | None:
        """The text, cut where it has to be; None: drop what it belongs to."""
        most = self.limit.tokens
        if most is None or len(text) <= most:  # a token has at least one letter
            return text
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) <= most:
            return text
        self.counts[f"{self.name}: {'dropped' if self.limit.policy == 'drop' else self.limit.policy} at {most} tokens"] += 1
        if self.limit.policy == "drop":
            return None
        head = {"cut_end": most, "cut_start": 0, "cut_middle": (most + 1) // 2}[self.limit.policy]
        tail = most - head
        start = text[: offsets[head - 1][1]] if head else ""
        end = text[offsets[-tail][0] :] if tail else ""
        return (start.rstrip() + " " + end.lstrip()).strip() if head and tail else (start or end).strip()


def truncate_tasks(
    tasks: Sequence[Task], tokenizer: "PreTrainedTokenizerBase", config: TruncationConfig
) -> tuple[list[Task], dict[str, int]]:
    """The tasks within the limits, and how often each field was cut or dropped. Needs a fast tokenizer (for offsets)."""
    counts: Counter[str] = Counter()
    instruction, text, target = (
        _Cutter(name, limit, tokenizer, counts)
        for name, limit in (("instruction", config.instruction), ("input", config.input), ("target", config.target))
    )
    kept = []
    for task in tasks:
        wordings = [cut for wording in (task.instruction, *task.paraphrases) if (cut := instruction(wording)) is not None]
        examples = [short for example in task.examples if (short := _cut_example(example, text, target)) is not None]
        if wordings and examples:
            kept.append(replace(task, instruction=wordings[0], paraphrases=tuple(wordings[1:]), examples=tuple(examples)))
        else:
            counts["tasks: nothing left"] += 1
    return kept, dict(counts)


def _cut_example(example: Example, text: _Cutter, target: _Cutter) -> Example | None:
    answers = [cut for answer in example.answers if (cut := target(answer)) is not None]
    question = text(example.input)
    if question is None or not answers:
        return None
    return Example(question, answers[0], tuple(answers) if len(answers) > 1 else ())
