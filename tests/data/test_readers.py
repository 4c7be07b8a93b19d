"""Each reader on a small file written here in its format, with the format's oddities; then all of
../shared/data."""

import bz2
import gzip
import json
import lzma
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from ship_ds.data.readers import FORMATS, Format, detect_format, read_tasks
from ship_ds.data.readers.jsonl import row_of
from ship_ds.data.splits import SplitConfig, hold_out, split_tasks
from ship_ds.data.task import DataError, Example
from ship_ds.data.task_files import FilesConfig, check_path
from ship_ds.errors import UserError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def sni(**changes: Any) -> dict[str, Any]:
    return {
        "Contributors": ["x"],
        "Categories": ["Answering"],
        "Definition": ["Say the colour. "],
        "Positive Examples": [],
        "Instances": [
            {"id": "a", "input": "sky ", "output": ["blue", "azure", "blue"]},
            {"id": "b", "input": "nothing", "output": [""]},
        ],
        **changes,
    }


def p3(text: str, answer: str | None) -> dict[str, Any]:
    return {
        "inputs_pretokenized": f"Is this good? Review: {text}\nAnswer:",
        "targets_pretokenized": answer,
        "inputs": [1],
    }


def test_natural_instructions(tmp_path: Path) -> None:
    write(tmp_path / "tasks" / "task2_b.json", sni(Definition="One text, not a list"))
    named = sni(Definition=["First.", "Second."], Source=["mctaco", "other"])
    write(tmp_path / "tasks" / "task1_a.json", named)
    (tmp_path / "tasks.tsv").write_text("an index that is no task\n")
    first, second = read_tasks(tmp_path)
    assert detect_format(tmp_path) == "natural-instructions" and first.id == "task1_a"
    assert (first.instruction, first.paraphrases, first.family) == (
        "First.",
        ("Second.",),
        "Answering",
    )
    assert second.instruction == "One text, not a list"
    assert (first.dataset, second.dataset) == ("mctaco", "")
    for source, name in (
        ("x y", "x y"),
        (["wsc; enhanced_wsc"], "wsc"),
        (["Synthetic"], ""),
        ([], ""),
        ([None], ""),
        (3, ""),
    ):
        write(tmp_path / "tasks" / "task1_a.json", sni(Source=source))
        assert read_tasks(tmp_path)[0].dataset == name
    assert first.examples == (Example("sky", "blue", ("blue", "azure")), Example("nothing", ""))


def test_rows_with_one_instruction_are_one_task(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Name its colour. ", "input": "sky", "output": "blue\n", "text": "..."},
        {"instruction": "Name a colour.", "input": "", "output": "red"},
        {"instruction": "Name its colour.", "input": "grass", "output": "green"},
        {"instruction": "Nenne eine Farbe.", "output": "grün"},
        {"instruction": "说一种颜色", "input": None, "output": ""},
    ]
    write(tmp_path / "a.json", rows)
    lines = tmp_path / "b.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    for path in (tmp_path / "a.json", lines):
        assert detect_format(path) == "alpaca"
        tasks = read_tasks(path)
        assert [task.id for task in tasks] == [f"{path.stem}:{i}" for i in (1, 2, 4, 5)]
        assert tasks[0].instruction == "Name its colour."
        assert tasks[0].examples == (Example("sky", "blue"), Example("grass", "green"))
        assert [task.examples for task in tasks[1:]] == [
            (Example("", "red"),),
            (Example("", "grün"),),
            (Example("", ""),),
        ]
    both = read_tasks(tmp_path)
    assert [task.id for task in both] == ["a:1", "a:2", "a:4", "a:5"]
    assert len(both[0].examples) == 4, "the files of a folder are one data set"


def test_inputs_without_a_target_are_read_and_counted(tmp_path: Path) -> None:
    """Beside examples, in their place, or none of them."""
    one = {"id": "a", "instruction": "add 1", "inputs": ["1", " 2\n"]}
    other = {"id": "b", "instruction": "add 2", "inputs": []}
    both = {"id": "c", "instruction": "add 3", "inputs": ["4"]}
    both["examples"] = [{"input": "1", "target": "4"}]
    path = write(tmp_path / "tasks.json", [one, other, both])
    counts: Counter[str] = Counter()
    tasks = read_tasks(path, counts=counts)
    assert [task.inputs for task in tasks] == [("1", "2"), (), ("4",)], "as examples are trimmed"
    assert [len(task.examples) for task in tasks] == [0, 0, 1]
    assert counts == {"inputs without a target, which `ship-ds supply answers` makes": 3}
    assert [row_of(task, {})["examples"] for task in tasks] == [[], [], both["examples"]]
    assert row_of(tasks[2], {})["inputs"] == ["4"]
    assert repr(replace(tasks[0], inputs=())) == repr(tasks[0]), "no fingerprint of a run knows it"
    for key, value, message in (
        ("inputs", "1", "expected a list"),
        ("inputs", [1], "expected a text, got"),
        ("inputs", None, "expected a list"),
        ("examples", None, "expected a list"),
        ("examples", "no", "expected a list"),
    ):
        path = write(tmp_path / "wrong.json", [one | {key: value}])
        with pytest.raises(DataError, match=rf"wrong\.json: .*{key}.*{message}"):
            read_tasks(path)


def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in said]


def test_the_first_turns_of_a_chat_are_a_triple(tmp_path: Path) -> None:
    asked = (("user", "sky"), ("assistant", "blue"), ("user", "why?"), ("assistant", "air"))
    shared = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "red"}]
    rows = [
        {"messages": turns(("system", "Name its colour."), *asked)},
        {"messages": [*turns(("system", " "), *asked), {"role": "tool", "content": None}]},
        {"conversations": shared},
    ]
    path = write(tmp_path / "chat.json", rows)
    assert detect_format(path) == "messages"
    first, second, third = read_tasks(path)
    assert (first.instruction, first.examples) == ("Name its colour.", (Example("sky", "blue"),))
    assert (second.instruction, second.examples) == ("sky", (Example("", "blue"),))
    assert (third.instruction, third.examples) == ("Name a colour.", (Example("", "red"),))


def test_a_refused_row_says_what_the_file_was_taken_for(tmp_path: Path) -> None:
    rows = [{"instruction": "k", "output": "y"}, {"instruction": "k", "target": "y"}]
    path = write(tmp_path / "own.json", rows)
    with pytest.raises(DataError, match=r"has no 'output'.* \(taken for alpaca, since no fo"):
        read_tasks(path)
    with pytest.raises(DataError, match="has no 'output'") as error:
        read_tasks(path, "alpaca")
    assert "taken for" not in str(error.value)


def test_a_chat_that_an_assistant_begins_is_left_out_and_counted(tmp_path: Path) -> None:
    rest = [{"from": "gpt", "value": "... and so on"}, {"from": "human", "value": "more"}]
    asked = [{"from": "human", "value": "Name a colour."}, {"from": "chatgpt", "value": "red"}]
    of_a_system = [{"from": "system", "value": "Be brief."}, *rest]
    rows = [{"conversations": chat} for chat in (asked, rest, of_a_system)]
    path, counts = write(tmp_path / "chat.json", rows), Counter[str]()
    (task,) = read_tasks(path, counts=counts)
    assert (task.instruction, task.examples) == ("Name a colour.", (Example("", "red"),))
    assert counts == {"chats that begin with an assistant's turn": 2}
    with pytest.raises(DataError, match="holds no task in the format messages"):
        read_tasks(write(tmp_path / "rest.json", rows[1:]))


HELPFUL = "You are a helpful assistant."


@pytest.mark.parametrize(
    ("systems", "instructions"),
    [
        ([HELPFUL] * 3, ["q0", "q1", "q2"]),
        ([HELPFUL, "Add 1.", HELPFUL], ["q0", "Add 1.", "q2"]),
        # Half of those that have one is not most of them, and of one row nothing is shared.
        ([HELPFUL, "Add 1.", HELPFUL, "Add 2."], [HELPFUL, "Add 1.", "Add 2."]),
        ([HELPFUL, "", "", ""], [HELPFUL, "q1", "q2", "q3"]),
        ([HELPFUL, HELPFUL, "", "", ""], ["q0", "q1", "q2", "q3", "q4"]),
    ],
)
def test_a_system_message_that_most_rows_share_is_no_instruction(
    tmp_path: Path, systems: list[str], instructions: list[str]
) -> None:
    rows = [
        {"messages": turns(("system", system), ("user", f"q{i}"), ("assistant", "a"))}
        for i, system in enumerate(systems)
    ]
    path, counts = write(tmp_path / "chat.json", rows), Counter[str]()
    tasks = read_tasks(path, counts=counts)
    assert [task.instruction for task in tasks] == instructions
    is_left_out = HELPFUL not in instructions
    assert counts == (
        {
            f"system messages, the same in most rows that have one ({HELPFUL!r})": systems.count(
                HELPFUL
            )
        }
        if is_left_out
        else {}
    )


@pytest.mark.parametrize(
    ("name", "row", "complaint"),
    [
        ("alpaca", {"instruction": "k", "input": 3, "output": "y"}, "row 2.input: expected a text"),
        ("alpaca", {"instruction": " ", "output": "y"}, "row 2: the instruction is empty"),
        ("alpaca", {"instruction": "k"}, "row 2: has no 'output'"),
        ("alpaca", "k", "row 2: expected an object, got a text"),
        ("messages", {"text": "k"}, "row 2: has neither 'messages' nor 'conversations'"),
        ("messages", {"messages": []}, "row 2.messages: expected a user's turn and then an assi"),
        (
            "messages",
            {"messages": turns(("user", "a"), ("user", "b"))},
            "row 2.messages: expected a user's turn and then an assistant's, got user, user",
        ),
        (
            "messages",
            {"messages": turns(("tool", "a"))},
            "row 2.messages[0].role: expected one of system, developer, user",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": None}]},
            "row 2.messages[0].content: expected a text, got null",
        ),
        (
            "jsonl",
            {"instruction": "k", "inputs": []},
            "row 2: has 'instruction', 'inputs'; a task has 'id', 'instruction' and 'examples' or",
        ),
        (
            "jsonl",
            {"id": "k", "instruction": "k"},
            "row 2: has 'id', 'instruction'; a task has 'id', 'instruction' and 'examples' or",
        ),
    ],
)
def test_malformed_rows_are_one_line(tmp_path: Path, name: str, row: Any, complaint: str) -> None:
    good = {
        "alpaca": {"instruction": "k", "output": "y"},
        "messages": {"messages": turns(("user", "x"), ("assistant", "y"))},
        "jsonl": {"id": "t", "instruction": "k", "inputs": ["x"]},
    }
    path = write(tmp_path / "rows.json", [good[name], row])
    with pytest.raises(DataError) as caught:
        read_tasks(path, name)
    assert str(caught.value).startswith(f"{path}: {complaint}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"Definition": []}, "task.Definition: expected at least one text, got an empty list"),
        (
            {"Instances": [{"input": "x", "output": 3}]},
            "Instances[0].output: expected a list, got a whole number",
        ),
        (
            {"Instances": [{"input": "x", "output": ["y", None]}]},
            "Instances[0].output[1]: expected a text, got null",
        ),
        ({"Instances": [{"output": ["y"]}]}, "Instances[0]: has no 'input'"),
        ({"Instances": ["x"]}, "Instances[0]: expected an object, got a text"),
        (
            {"Instances": [{"input": "x\ud83d", "output": ["y"]}]},
            "Instances[0].input: letter 1 is half a surrogate pair",
        ),
        ({"Definition": "\udc00"}, "task.Definition: letter 0 is half a surrogate pair"),
        ({"Definition": " "}, "task 'task' has an empty instruction"),
    ],
)
def test_malformed_natural_instructions_are_one_line(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    path = write(tmp_path / "task.json", sni(**changes))
    with pytest.raises(DataError) as caught:
        read_tasks(path)
    assert str(caught.value).startswith(f"{path}: {complaint}") and "\n" not in str(caught.value)


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_text('{"Definition": ["x"],\n"Instances": [,]}')
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_tasks(path, "natural-instructions")


def test_instruction_induction(tmp_path: Path) -> None:
    def raw(part: str, name: str, rows: list[dict[str, Any]]) -> None:
        write(
            tmp_path / "raw" / part / f"{name}.json",
            {"metadata": {}, "examples": dict(enumerate(rows, 1))},
        )

    write(
        tmp_path / "annotations" / "rhymes.json",
        {"annotations": ["find a rhyme", "rhyme it", "find a rhyme"]},
    )
    raw(
        "execute",
        "rhymes",
        [{"input": "cat", "output": "hat", "other_rhymes": ["cat", "bat"], "rhyme_group": "at"}],
    )
    raw("induce", "rhymes", [{"input": "sun", "output": "run"}, {"input": "sun", "output": "run"}])
    write(tmp_path / "annotations" / "cause_and_effect.json", {"annotations": ["find the cause"]})
    raw("induce", "cause_and_effect", [{"cause": "It rained.", "effect": "He got wet."}])
    write(tmp_path / "annotations" / "common_concept.json", {"annotations": ["what is common"]})
    raw(
        "execute",
        "common_concept",
        [{"concept": "fly", "items": ["bird", "plane"], "all_common_concepts": ["fly", "move"]}],
    )
    cause, concept, rhymes = read_tasks(tmp_path)
    assert [t.paper_metric for t in (cause, concept, rhymes)] == ["exact", "f1", "exact"]
    assert detect_format(tmp_path) == "instruction-induction"
    assert cause.examples == (
        Example("Sentence 1: He got wet. Sentence 2: It rained.", "It rained."),
    )
    assert concept.examples == (Example("bird, plane", "fly", ("fly", "move")),)
    assert rhymes.examples == (
        Example("cat", "hat", ("hat", "bat")),
        Example("sun", "run"),
        Example("sun", "run"),
    )
    assert (rhymes.instruction, rhymes.paraphrases) == ("find a rhyme", ("rhyme it",))
    (tmp_path / "annotations" / "lost.json").write_text('{"annotations": ["x"]}')
    with pytest.raises(DataError, match=r"lost\.json: file: has no examples"):
        read_tasks(tmp_path)
    raw("induce", "found", [])
    with pytest.raises(DataError, match=r"found\.json: file: has no instruction"):
        read_tasks(tmp_path)


def test_instruction_induction_in_files_that_are_compressed(tmp_path: Path) -> None:
    rows = {"examples": {"1": {"input": "cat", "output": "feline"}}}
    for file, content in (
        ("annotations/synonyms.json.gz", {"annotations": ["say it otherwise"]}),
        ("raw/execute/synonyms.json", rows),
        ("raw/induce/synonyms.json.gz", rows),
    ):
        path = write(tmp_path / file, content)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
    (task,) = read_tasks(tmp_path)
    assert (task.id, task.paper_metric) == ("synonyms", "contains")
    assert task.examples == (Example("cat", "feline"),) * 2


@pytest.mark.parametrize("name", ["task.json.gz", "Task.JSON"])
def test_list_functions_by_other_names(tmp_path: Path, name: str) -> None:
    rows = [{"input": "[1]", "target": "[]"}, {"input": "[2]", "target": "[]"}]
    for folder in ("c001", "c002"):
        path = write(tmp_path / folder / name, {"description": '"drop it"', "examples": rows})
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
    assert detect_format(tmp_path) == "list-functions"
    assert [task.id for task in read_tasks(tmp_path)] == ["c001", "c002"]
    assert read_tasks(path)[0].instruction == "drop it"


def test_list_functions(tmp_path: Path) -> None:
    row = {"input": "[1, 2]", "target": "[]"}
    write(
        tmp_path / "c001" / "task.json",
        {"description": 'The target function is "drop "all" of it".', "examples": [row]},
    )
    (task,) = read_tasks(tmp_path)
    assert (task.id, task.instruction, task.examples) == (
        "c001",
        'drop "all" of it',
        (Example("[1, 2]", "[]"),),
    )
    assert read_tasks(tmp_path / "c001") == read_tasks(tmp_path / "c001" / "task.json") == [task]
    path = write(tmp_path / "c002" / "task.json", {"description": "no quotes", "examples": [row]})
    with pytest.raises(DataError, match="expected the rule in double quotes"):
        read_tasks(path)


def test_p3_sample(tmp_path: Path) -> None:
    def row(text: str, **changes: Any) -> dict[str, Any]:
        return {
            "sub_task_id": 12,
            "input": f"<input>{text}</input>",
            "target": "<output> Yes.</output>",
            "knowledge": "<instruction>\nIs it?\n</instruction>",
            **changes,
        }

    write(
        tmp_path / "p3.json", {"train": [row("a\nb")], "test": [row("c"), row("d", sub_task_id=3)]}
    )
    first, second = read_tasks(tmp_path)
    assert detect_format(tmp_path) == "p3-sample" and (first.id, second.id) == ("p3-3", "p3-12")
    assert second.instruction == "Is it?" and second.examples == (
        Example("a\nb", "Yes."),
        hold_out(Example("c", "Yes.")),
    )
    write(tmp_path / "p3.json", {"train": [row("a", target="Yes")], "test": []})
    with pytest.raises(DataError, match=r"train\[0\].target: expected a text between"):
        read_tasks(tmp_path)


def write_p3(path: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path.parent))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
def test_p3_columns(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder is one task, and nothing stays in the cache of `datasets`."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [p3("great film", " yes\n"), p3("bad film", "no"), p3("grîm", ""), p3("bad film", "no")]
    write_p3(tmp_path / "p3" / "imdb_sentiment" / f"train-00000{suffix}", rows)
    write_p3(tmp_path / "p3" / "yelp_sentiment" / f"data{suffix}", rows[:2])
    task, other = read_tasks(tmp_path / "p3")
    assert detect_format(tmp_path / "p3") == "p3" and (task.id, other.id) == (
        "imdb_sentiment",
        "yelp_sentiment",
    )
    assert task.instruction == "Is this good? Review: Answer:"
    bad = Example("bad film", "no")
    assert task.examples == (Example("great film", "yes"), bad, Example("grîm", ""), bad)
    assert not (tmp_path / "cache").exists()
    single = next((tmp_path / "p3" / "imdb_sentiment").glob(f"*{suffix}"))
    assert (
        read_tasks(single)[0].examples == task.examples
        and read_tasks(single.parent)[0].id == "imdb_sentiment"
    )


@pytest.mark.parametrize(
    "test_file", ["test/0000.parquet", "test-00000-of-00001.parquet", "validation.jsonl"]
)
def test_p3_splits_are_kept(tmp_path: Path, test_file: str) -> None:
    train_file = "train/0000.parquet" if "/" in test_file else "train-00000-of-00001.parquet"
    for name in ("a", "b"):
        write_p3(tmp_path / name / train_file, [p3("good", "yes"), p3("bad", "no")])
        write_p3(tmp_path / name / test_file, [p3("fine", "yes")])
    tasks = read_tasks(tmp_path)
    assert [task.id for task in tasks] == ["a", "b"]
    (held,) = (example for example in tasks[0].examples if example.input == "fine")
    assert held == hold_out(Example("fine", "yes")) and len(tasks[0].examples) == 3


@pytest.mark.parametrize(
    ("train_file", "test_file"),
    [
        ("train/0.jsonl", "Test/0.jsonl"),
        ("Train/0.jsonl", "VALIDATION/0.jsonl"),
        ("Train.jsonl", "TEST.jsonl"),
        ("testimonials.jsonl", "Dev-00000-of-00001.jsonl"),
        ("devices.jsonl", "test1.jsonl"),
        ("developers.jsonl", "test_matched.jsonl"),
        ("validations.jsonl", "dev.jsonl.gz"),
    ],
)
def test_p3_splits_have_names_in_any_case(tmp_path: Path, train_file: str, test_file: str) -> None:
    write_p3(tmp_path / "a" / train_file, [p3("good", "yes"), p3("bad", "no")])
    rows = json.dumps(p3("fine", "yes")).encode()
    (tmp_path / "a" / test_file).parent.mkdir(exist_ok=True)
    is_zipped = test_file.endswith("gz")
    (tmp_path / "a" / test_file).write_bytes(gzip.compress(rows) if is_zipped else rows)
    (task,) = read_tasks(tmp_path)
    held = hold_out(Example("fine", "yes"))
    assert task.id == "a" and set(task.examples) == {
        *(Example("good", "yes"), Example("bad", "no"), held)
    }


def test_p3_instruction_without_spaces(tmp_path: Path) -> None:
    texts = ("今天天气很好，我很高兴", "这部电影太无聊了", "服务还可以")
    rows = [p3("", "是") | {"inputs_pretokenized": f"这是好评吗？{x}。答案：是或否"} for x in texts]
    write_p3(tmp_path / "a.jsonl", rows)
    (task,) = read_tasks(tmp_path)
    assert task.instruction == "这是好评吗？ 。答案：是或否"
    assert [one.input for one in task.examples] == list(texts)


@pytest.mark.parametrize(
    ("file", "rows", "complaint"),
    [
        (
            "a.jsonl",
            [p3("a", "b"), p3("a", None)],
            r"a\.jsonl: line 2\.targets_pretokenized: expected a text, got null",
        ),
        (
            "a.jsonl",
            [p3("a", "b"), {"inputs_pretokenized": "x"}],
            r"a\.jsonl: line 2: has no 'targets_pretokenized'",
        ),
        (
            "a.parquet",
            [p3("a", "b"), p3("a", None)],
            r"a\.parquet: row 1\.targets_pretokenized: expected a text, got null",
        ),
        (
            "a.parquet",
            [{"inputs_pretokenized": "x"}] * 2,
            r"a\.parquet: row 0: has no 'targets_pretokenized'",
        ),
        ("a.parquet", [p3("a", "b")], "rows: expected at least two"),
        (
            "a.jsonl",
            [{**p3("a", "b"), "inputs_pretokenized": text} for text in ("x y", "z w")],
            "share no text at their start",
        ),
    ],
)
def test_malformed_p3_columns(
    tmp_path: Path, file: str, rows: list[dict[str, Any]], complaint: str
) -> None:
    write_p3(tmp_path / file, rows)
    with pytest.raises(DataError, match=complaint) as caught:
        read_tasks(tmp_path, "p3")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_broken_table_is_said(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(b"no table at all, but long enough to be one")
    with pytest.raises(DataError, match=rf"a\.{suffix}: cannot be read as {suffix}: ") as caught:
        read_tasks(tmp_path)
    assert "\n" not in str(caught.value)


def test_our_jsonl(tmp_path: Path) -> None:
    good = {
        "id": "t",
        "instruction": "dö it",
        "paraphrases": ["do"],
        "family": "f",
        "dataset": "d",
        "examples": [
            {"input": "a", "target": "b", "references": ["c"]},
            {"input": "x", "target": ""},
        ],
    }
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(good) + "\n\n")
    (task,) = read_tasks(path)
    assert (task.instruction, task.paraphrases, task.family) == ("dö it", ("do",), "f")
    assert task.dataset == "d" == row_of(task, {})["dataset"]
    assert task.examples == (Example("a", "b", ("b", "c")), Example("x", ""))
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, "exmaples": []}) + "\n")
    with pytest.raises(DataError, match="line 2: unknown key 'exmaples'"):
        read_tasks(path)
    path.write_text(json.dumps(good) + "\n" + json.dumps(good) + "\n")
    with pytest.raises(DataError, match=r"jsonl:2: the task id 't' is also that of .*jsonl:1"):
        read_tasks(path)


def test_our_jsonl_has_weights_and_an_origin_that_is_not_read(tmp_path: Path) -> None:
    row = {"id": "t", "instruction": "do", "examples": [{"input": "a", "target": "b"}]}
    path = tmp_path / "tasks.jsonl"
    rows = [row | {"weight": 2.5, "origin": {"how": "x"}}, row | {"id": "u"}]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    heavy, plain = read_tasks(path)
    assert (heavy.weight, plain.weight) == (2.5, 1.0)
    assert repr(replace(heavy, weight=1.0)) == repr(heavy)  # what older fingerprints are made of
    path.write_text(json.dumps(row_of(heavy, {"how": "y"})))
    assert [replace(task, source="") for task in read_tasks(path)] == [replace(heavy, source="")]
    for bad in (0, -1, 1e-300, 1e-7, True, "2", float("nan"), 1001):
        path.write_text(json.dumps(row | {"weight": bad}))
        with pytest.raises(DataError, match="line 1.weight: expected a number from 1e-06"):
            read_tasks(path)


def test_jsonl_from_other_machines(tmp_path: Path) -> None:
    row = {"id": "t", "instruction": " do ", "paraphrases": ["do", " make "], "examples": []}
    path = tmp_path / "tasks.jsonl"
    path.write_bytes("\ufeff".encode() + json.dumps(row).encode() + b"\r\n")
    (task,) = read_tasks(path)
    assert (task.instruction, task.paraphrases) == ("do", ("make",))
    for content, complaint in (
        (b'{"id": "\xff"}', "line 1: not UTF-8"),
        (b'\n{"id": ]', "line 2: not JSON"),
        (b"[1]", "row 1: expected an object, got a whole number"),
        (b'{"id": "", "instruction": "k", "examples": []}', "task id is empty"),
        (
            b'{"id": "t", "instruction": "k", "paraphrases": [""], "examples": []}',
            "has an empty instruction",
        ),
    ):
        path.write_bytes(content + b"\n")
        with pytest.raises(DataError, match=complaint):
            read_tasks(path)


def test_a_byte_order_mark_on_a_blank_line(tmp_path: Path) -> None:
    row = json.dumps(task_rows("x")[0]).encode()
    for first in (b"", b"\n", b" \r\n", b"\r"):
        (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + first + row)
        assert [task.id for task in read_tasks(tmp_path)] == ["x"]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("alpaca", {"instruction": "k", "input": "x" * (1 << 20), "output": "y"}),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": "x" * (1 << 20)},
                    {"role": "assistant", "content": "y"},
                ]
            },
        ),
        ("p3", p3("x" * (1 << 20), "y")),
        ("plain-text", {"text": "some words " * (1 << 17)}),
    ],
)
def test_a_first_row_may_be_long(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    for text in (json.dumps(row), json.dumps([row]) if name in ("alpaca", "messages") else ""):
        if text:
            (tmp_path / "t.jsonl").write_text(text + "\n")
            assert detect_format(tmp_path) == name


def task_rows(*names: str) -> list[dict[str, Any]]:
    return [
        {"id": name, "instruction": f"do {name}", "examples": [{"input": "a", "target": "b"}]}
        for name in names
    ]


@pytest.mark.parametrize("name", ["t.ndjson", "T.JSONL", "t.jsonl.gz", "t.Jsonl.GZ"])
def test_jsonl_by_other_names(tmp_path: Path, name: str) -> None:
    content = "".join(json.dumps(row) + "\n" for row in task_rows("x", "y")).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if "gz" in name.lower() else content)
    for path in (tmp_path / name, tmp_path):
        assert [task.id for task in read_tasks(path)] == ["x", "y"]


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "t.json.gz"])
def test_tasks_as_a_json_array(tmp_path: Path, name: str) -> None:
    content = json.dumps(task_rows("x", "y"), indent=1).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert detect_format(tmp_path) == "jsonl"
    assert [task.source for task in read_tasks(tmp_path)] == [
        f"{tmp_path / name}:1",
        f"{tmp_path / name}:2",
    ]


def test_a_line_ends_as_on_any_system_and_not_within_a_text(tmp_path: Path) -> None:
    """U+2028 and U+0085 are ends of lines to Python, and may stand in JSON as they are."""
    for end in ("\n", "\r\n", "\r"):
        rows = task_rows("x\u2028y", "z\x85")
        text = end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end
        (tmp_path / "t.jsonl").write_bytes(text.encode())
        tasks = read_tasks(tmp_path)
        assert [task.instruction for task in tasks] == ["do x\u2028y", "do z"]
        assert tasks[1].source.endswith(":2")


def test_files_of_the_system_are_passed_over_and_other_formats_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(task_rows("x")[0]))
    for name in ("._a.jsonl", ".DS_Store", "dataset_info.json"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    counts: Counter[str] = Counter()
    assert len(read_tasks(tmp_path, counts=counts)) == 1 and not counts
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.jsonl").write_text("{}")
    (tmp_path / "c.json").write_text("{}")
    read_tasks(tmp_path, counts=counts)
    assert counts == {"files that jsonl does not read, such as c.json": 2}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"id": ' + "9" * 5000 + "}", "line 2: a number has thousands of digits"),
        ('{"id": ' + "[" * 100_000, "line 2: not JSON: nested too deeply"),
        ('{"id": "x", "id": "y"}', "line 2: the key 'id' is there twice; leave one"),
        (
            "{" + ", ".join(f'"{number}": 1' for number in [*range(100_000), 99_999]) + "}",
            "line 2: the key '99999' is there twice; leave one",
        ),
        (
            '{"id": "x"},',
            "line 2: not JSON: Extra data at column 12; expected one JSON object",
        ),
    ],
)
def test_a_line_that_json_does_not_take_is_one_line(
    tmp_path: Path, line: str, complaint: str
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(task_rows("x")[0]) + "\n" + line)
    with pytest.raises(DataError) as caught:
        read_tasks(path)
    assert str(caught.value).startswith(f"{path}: {complaint}") and "\n" not in str(caught.value)


def test_what_is_not_the_file_itself_is_said(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n")
    with pytest.raises(DataError, match=r"t\.jsonl: a Git LFS pointer.*`git lfs pull`"):
        read_tasks(path)
    path = tmp_path / "t.jsonl.gz"
    for content in (b"no gzip", gzip.compress(b"x" * 100_000)[:-9]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"t\.jsonl\.gz: cannot be read: "):
            read_tasks(path, "jsonl")


def test_an_indented_first_line_stays_so(tmp_path: Path) -> None:
    """In code it is part of what is said; a single space is what somebody's cutting left."""
    texts = ["\n\n    return x\n", "return x  ", " return x", "\treturn x"]
    rows = [{"instruction": "k", "input": text, "output": text} for text in texts]
    (task,) = read_tasks(write(tmp_path / "rows.json", rows))
    expected = ["    return x", "return x", "return x", "\treturn x"]
    assert [one.input for one in task.examples] == expected
    assert [one.target for one in task.examples] == expected


def test_a_control_token_or_nul_in_a_text_is_text(tmp_path: Path) -> None:
    row = task_rows("x")[0] | {"examples": [{"input": "a\x00b <eos>", "target": "<eos> c"}]}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    assert read_tasks(tmp_path)[0].examples == (Example("a\x00b <eos>", "<eos> c"),)


def _text(num_words: int, start: int = 0) -> str:
    return " ".join(f"w{i}" for i in range(start, start + num_words))


def test_plain_text_is_cut_into_three(tmp_path: Path) -> None:
    """Nothing of a passage is lost, the parts are as long as they say, and a second reading cuts
    alike."""
    (tmp_path / "a.txt").write_text(f"\ufeff{_text(60)}\n \n{_text(10)}\n\n\n{_text(250, 90)}\n")
    (tmp_path / "b.txt").write_text(_text(60))
    counts: Counter[str] = Counter()
    tasks = read_tasks(tmp_path, counts=counts)
    assert [task.id for task in tasks] == ["a.txt:1", "a.txt:2", "a.txt:3", "a.txt:4"]
    assert counts == {"passages: fewer than 24 words": 1, "passages: met before": 1}
    parts = [(t.instruction, t.examples[0].input, t.examples[0].target) for t in tasks]
    assert " ".join(parts[0]) == _text(60)
    assert " ".join(" ".join(part) for part in parts[1:]) == _text(250, 90)
    for instruction, text, target in parts:
        first, middle, last = (len(one.split()) for one in (instruction, text, target))
        assert 1 / 3 - 0.02 <= first / (first + middle + last) <= 2 / 3 + 0.02
        assert 4 <= last <= 24 and last <= middle
    assert len({len(one.split()) for one, _, _ in parts[1:]}) > 1
    assert read_tasks(tmp_path) == tasks


def test_plain_text_without_spaces_is_cut_by_letters(tmp_path: Path) -> None:
    text = "河流发源于城镇上方的山丘，向南穿过两个湖泊，然后在没有船的 old harbour 附近流入大海。"
    (tmp_path / "a.txt").write_text(text)
    (task,) = read_tasks(tmp_path)
    (example,) = task.examples
    parts = (task.instruction, example.input, example.target)
    assert all(parts) and "".join(parts).replace(" ", "") == text.replace(" ", "")
    assert sum(map(len, parts)) >= len(text) - 2, "no spaces between letters"


@pytest.mark.parametrize("file", ["a.jsonl", "a.parquet", "a.arrow"])
def test_a_column_of_texts(file: str, tmp_path: Path) -> None:
    """By itself it is read as text; beside other columns, which may be labels, by name alone."""
    write_p3(tmp_path / "alone" / file, [{"text": _text(30)}, {"text": "short"}])
    assert detect_format(tmp_path / "alone") == "plain-text"
    write_p3(tmp_path / "others" / file, [{"text": _text(30), "url": "u"}])
    if not file.endswith(".jsonl"):
        with pytest.raises(DataError, match="not a format"):
            detect_format(tmp_path / "others")
    (task,) = read_tasks(tmp_path / "others", "plain-text")
    assert read_tasks(tmp_path / "alone")[0].examples == task.examples
    assert " ".join((task.instruction, task.examples[0].input, task.examples[0].target)) == _text(
        30
    )


def test_a_text_beside_our_own_jsonl_is_none(tmp_path: Path) -> None:
    (tmp_path / "README.txt").write_text(_text(40))
    row = {"id": "t", "instruction": "k", "examples": [{"input": "a", "target": "b"}]}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(row))
    assert detect_format(tmp_path) == "jsonl"
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"text": "great", "label": 1}))
    assert detect_format(tmp_path) == "jsonl"


@pytest.mark.parametrize("name", ["tasks.csv", "tasks.xlsx", "tasks.tsv.gz", "tasks.zip"])
def test_a_text_beside_a_table_is_read_by_name_alone(name: str, tmp_path: Path) -> None:
    """It may say what is in the table."""
    (tmp_path / "README.txt").write_text(_text(40))
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=rf"; {name} is not read, .* by format: plain-text"):
        read_tasks(tmp_path)
    counts: Counter[str] = Counter()
    (task,) = read_tasks(tmp_path, "plain-text", counts)
    assert task.id == "README.txt:1"
    assert counts == {f"files that plain-text does not read, such as {name}": 1}


def test_rows_of_nothing_but_a_text_are_read_whatever_lies_beside_them(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": _text(40)}) + "\n")
    (tmp_path / "corpus.jsonl.zst").write_text("x")
    (task,) = read_tasks(tmp_path)
    assert task.id.startswith("corpus")


def test_malformed_plain_text(tmp_path: Path) -> None:
    for content, complaint in (
        (b'{"text": "a"}\n{"texts": "b"}', "line 2: has no 'text'"),
        (b'{"text": "a"}\n{"text": 3}', "line 2.text: expected a text"),
    ):
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=complaint):
            read_tasks(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt: byte 3: not UTF-8"):
        read_tasks(tmp_path)
    (tmp_path / "a.txt").write_text("too short")
    with pytest.raises(DataError, match="holds no passage of 24 words or more"):
        read_tasks(tmp_path)


def test_the_configs_formats_are_the_readers() -> None:
    assert get_args(Format) == ("auto", *FORMATS)


def test_what_is_no_format_is_said_with_the_formats(tmp_path: Path) -> None:
    write(tmp_path / "a.json", {"x": 1})
    with pytest.raises(
        DataError, match="not a format that is read here; the formats are natural-instructions, "
    ):
        read_tasks(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        read_tasks(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no such format"):
        read_tasks(tmp_path, "csv")


_OURS = {"id": "t", "instruction": "k", "examples": [{"input": "a", "target": "b"}]}


@pytest.mark.parametrize(("ending", "pack"), [("bz2", bz2.compress), ("XZ", lzma.compress)])
def test_every_compression_that_python_has_is_read(
    ending: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    packed = pack((json.dumps(_OURS) * 50).encode())
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(pack(json.dumps(_OURS).encode()))
    assert [task.id for task in read_tasks(tmp_path)] == ["t"]
    for content, complaint in (
        (packed[:-8], "ended before"),
        (b"{}", "save it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.jsonl\.{ending}: .*{complaint}"):
            read_tasks(tmp_path, "jsonl")


@pytest.mark.parametrize("is_link", [False, True])
@pytest.mark.parametrize("name", ["b.csv", "b.json.zst", "b.zip", "below/b.tsv"])
def test_files_that_may_be_data_are_not_passed_over_in_silence(
    name: str, is_link: bool, tmp_path: Path
) -> None:
    """A link is DVC's or git-annex's, whose file was not fetched."""
    write(tmp_path / "a.jsonl", _OURS)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if is_link:
        (tmp_path / name).symlink_to("annexed")
    else:
        (tmp_path / name).write_text("x")
    counts: Counter[str] = Counter()
    read_tasks(tmp_path, counts=counts)
    assert counts == {f"files that jsonl does not read, such as {name}": 1}


def test_a_link_to_what_is_not_there_is_no_file_less(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", _OURS)
    (tmp_path / "b.jsonl").symlink_to("annexed")
    with pytest.raises(DataError, match=r"b\.jsonl: a link to annexed, which is not there"):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "t: a Git LFS pointer"),
        ("a.parquet.gz", b"PAR1", "unpack the .gz"),
        ("a.json", b"<html>", "line 1: not JSON"),
        ("a.json", "{}".encode("utf-16"), "not UTF-8; save it as UTF-8"),
        ("a.json", b'{"data": []}', "a.json begins with an object of 'data'"),
        ("a.json", b"[]", "a.json is empty"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "it is compressed by gzip: unpack it"),
        ("a.csv", b"instruction,output", "a.csv is no .json or "),
        ("a.md", b"notes", "the folder has no file that ends in .json, "),
        ("below/a.json", b'{"x": 1}', "in folders of it, such as below/a.json"),
    ],
)
def test_why_nothing_is_read(name: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(complaint)) as raised:
        read_tasks(tmp_path)
    assert str(raised.value).count(str(tmp_path)) == 1


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl: is a pipe"):
        read_tasks(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"data\.path: .*a\.jsonl: is a pipe"):
        check_path(FilesConfig(path=str(tmp_path / "a.jsonl")), "data.path")


def test_a_path_that_the_system_refuses_is_said_with_its_key() -> None:
    with pytest.raises(UserError, match=r"data\.path: .*File name too long; give a readable"):
        check_path(FilesConfig(path="x" * 300), "data.path")


def test_two_files_of_one_stem_are_told_apart_by_their_names(tmp_path: Path) -> None:
    rows = [{"instruction": "add 1", "input": "1", "output": "2"}]
    write(tmp_path / "a.json", rows)
    write(tmp_path / "a.jsonl", rows[0] | {"instruction": "add 2"})
    with pytest.raises(
        DataError,
        match=r"'a:1' is also that of .*a\.json: row 1; .*rename or remove one of the two",
    ):
        read_tasks(tmp_path)
    write(tmp_path / "a.json", [_OURS])
    write(tmp_path / "a.jsonl", _OURS)
    with pytest.raises(DataError, match=r"a\.json:1; give every task its own"):
        read_tasks(tmp_path)


def test_an_id_of_white_space_is_empty(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", _OURS | {"id": " \t"})
    with pytest.raises(DataError, match="the task id is empty"):
        read_tasks(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize(
    ("name", "num_tasks", "num_examples"),
    [
        ("natural-instructions", 104, 6177),
        ("natural-instructions-large", 773, 46234),
        ("list-functions", 225, 7200),
        ("instruction-induction", 21, 62614),
        ("p3-sample", 28, 700),
    ],
)
def test_shared_data(name: str, num_tasks: int, num_examples: int) -> None:
    """The counts are those of its README; instruction-induction's are the rows of its files."""
    tasks = read_tasks(SHARED / name)
    assert detect_format(SHARED / name) == name.removesuffix("-large")
    assert len(tasks) == num_tasks
    assert sum(len(task.examples) for task in tasks) == num_examples
    assert all(
        task.instruction and all(example.input for example in task.examples) for task in tasks
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize("num_test", [3, 5, 9])
def test_the_p3_samples_own_test_rows_are_the_only_ones_tested(num_test: int) -> None:
    splits = split_tasks(read_tasks(SHARED / "p3-sample"), SplitConfig(test_examples=num_test))
    sizes = {(len(part.train), len(part.test)) for part in splits.seen + splits.dev + splits.unseen}
    assert sizes == {(20, min(num_test, 5))}
