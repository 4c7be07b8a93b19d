"""Every reader of tasks, and the lines that the verbs read."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ship_ds.data.describe import describe, description_text
from ship_ds.data.readers import FORMATS, read_tasks
from ship_ds.export.requests import read_instructions
from ship_ds.inference.lines import read_inputs, read_pairs
from ship_ds.runtime.sweep import overrides_of_line
from tests.fuzz.documents import broken, changed, copies, files, fuzz, reads_or_says, values

_OURS = {
    "id": "t",
    "instruction": "k",
    "examples": [
        {"input": "a", "target": "b", "references": ["b", "c"]},
        {"input": "d", "target": ""},
    ],
    "paraphrases": ["l"],
    "family": "f",
}
_TURNS = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
DOCUMENTS: dict[str, Any] = {
    "jsonl": _OURS,
    "alpaca": {"instruction": "k", "input": "x", "output": "y"},
    "messages": {"messages": [{"role": "system", "content": "k"}, *_TURNS]},
    "plain-text": {"text": "w " * 40},
    "p3": {"inputs_pretokenized": "say: a", "targets_pretokenized": "b"},
    "natural-instructions": {
        "Definition": ["k"],
        "Categories": ["c"],
        "Instances": [{"input": "x", "output": ["y"]}],
    },
    "list-functions": {
        "description": 'the rule "k"',
        "examples": [{"input": "[1]", "target": "[2]"}],
    },
    "p3-sample": {
        "train": [
            {
                "sub_task_id": 1,
                "input": "<input>x</input>",
                "target": "<output>y</output>",
                "knowledge": "<instruction>k</instruction>",
            }
        ],
        "test": [],
    },
    "instruction-induction": {"examples": {"1": {"input": "x", "output": "y"}}},
}
_IN_LINES = ("jsonl", "alpaca", "messages", "plain-text", "p3")
KEYS = sorted({key for document in DOCUMENTS.values() for key in document} | {"input", "target"})


def test_every_reader_is_tried() -> None:
    assert DOCUMENTS.keys() == FORMATS.keys()


def _lines(document: Any) -> st.SearchStrategy[bytes]:
    one = st.one_of(changed(document, values(KEYS)), values(KEYS)).map(json.dumps)
    several = st.lists(one, max_size=4)
    arrays = several.map(lambda rows: "[" + ",".join(rows) + "]")
    return st.one_of(broken(several.map("\n".join)), broken(arrays))


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_file_of_tasks_is_read_or_one_line(name: str, tmp_path: Path) -> None:
    document = DOCUMENTS[name]
    contents = _lines(document) if name in _IN_LINES else files(document, KEYS)

    @fuzz
    @given(copies(contents), st.booleans(), st.booleans())
    def check(contents: list[bytes], is_compressed: bool, by_name: bool) -> None:
        for content in contents:
            check_one(content, is_compressed, by_name)

    def check_one(content: bytes, is_compressed: bool, by_name: bool) -> None:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for old in folder.rglob("*.*"):
            old.unlink()
        ending = "jsonl" if name in _IN_LINES else "json"
        path = folder / f"task.{ending}"
        if name == "instruction-induction":
            for inner in ("annotations", "raw/execute"):
                (folder / inner).mkdir(parents=True, exist_ok=True)
            (folder / "annotations" / "t.json").write_text('{"annotations": ["k"]}')
            path = folder / "raw" / "execute" / "t.json"
        elif is_compressed:
            path, content = folder / f"task.{ending}.gz", gzip.compress(content)
        path.write_bytes(content)
        where = path if name == "list-functions" else folder
        reads_or_says(lambda: read_tasks(where, name if by_name else "auto"))
        reads_or_says(lambda: description_text(describe(where, name if by_name else "auto")))

    check()


@pytest.mark.parametrize("reader", [read_pairs, read_inputs, read_instructions])
def test_lines_for_a_verb_are_read_or_one_line(reader: Any, tmp_path: Path) -> None:
    rows = [{"input": "x", "target": "y"}, {"instruction": "k", "id": "i"}]

    @fuzz
    @given(copies(_lines(rows[reader is read_instructions])), st.sampled_from(["a.jsonl", "a.txt"]))
    def check(contents: list[bytes], name: str) -> None:
        path: Any = tmp_path / name if reader is read_instructions else str(tmp_path / name)
        for content in contents:
            (tmp_path / name).write_bytes(content)
            reads_or_says(lambda: reader(path))

    check()


def test_a_sweep_file_is_read_or_one_line(tmp_path: Path) -> None:
    words = st.sampled_from(["a.b=1", "'", '"', "#", "\n", "[x, y]", "\\", " ", "\r", "\x00"])

    @fuzz
    @given(copies(broken(st.lists(words, max_size=12).map("".join))), st.integers(-1, 4))
    def check(contents: list[bytes], number: int) -> None:
        for content in contents:
            (tmp_path / "s.txt").write_bytes(content)
            reads_or_says(lambda: overrides_of_line(tmp_path / "s.txt", number))

    check()
