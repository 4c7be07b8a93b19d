"""From a folder to splits: each step's counts are logged, and nothing heavy is imported."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from ship_ds.data.mixture import MixtureConfig, MixtureSource, MixtureTasks
from ship_ds.data.source import TaskSource
from ship_ds.data.task import DataError, Splits, SplitTask, Task
from ship_ds.data.task_files import FilesConfig, FilesSource, parse_benchmark
from ship_ds.errors import UserError
from ship_ds.model.loading import load_tokenizer


def write(folder: Path, num_tasks: int, examples: list[dict[str, str]]) -> None:
    rows = [
        {"id": f"t{i}", "instruction": f"add {i}", "examples": examples} for i in range(num_tasks)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_count_is_logged(tmp_path: Path) -> None:
    write(tmp_path, 30, [{"input": str(n), "target": str(n)} for n in range(8)])
    lines: list[str] = []
    config = FilesConfig.model_validate(
        {"path": str(tmp_path), "filters": {"max_examples_per_task": 6}}
    )
    splits = FilesSource(config).read(load_tokenizer("embedded"), lines.append)
    assert (len(splits.seen), len(splits.dev), len(splits.unseen)) == (25, 2, 3)
    assert lines == [
        f"{tmp_path}: 30 tasks, 240 examples",
        "left out: examples: beyond the first 6 of a task: 60",
        "25 seen, 2 dev and 3 unseen tasks",
    ]


def test_weights_of_a_file_reach_the_sampler_and_the_fingerprint(tmp_path: Path) -> None:
    write(tmp_path, 30, [{"input": str(n), "target": str(n)} for n in range(8)])
    source, tokenizer = FilesSource(FilesConfig(path=str(tmp_path))), load_tokenizer("embedded")
    plain = source.read(tokenizer, lambda line: None)
    # As it was before files had weights: a run without any goes on.
    assert source.fingerprint(plain) == hashlib.sha256(repr(plain).encode()).hexdigest()
    file = tmp_path / "a.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row | {"weight": 3}) + "\n" for row in rows))
    heavy = source.read(tokenizer, lambda line: None)
    assert {task.weight for task in heavy.seen} == {3.0}
    assert source.fingerprint(heavy) != source.fingerprint(plain)
    mixture = MixtureConfig(sources=(MixtureSource(path=str(tmp_path), weight=0.5),))
    mixed = MixtureTasks(mixture).read(tokenizer, lambda line: None)
    assert {task.weight for task in mixed.seen} == {1.5}


def test_weights_are_in_the_fingerprint_of_every_source_and_have_a_least_one() -> None:
    class Plain(FilesSource):
        fingerprint = TaskSource.fingerprint

    source = Plain(FilesConfig(path="x"))
    one, heavy = (
        Splits((SplitTask(Task("t", "do", ()), (), (), weight=w),), (), ()) for w in (1.0, 3.0)
    )
    assert source.fingerprint(one) == hashlib.sha256(repr(one).encode()).hexdigest()
    assert source.fingerprint(heavy) != source.fingerprint(one)
    mixture = MixtureTasks(MixtureConfig(sources=(MixtureSource(path="x"),)))
    old = hashlib.sha256(repr(one).encode()).hexdigest()
    assert mixture.fingerprint(one) == hashlib.sha256(f"{old} [1.0]".encode()).hexdigest()
    with pytest.raises(ValidationError, match="weight"):
        MixtureSource(path="x", weight=1e-300)


def test_a_run_with_nothing_to_train_on_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, 4, [{"input": str(n), "target": str(n)} for n in range(8)])
    config = FilesConfig.model_validate({"path": str(tmp_path), "split": {"unseen_share": 1}})
    with pytest.raises(DataError, match=r"^data\.split\.unseen_share: no task is left to train on"):
        FilesSource(config).read(load_tokenizer("embedded"), lambda line: None)


def test_what_a_reader_leaves_out_is_logged(tmp_path: Path) -> None:
    """The first words of every chat, which are no instruction."""
    said = (("system", "Be helpful."), ("user", "question {}"), ("assistant", "answer"))
    rows = [
        {"messages": [{"role": role, "content": text.format(i)} for role, text in said]}
        for i in range(4)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    lines: list[str] = []
    source = FilesSource(FilesConfig(path=str(tmp_path)))
    splits = source.read(load_tokenizer("embedded"), lines.append)
    assert len(splits.seen) == 4
    assert lines[1].startswith("left out: system messages, the same in most rows that have one")


def test_examples_that_cutting_makes_equal_are_one(tmp_path: Path) -> None:
    write(tmp_path, 3, [{"input": text, "target": "1"} for text in ("1 2 3", "1 2 4", "5", "6")])
    lines: list[str] = []
    config = FilesConfig.model_validate(
        {"path": str(tmp_path), "truncation": {"input": {"tokens": 2, "policy": "cut_end"}}}
    )
    splits = FilesSource(config).read(load_tokenizer("embedded"), lines.append)
    assert sorted(e.input for e in splits.seen[0].train + splits.seen[0].test) == ["1 2", "5", "6"]
    assert lines[1:3] == [
        "cut to length: input: cut_end at 2 tokens: 6",
        "left out after cutting: examples: exact repeats: 3",
    ]


def test_the_config_knows_the_formats() -> None:
    with pytest.raises(ValidationError, match="natural-instructions"):
        FilesConfig.model_validate({"path": "x", "format": "csv"})


def test_the_config_and_readers_import_nothing_heavy() -> None:
    code = """
import sys, ship_ds.data.task_files, ship_ds.data.token_cache, ship_ds.data.describe
assert not {"torch", "transformers", "datasets", "pyarrow"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr


def test_how_a_benchmark_is_split_is_no_setting(tmp_path: Path) -> None:
    for key, value in (("unseen_share", "0.5"), ("keeps_together", "dataset")):
        text = f"{{path: {tmp_path}, split: {{{key}: {value}}}}}"
        with pytest.raises(UserError, match=f"--data: split.{key}: all of these tasks are tested"):
            parse_benchmark(text, "--data")
