"""Letters outside of a vocabulary are counted before training, field by field."""

import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer, pre_tokenizers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ship_ds.data.task import Example, Task
from ship_ds.data.unknown import unknown_texts


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerBase:
    """Of the kind that T5 has: pieces of words, and one token for all that is in none of them."""
    vocabulary = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        *((c, -2.0) for c in "▁abcdefghijklmnopqrstuvwxyz"),
    ]
    made = Tokenizer(Unigram(vocabulary, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


def test_letters_are_counted_by_the_texts_that_have_them(pieces: PreTrainedTokenizerBase) -> None:
    tasks = [
        Task(
            "t",
            "say it",
            (Example("a {b}", "{c}"), Example("a\nb", "d", ("d", "{~}"))),
            paraphrases=("sage 中 es",),
        ),
        Task("u", "say it", (Example("a {b}", "yes"),)),
    ]
    assert unknown_texts(tasks, pieces) == {
        "instruction with '中'": 1,
        "input with '\\n', '{', '}'": 2,
        "target with '{', '}', '~'": 2,
    }


def test_a_vocabulary_that_knows_all_letters_says_nothing(pieces: PreTrainedTokenizerBase) -> None:
    assert unknown_texts([Task("t", "say it", (Example("a b", "c"),))], pieces) == {}


def test_a_tokenizer_of_bytes_is_not_asked_for_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ByteLevelBPETokenizer()
    made.train_from_iterator([""], vocab_size=257, special_tokens=["<eos>"], show_progress=False)
    # As SmolLM2's, which calls its end of sequence its unknown token too.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, unk_token="<eos>")
    texts: list[int] = []
    call = type(tokenizer).__call__

    def counted(self: object, some: list[str], **options: object) -> object:
        texts.append(len(some))
        return call(self, some, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    tasks = [Task("t", "中", (Example("{", "\n"), Example("~", "é")))]
    found = unknown_texts(tasks, tokenizer)
    assert found == {} and sum(texts) == 1
