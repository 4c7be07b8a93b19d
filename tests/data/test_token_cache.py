"""The cache holds the tokenizer's own ids, is made once, and is made again when it is not whole."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from ship_ds.data import token_cache
from ship_ds.data.splits import SplitConfig, split_tasks
from ship_ds.data.task import Example, Task
from ship_ds.data.token_cache import fingerprint, tokenise_all
from ship_ds.model.loading import load_tokenizer
from ship_ds.prompt import PromptFormat

TEXTS = ["put 7 at the front", "1 2 3", "", "1 2 3", "naïve 😀"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("embedded")


def expected(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, ...]]:
    return {text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS}


def test_made_once(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tokenise_all(TEXTS, tokenizer, tmp_path / "new") == expected(tokenizer)
    (folder,) = (tmp_path / "new").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_write", lambda *_: pytest.fail("made again"))
        assert tokenise_all(TEXTS, tokenizer, tmp_path / "new") == expected(tokenizer)
    assert tokenise_all(TEXTS[:2], tokenizer, tmp_path / "new").keys() == set(TEXTS[:2])
    assert {folder} < set((tmp_path / "new").iterdir()) and len(
        list((tmp_path / "new").iterdir())
    ) == 2
    assert tokenise_all([], tokenizer, tmp_path / "none") == {} and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "missing", "no manifest", "broken manifest", "empty folder"]
)
def test_made_again_when_damaged(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, damage: str
) -> None:
    tokenise_all(TEXTS, tokenizer, tmp_path)
    (folder,) = tmp_path.iterdir()
    arrow, manifest = next(folder.glob("*.arrow")), folder / "manifest.json"
    whole = arrow.read_bytes()
    if damage == "cut":
        arrow.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        arrow.write_bytes(whole[:-200] + bytes(255 - byte for byte in whole[-200:]))
    elif damage == "missing":
        arrow.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "broken manifest":
        manifest.write_text('{"half')
    else:
        for file in folder.iterdir():
            file.unlink()
    assert tokenise_all(TEXTS, tokenizer, tmp_path) == expected(tokenizer)
    assert next(folder.glob("*.arrow")).read_bytes() == whole and list(tmp_path.iterdir()) == [
        folder
    ]


def test_another_process_that_was_first_is_kept(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenise_all(TEXTS, tokenizer, tmp_path)
    (folder,) = tmp_path.iterdir()
    made = (folder / "manifest.json").stat().st_mtime_ns
    monkeypatch.setattr(token_cache, "_read", lambda _: None)
    assert tokenise_all(TEXTS, tokenizer, tmp_path) == expected(tokenizer)
    assert (
        list(tmp_path.iterdir()) == [folder]
        and (folder / "manifest.json").stat().st_mtime_ns == made
    )


def test_the_fingerprint_is_of_texts_and_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    other = load_tokenizer("embedded")
    assert (
        fingerprint(["a", "b"], other)
        == fingerprint(["a", "b"], tokenizer)
        != fingerprint(["b", "a"], tokenizer)
    )
    assert fingerprint(["a\0b", "c"], tokenizer) != fingerprint(["a", "b\0c"], tokenizer)
    # the call's settings stay in the backend
    other(["1", "1 2"], padding=True, truncation=True, max_length=3)
    assert fingerprint(["a"], other) == fingerprint(["a"], tokenizer)
    other.add_tokens(["<new>"])
    assert fingerprint(["a"], other) != fingerprint(["a"], tokenizer)


def test_prompts_from_the_cache_are_the_tokenizers_own(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    examples = tuple(Example(str(i), str(i)) for i in range(6))
    split = split_tasks(
        [Task(f"t{i}", f"put {i} at the end", examples) for i in range(3)], SplitConfig()
    )
    plain, cached = PromptFormat(tokenizer), PromptFormat(tokenizer)
    cached.remember(tokenise_all(cached.texts(split.seen), tokenizer, tmp_path))
    cached.tokenizer = None  # type: ignore[assignment]  # every text has to come from the cache
    for part in split.seen:
        assert cached.encoder_prompt(part.task.instruction) == plain.encoder_prompt(
            part.task.instruction
        )
        for example in part.train:
            assert cached.task_prompt(example.input) == plain.task_prompt(example.input)
            assert cached.target(example.target) == plain.target(example.target)
