"""Cutting instructions, inputs and targets to a number of tokens, before anything else sees them;
every cut is counted.

The text itself is cut at a token's edge, so that training, evaluation and the printed samples speak
of the same text.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from ship_ds.data.task import DataError, Example, Task
from ship_ds.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Policy = Literal["cut_end", "cut_middle", "cut_start", "drop"]
_CHUNK = 4096


class FieldLimit(Section):
    """At most `tokens` (None: any number). `drop` leaves out the text: a wording, an answer, or an
    input with its example."""

    tokens: PositiveInt | None = None
    """At most so many, as the tokenizer of the Task LLM counts them; None: any number."""
    policy: Policy = "cut_end"
    """What goes where a text is longer: its end, its middle or its start is cut away, or the whole
    text is left out."""


class InstructionLimit(FieldLimit):
    """Of instructions: what they ask for is mostly said first."""

    tokens: PositiveInt | None = 256
    """At most so many; None: any number."""


class InputLimit(FieldLimit):
    """Both ends of an input often matter: a question before or after its context."""

    tokens: PositiveInt | None = 512
    """At most so many; None: any number."""
    policy: Policy = "cut_middle"
    """What goes of a longer text; see data.truncation.instruction."""


class TargetLimit(FieldLimit):
    """Half an answer would be a wrong one."""

    tokens: PositiveInt | None = 128
    """At most so many; None: any number."""
    policy: Policy = "drop"
    """What goes of a longer text; see data.truncation.instruction."""


class TruncationConfig(Section):
    """How long texts may be, in tokens of the Task LLM's tokenizer."""

    instruction: InstructionLimit = InstructionLimit()
    """Of each wording of an instruction."""
    input: InputLimit = InputLimit()
    """Of each input."""
    target: TargetLimit = TargetLimit()
    """Of each target."""


def truncate_tasks(
    tasks: Sequence[Task], tokenizer: "PreTrainedTokenizerBase", config: TruncationConfig
) -> tuple[list[Task], dict[str, int]]:
    """The tasks within the limits, and how often each field was cut or dropped.

    Args:
        tasks: as the filters left them.
        tokenizer: the Task LLM's, by which texts are cut to a number of tokens; a fast one.
        config: the limits.

    Returns:
        The tasks that still have an instruction and an example, in their order; and by what was
        done, such as "input: cut_middle at 512 tokens", how often, without zeros.

    Raises:
        DataError: the tokenizer is a slow one.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{tokenizer.name_or_path}: a slow tokenizer; cutting needs a fast one, "
            "with a tokenizer.json"
        )
    counts: Counter[str] = Counter()
    examples = [example for task in tasks for example in task.examples]
    wording = _Cutter(
        "instruction",
        config.instruction,
        tokenizer,
        counts,
        (w for task in tasks for w in _wordings(task)),
    )
    question = _Cutter(
        "input", config.input, tokenizer, counts, (example.input for example in examples)
    )
    answer = _Cutter(
        "target",
        config.target,
        tokenizer,
        counts,
        (a for example in examples for a in example.answers),
    )
    remaining = []
    for task in tasks:
        wordings = wording(_wordings(task))
        cut = [(example, _cut_example(example, question, answer)) for example in task.examples]
        within = [short for _, short in cut if short is not None]
        counts["inputs: cut to the text of another one with other answers"] += _num_confused(cut)
        counts["examples: left without input or target"] += len(task.examples) - len(within)
        if wordings and within:
            remaining.append(
                replace(
                    task, instruction=wordings[0], paraphrases=wordings[1:], examples=tuple(within)
                )
            )
        else:
            counts["tasks: left without instruction or examples"] += 1
    return remaining, {what: count for what, count in counts.items() if count}


def _num_confused(cut: Iterable[tuple[Example, Example | None]]) -> int:
    """Of inputs that differ and are equal once cut, all but the first one, where their answers
    differ."""
    whole: dict[str, set[str]] = {}
    answers: dict[str, set[tuple[str, ...]]] = {}
    for example, short in cut:
        if short is not None:
            whole.setdefault(short.input, set()).add(example.input)
            answers.setdefault(short.input, set()).add(short.answers)
    return sum(len(texts) - 1 for text, texts in whole.items() if len(answers[text]) > 1)


def _wordings(task: Task) -> tuple[str, ...]:
    return (task.instruction, *task.paraphrases)


def _cut_example(example: Example, question: "_Cutter", answer: "_Cutter") -> Example | None:
    inputs, answers = question((example.input,)), answer(example.answers)
    if not inputs or not answers:
        return None
    return replace(
        example, input=inputs[0], target=answers[0], references=answers if len(answers) > 1 else ()
    )


class _Cutter:
    """One field's limit: texts -> what is left of them, without repeats that cutting makes."""

    def __init__(
        self,
        name: str,
        limit: FieldLimit,
        tokenizer: "PreTrainedTokenizerBase",
        counts: Counter[str],
        texts: Iterable[str],
    ) -> None:
        self.counts, self.cut = counts, dict[str, str | None]()
        done = "dropped" if limit.policy == "drop" else limit.policy
        self.reason = f"{name}: {done} at {limit.tokens} tokens"
        if limit.tokens is not None:
            for text in _longer(texts, limit.tokens, tokenizer):
                self.cut[text] = _cut(text, limit.tokens, limit.policy, tokenizer)

    def __call__(self, texts: Sequence[str]) -> tuple[str, ...]:
        self.counts[self.reason] += sum(text in self.cut for text in texts)
        return tuple(
            dict.fromkeys(
                short for text in texts if (short := self.cut.get(text, text)) is not None
            )
        )


def _longer(texts: Iterable[str], most: int, tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    distinct = list(dict.fromkeys(texts))
    for start in range(0, len(distinct), _CHUNK):
        chunk = distinct[start : start + _CHUNK]
        ids: Any = tokenizer(
            chunk, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        yield from (text for text, row in zip(chunk, ids, strict=True) if len(row) > most)


def _cut(text: str, most: int, policy: Policy, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """None where the text is to be dropped, and where not even one token's letters are within the
    limit."""
    if policy == "drop":
        return None
    offsets: Any = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    # the parts may have more tokens than the whole had: letters of several bytes, a seam
    for num_kept in range(most, 0, -1):
        head = {"cut_end": num_kept, "cut_start": 0, "cut_middle": (num_kept + 1) // 2}[policy]
        tail = num_kept - head
        start = text[: offsets[head - 1][1]].strip() if head else ""
        end = text[offsets[-tail][0] :].strip() if tail else ""
        short = f"{start} {end}".strip()
        if short and not _exceeds(short, most, tokenizer):
            return short
    return None


def _exceeds(text: str, most: int, tokenizer: "PreTrainedTokenizerBase") -> bool:
    ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return len(ids) > most
