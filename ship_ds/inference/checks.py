"""What a user's texts have to be before a model reads them; each problem is one line."""

from collections.abc import Iterable, Sequence

from ship_ds.data.task import Example, Reading
from ship_ds.errors import UserError
from ship_ds.model.ship import ShipModel
from ship_ds.prompt import PromptFormat


def check_instruction(model: ShipModel, instruction: str) -> None:
    """Refuse an instruction that the encoder cannot read as it stands.

    Args:
        model: holds the encoder.
        instruction: what a user wrote.

    Raises:
        UserError: it is empty, has a word outside the vocabulary, or is too long.
    """
    if not instruction.strip():
        raise UserError("instruction: is empty; say what to do with the input")
    check_text(model.encoder_prompts, instruction, "instruction")
    check_length(
        len(model.encoder_prompts.encoder_prompt(instruction)),
        model.encoder.longest_text,
        "instruction",
        "encoder",
    )


def check_reading(model: ShipModel, reading: Reading) -> None:
    """Refuse what the encoder was not trained to read.

    Args:
        model: holds the encoder.
        reading: examples, and an instruction where there is one.

    Raises:
        UserError: the run's encoder reads no examples or fewer, or one of the texts cannot be read.
    """
    most = model.config.encoder.max_examples
    if not most:
        raise UserError(
            "examples: this run's encoder reads instructions alone; train one with "
            "model.encoder.max_examples, or induce the instruction first"
        )
    if len(reading.examples) > most:
        raise UserError(
            f"examples: {len(reading.examples)} are given, and this run's encoder was trained on "
            f"at most {most} (model.encoder.max_examples): give fewer"
        )
    if reading.instruction is not None:
        check_instruction(model, reading.instruction)
    elif not model.config.encoder.drop_instruction:
        raise UserError(
            "examples: this run's encoder always read an instruction beside them "
            "(model.encoder.drop_instruction=0): give one"
        )
    _check_some(reading.examples)
    if not reading.states_targets and not model.config.encoder.drop_targets:
        raise UserError(
            "inputs: this run's encoder always read their targets, too "
            "(model.encoder.drop_targets=0): give examples"
        )
    for number, example in enumerate(reading.examples, start=1):
        check_text(model.encoder_prompts, example.input, f"example {number}, input")
        if reading.states_targets:
            check_text(model.encoder_prompts, example.target, f"example {number}, target")
    check_length(
        len(model.encoder_prompts.encoder_prompt(reading)),
        model.encoder.longest_text,
        "examples",
        "encoder",
    )


def listed(texts: Iterable[str], name: str) -> list[str]:
    """The texts that a program gave, as a list.

    Raises UserError: it is one text, whose letters would be taken for texts, or not all are texts.
    """
    if isinstance(texts, str):
        raise UserError(f"{name}: is one text; give a list of texts, such as [{texts!r:.60}]")
    in_order = list(texts)
    for number, text in enumerate(in_order, start=1):
        if not isinstance(text, str):
            raise UserError(f"{name}: number {number} is no text: {text!r:.60}")
    return in_order


def paired(examples: Iterable[tuple[str, str]]) -> list[Example]:
    """The examples that a program gave as pairs of input and target.

    Raises UserError: one of them is no pair of texts.
    """
    read = []
    for number, pair in enumerate(examples, start=1):
        # A text of two letters is no pair.
        texts = tuple(pair) if isinstance(pair, tuple | list) else ()
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"example {number}: is {pair!r:.60}; give pairs of texts, such as "
                '("an input", "its target")'
            )
        read.append(Example(*texts))
    return read


def check_inputs(
    model: ShipModel,
    inputs: Sequence[str],
    max_new_tokens: int,
    reading: str | Reading | None = None,
) -> None:
    """Refuse inputs that the Task LLM cannot read and answer.

    Args:
        model: holds the Task LLM.
        inputs: what a user wrote.
        max_new_tokens: of an answer, which has to fit behind its input; 0: none is written.
        reading: what the adapter is made of, which may have to fit before it; None: of z alone.

    Raises:
        UserError: one cannot be read; the message gives its number from 1.
    """
    before = model.num_before(reading)
    with_it = ", behind the instruction," if before > model.num_virtual_tokens else ""
    answered = f" with an answer of {max_new_tokens} tokens" if max_new_tokens else ""
    for number, text in enumerate(inputs, start=1):
        check_text(model.prompts, text, f"input {number}")
        check_length(
            before + len(model.question(text)) + max_new_tokens,
            model.task_llm.language_model.context_length,
            f"input {number}{with_it}{answered}",
            "Task LLM",
        )


def check_examples(
    model: ShipModel, examples: Sequence[Example], instruction: str | None = None
) -> None:
    """Refuse examples that the Task LLM cannot read, or that no instruction explains.

    Args:
        model: holds the Task LLM.
        examples: what a user gave.
        instruction: whose adapter they are answered under, where it is known.

    Raises:
        UserError: there are none, one cannot be read, or two contradict each other; the message
            gives their numbers from 1.
    """
    _check_some(examples)
    first: dict[str, int] = {}
    for number, example in enumerate(examples, start=1):
        for part, text in (("input", example.input), ("target", example.target)):
            check_text(model.prompts, text, f"example {number}, {part}")
        length = len(model.question(example.input)) + len(model.prompts.target(example.target))
        check_length(
            model.num_before(instruction) + length,
            model.task_llm.language_model.context_length,
            f"example {number}",
            "Task LLM",
        )
        other = first.setdefault(example.input, number)
        earlier = examples[other - 1].target
        if earlier != example.target:
            raise UserError(
                f"examples {other} and {number}: the same input {example.input!r} has two targets, "
                f"{earlier!r} and {example.target!r}, and no instruction gives both: remove one"
            )


def _check_some(examples: Sequence[Example]) -> None:
    """Raises UserError where there is no example."""
    if not examples:
        raise UserError("examples: there are none; give at least one line with input and target")


def check_text(prompts: PromptFormat, text: str, what: str) -> None:
    """Refuse a text that would not be read as it stands.

    Args:
        prompts: hold the tokenizer.
        text: what a user wrote.
        what: it is, for the message.

    Raises:
        UserError: a control token that is written out in it, such as the end of a turn, would act
            as one; or it has a word outside the vocabulary.
    """
    prompts.check_spelling(text, what)
    unknown = prompts.tokenizer.unk_token_id
    if unknown is None or unknown not in prompts.ids(text):
        return
    # The first word that alone is unknown: the line should name what to reword.
    words = (word for word in text.split() if unknown in prompts.ids(word))
    raise UserError(
        f"{what}: {next(words, text)!r} is not in the base model's vocabulary, so "
        "it would not be read: reword it"
    )


def check_length(length: int, limit: int | None, what: str, reader: str) -> None:
    """Refuse what is longer than its reader's context.

    Args:
        length: tokens of the whole prompt, and of what has to fit behind it.
        limit: tokens that the reader reads at most; None: it has no limit.
        what: it is, for the message.
        reader: who reads it, for the message.

    Raises:
        UserError: it is longer.
    """
    if limit is not None and length > limit:
        raise UserError(
            f"{what}: is {length} tokens long in its prompt and the {reader} reads at "
            f"most {limit}: shorten it"
        )
