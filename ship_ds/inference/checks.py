"""What a user's texts have to be before a model reads them; each problem is one line."""

from collections.abc import Sequence

from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.model.ship import ShipModel
from ship_ds.prompt import PromptFormat


def check_instruction(model: ShipModel, instruction: str) -> None:
    """Raises UserError for an instruction that the encoder cannot read as it stands."""
    if not instruction.strip():
        raise UserError("instruction: is empty; say what to do with the input")
    _check_known(model.encoder_prompts, instruction, "instruction")
    _check_length(
        len(model.encoder_prompts.encoder_prompt(instruction)),
        model.encoder.language_model.context_length,
        "instruction",
        "encoder",
    )


def check_inputs(model: ShipModel, inputs: Sequence[str], max_new_tokens: int) -> None:
    """Raises UserError, naming the input by its number from 1."""
    for number, text in enumerate(inputs, start=1):
        _check_known(model.prompts, text, f"input {number}")
        length = model.num_virtual_tokens + len(model.question(text)) + max_new_tokens
        _check_length(
            length,
            model.task_llm.language_model.context_length,
            f"input {number} with an answer of {max_new_tokens} tokens",
            "Task LLM",
        )


def check_examples(model: ShipModel, examples: Sequence[Example]) -> None:
    """Raises UserError, naming the example by its number from 1, also where two contradict each
    other."""
    if not examples:
        raise UserError("examples: there are none; give at least one line with input and target")
    first: dict[str, int] = {}
    for number, example in enumerate(examples, start=1):
        for part, text in (("input", example.input), ("target", example.target)):
            _check_known(model.prompts, text, f"example {number}, {part}")
        length = len(model.question(example.input)) + len(model.prompts.target(example.target))
        _check_length(
            model.num_virtual_tokens + length,
            model.task_llm.language_model.context_length,
            f"example {number}",
            "Task LLM",
        )
        other = first.setdefault(example.input, number)
        before = examples[other - 1].target
        if before != example.target:
            raise UserError(
                f"examples {other} and {number}: the same input {example.input!r} has two targets, "
                f"{before!r} and "
                f"{example.target!r}, and no instruction gives both: remove one"
            )


def _check_known(prompts: PromptFormat, text: str, what: str) -> None:
    unknown = prompts.tokenizer.unk_token_id
    if (
        unknown is None
        or unknown not in prompts.tokenizer(text, add_special_tokens=False)["input_ids"]
    ):
        return
    words = [
        word
        for word in text.split()
        if unknown in prompts.tokenizer(word, add_special_tokens=False)["input_ids"]
    ]
    raise UserError(
        f"{what}: {(words or [text])[0]!r} is not in the base model's vocabulary, so "
        "it would not be read: reword it"
    )


def _check_length(length: int, limit: int | None, what: str, reader: str) -> None:
    if limit is not None and length > limit:
        raise UserError(
            f"{what}: is {length} tokens long in its prompt and the {reader} reads at "
            f"most {limit}: shorten it"
        )
