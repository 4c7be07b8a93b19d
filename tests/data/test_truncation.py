"""Each field is cut by its policy at token edges, and what comes out is within the limit."""

from typing import Any

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ship_ds.data.splits import HeldOutExample, hold_out
from ship_ds.data.task import DataError, Example, Task
from ship_ds.data.truncation import TruncationConfig, truncate_tasks
from ship_ds.model.loading import load_tokenizer

NO_LIMITS: dict[str, Any] = {name: {"tokens": None} for name in ("instruction", "input", "target")}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """Untrained: a token is a byte, so a letter can be several."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator([""], vocab_size=257, special_tokens=["<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="<eos>")


def limits(**changes: Any) -> TruncationConfig:
    return TruncationConfig.model_validate({**NO_LIMITS, **changes})


def cut_input(
    text: str, tokenizer: PreTrainedTokenizerBase, tokens: int, policy: str
) -> str | None:
    task = Task("t", "k", (Example("x", "y"), Example(text, "y")))
    kept, counts = truncate_tasks(
        [task], tokenizer, limits(input={"tokens": tokens, "policy": policy})
    )
    assert sum(count for what, count in counts.items() if what.startswith("input: ")) == 1
    return kept[0].examples[1].input if len(kept[0].examples) == 2 else None


def test_defaults() -> None:
    found = TruncationConfig()
    assert (found.instruction.tokens, found.instruction.policy) == (256, "cut_end")
    assert (found.input.tokens, found.input.policy) == (512, "cut_middle")
    assert (found.target.tokens, found.target.policy) == (128, "drop")


@pytest.mark.parametrize(
    ("policy", "left"),
    [("cut_end", "1 2 3"), ("cut_start", "4 5 6"), ("cut_middle", "1 2 6"), ("drop", None)],
)
def test_policies(tokenizer: PreTrainedTokenizerBase, policy: str, left: str | None) -> None:
    assert cut_input("1 2 3 4 5 6", tokenizer, 3, policy) == left


def test_inputs_that_cutting_makes_equal_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    """Their answers then count as right for each other."""
    rows = [("1 2 3 6", "1"), ("1 2 4 6", "2"), ("1 2 4 6", "3"), ("5", "1"), ("5", "2")]
    rows += [("1 1 7 8", "4"), ("1 1 9 8", "4")]  # one example, twice
    task = Task("t", "put 7", tuple(Example(*row) for row in rows))
    config = limits(input={"tokens": 3, "policy": "cut_middle"})
    _, counts = truncate_tasks([task], tokenizer, config)
    assert counts == {
        "input: cut_middle at 3 tokens": 5,
        "inputs: cut to the text of another one with other answers": 1,
    }


def test_counts_by_field_and_policy(tokenizer: PreTrainedTokenizerBase) -> None:
    config = limits(
        instruction={"tokens": 2},
        input={"tokens": 3, "policy": "cut_middle"},
        target={"tokens": 2, "policy": "drop"},
    )
    task = Task(
        "t",
        "put 7 at the front",
        (Example("1 2 3 4 5 6", "1"), Example("1 2", "1 2 3")),
        ("put 7", "put 8 at the end"),
    )
    kept, counts = truncate_tasks([task], tokenizer, config)
    assert (kept[0].instruction, kept[0].paraphrases) == ("put 7", ("put 8",))
    assert kept[0].examples == (Example("1 2 6", "1"),)
    assert counts == {
        "instruction: cut_end at 2 tokens": 2,
        "input: cut_middle at 3 tokens": 1,
        "target: dropped at 2 tokens": 1,
        "examples: left without input or target": 1,
    }


def test_a_right_answer_within_the_limit_stands_in_for_a_dropped_target(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    task = Task(
        "t",
        "put 7",
        (Example("1", "1 2 3", ("1 2 3", "4", "5")), Example("2", "6", ("6", "1 2 3"))),
    )
    kept, _ = truncate_tasks([task], tokenizer, limits(target={"tokens": 1, "policy": "drop"}))
    assert kept[0].examples == (Example("1", "4", ("4", "5")), Example("2", "6"))


def test_a_task_whose_every_wording_is_dropped_goes(tokenizer: PreTrainedTokenizerBase) -> None:
    tasks = [
        Task("t", "put 7 at the front", (Example("1", "2"),)),
        Task("u", "put 7", (Example("1", "2"),)),
    ]
    kept, counts = truncate_tasks(
        tasks, tokenizer, limits(instruction={"tokens": 2, "policy": "drop"})
    )
    assert kept == tasks[1:]
    assert counts == {
        "instruction: dropped at 2 tokens": 1,
        "tasks: left without instruction or examples": 1,
    }


def test_what_is_within_the_limits_is_untouched(tokenizer: PreTrainedTokenizerBase) -> None:
    tasks = [
        Task(
            "t",
            "put 7",
            (Example("1  2", "", ("", "1")), hold_out(Example("3", "4"))),
            ("at the front",),
            "here",
            "f",
        )
    ]
    assert truncate_tasks(tasks, tokenizer, TruncationConfig()) == (tasks, {})
    assert isinstance(
        truncate_tasks(tasks, tokenizer, limits(input={"tokens": 1}))[0][0].examples[1],
        HeldOutExample,
    )


@pytest.mark.parametrize("policy", ["cut_end", "cut_start", "cut_middle"])
@pytest.mark.parametrize("text", ["😀😀😀😀", "日本語のテキスト", "naïve café ☕ crème", "a" * 50])
def test_letters_of_several_tokens_stay_whole_and_within_the_limit(
    byte_level: PreTrainedTokenizerFast, policy: str, text: str
) -> None:
    for tokens in (4, 7, 9):
        left = cut_input(text, byte_level, tokens, policy)
        assert left and set(left) <= {*text, " "} and len(byte_level(left)["input_ids"]) <= tokens
    assert policy == "cut_middle" or left in text


def test_a_letter_that_is_too_long_alone_leaves_nothing(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    assert cut_input("😀😀", byte_level, 3, "cut_end") is None


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast, name_or_path = False, "models/old"

    with pytest.raises(DataError, match="models/old: a slow tokenizer"):
        truncate_tasks([], Slow(), TruncationConfig())  # type: ignore[arg-type]
