"""From tasks to splits: filters, cuts and rule groups, each with its counts."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from ship_ds.data.files import FilesConfig, read_splits
from ship_ds.data.filters import FilterConfig, apply_filters
from ship_ds.data.splits import SplitConfig, rule_groups, split_tasks
from ship_ds.data.task import DataError, Example, Task
from ship_ds.data.token_cache import tokenise_all
from ship_ds.data.truncation import TruncationConfig, truncate_tasks
from ship_ds.model.backbone import load_tokenizer
from ship_ds.prompt import PromptFormat


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("embedded")


def task(name: str, instruction: str, num: int = 6, length: int = 1) -> Task:
    return Task(name, instruction, tuple(Example(" ".join([str(i)] * length), str(i)) for i in range(num)), source="here")


def test_filters_count_what_they_leave_out() -> None:
    tasks = [task("long", "a", length=20), task("edge", "b", length=19), task("wordy", "c d e"), task("few", "f", num=1)]
    kept, counts = apply_filters(tasks, FilterConfig(max_input_words=20, max_instruction_words=2, max_examples_per_task=5))
    assert [(t.id, len(t.examples)) for t in kept] == [("edge", 5)]
    assert counts == {
        "examples: input of 20 words or more": 6, "tasks: fewer than 2 examples left": 2,
        "examples: beyond the first 5 of a task": 1, "tasks: instruction of more than 2 words": 1,
    }


def test_empty_targets_stay_unless_asked() -> None:
    tasks = [Task("t", "k", (Example("a", ""), Example("b", "x"), Example("c", "y")))]
    assert apply_filters(tasks, FilterConfig()) == (tasks, {})
    kept, counts = apply_filters(tasks, FilterConfig(drop_empty_targets=True))
    assert len(kept[0].examples) == 2 and counts == {"examples: empty target": 1}


def test_equal_and_near_equal_instructions_are_one_rule() -> None:
    tasks = [task("a", "Sort the list up"), task("b", "reverse it"), task("c", "sort the LIST up"),
             task("d", "one two three four five six seven eight nine"), task("e", "one two three four five six seven eight ten")]
    assert rule_groups(tasks) == [[0, 2], [1], [3, 4]]


def test_a_rule_lies_in_one_part_and_every_part_is_there() -> None:
    tasks = [task(f"{i}-{copy}", f"rule number {i}") for i in range(20) for copy in range(2)]
    splits = split_tasks(tasks, SplitConfig())
    parts = [{t.task.instruction for t in part} for part in (splits.seen, splits.dev, splits.unseen)]
    assert [len(part) for part in parts] == [17, 1, 2] and len(set.union(*parts)) == 20
    assert split_tasks(tasks, SplitConfig()) == splits != split_tasks(tasks, SplitConfig(seed=1))
    with pytest.raises(DataError, match="4 tasks are 2 distinct rules, too few"):
        split_tasks(tasks[:4], SplitConfig())


def test_no_input_is_both_trained_on_and_tested() -> None:
    examples = tuple(Example(str(i % 7), str(i)) for i in range(20))
    splits = split_tasks([Task(f"t{i}", f"rule {i}", examples) for i in range(3)], SplitConfig(test_examples=5))
    for part in splits.seen + splits.unseen:
        assert not {e.input for e in part.train} & {e.input for e in part.test}
        assert 0 < len(part.test) <= 5 and len(part.train) >= 3


def test_each_field_is_cut_by_its_policy(tokenizer: PreTrainedTokenizerBase) -> None:
    config = TruncationConfig.model_validate({
        "instruction": {"tokens": 2}, "input": {"tokens": 3, "policy": "cut_middle"}, "target": {"tokens": 2, "policy": "drop"},
    })
    tasks = [Task("t", "put 7 at the front", (Example("1 2 3 4 5 6", "1"), Example("1 2", "1 2 3")), ("put 7",))]
    kept, counts = truncate_tasks(tasks, tokenizer, config)
    assert (kept[0].instruction, kept[0].paraphrases) == ("put 7", ("put 7",))
    assert kept[0].examples == (Example("1 2 6", "1"),)
    assert counts == {"instruction: cut_end at 2 tokens": 1, "input: cut_middle at 3 tokens": 1, "target: dropped at 2 tokens": 1}
    start = TruncationConfig.model_validate({"input": {"tokens": 3, "policy": "cut_start"}})
    assert truncate_tasks(tasks, tokenizer, start)[0][0].examples[0].input == "4 5 6"


def test_token_cache_is_made_once_and_again_when_damaged(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    texts = ["put 7 at the front", "1 2 3", ""]
    expected = {text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}
    assert tokenise_all(texts, tokenizer, tmp_path) == expected
    folder, = tmp_path.iterdir()
    made = (folder / "done.json").stat().st_mtime_ns
    assert tokenise_all(texts, tokenizer, tmp_path) == expected and (folder / "done.json").stat().st_mtime_ns == made
    for arrow in folder.glob("*.arrow"):
        arrow.unlink()
    assert tokenise_all(texts, tokenizer, tmp_path) == expected
    assert tokenise_all([*texts, "4"], tokenizer, tmp_path).keys() == {*texts, "4"} and len(list(tmp_path.iterdir())) == 2


def test_cached_tokens_are_the_tokenizers_own(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    split = split_tasks([task(f"t{i}", f"put {i} at the end") for i in range(3)], SplitConfig())
    plain, cached = PromptFormat(tokenizer), PromptFormat(tokenizer)
    texts = cached.texts(split.seen)
    ids = tokenise_all(texts, tokenizer, tmp_path)
    cached.remember(ids)
    cached.tokenizer = None  # type: ignore[assignment]  # every text has to come from the cache
    for part in split.seen:
        assert cached.encoder_prompt(part.task.instruction) == plain.encoder_prompt(part.task.instruction)
        for example in part.train:
            assert cached.task_prompt(example.input) == plain.task_prompt(example.input)
            assert cached.target(example.target) == plain.target(example.target)


def test_read_splits_says_every_count(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    import json

    rows = [{"id": f"t{i}", "instruction": f"add {i}", "examples": [{"input": str(n), "target": str(n)} for n in range(8)]}
            for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    config = FilesConfig.model_validate({"path": str(tmp_path), "filters": {"max_examples_per_task": 6}})
    splits = read_splits(config, tokenizer, said.append)
    assert (len(splits.seen), len(splits.dev), len(splits.unseen)) == (25, 2, 3)
    assert said == [f"{tmp_path}: 30 tasks, 240 examples", "left out or cut: examples: beyond the first 6 of a task: 60",
                    "25 seen, 2 dev and 3 unseen tasks"]
