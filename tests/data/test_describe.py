"""`describe` counts before and after the filters and shows three
tasks; `description_text` is what is printed."""

import json
from pathlib import Path

from ship_ds.data.describe import describe, description_text
from ship_ds.data.filters import FilterConfig


def test_describe_and_show(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"t{i}",
            "instruction": f"add {i}",
            "family": f"f{i % 2}",
            "examples": [{"input": f"{n}\n" + "x" * 200, "target": str(n)} for n in range(i + 1)],
        }
        for i in range(7)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = describe(tmp_path, filters=FilterConfig(max_examples_per_task=4))
    samples = found.pop("samples")
    assert found == {
        "path": str(tmp_path),
        "format": "jsonl",
        "tasks": 7,
        "examples": 28,
        "families": 2,
        "filtered": {
            "tasks: fewer than 2 examples left": 1,
            "examples: beyond the first 4 of a task": 6,
        },
        "kept": {
            "tasks": 6,
            "examples": 21,
            "never_tested": 0,
            "labels": {"tasks": 0, "most_frequent": None},
        },
    }
    assert [sample["id"] for sample in samples] == ["t1", "t3", "t5"]  # t0 is left out
    assert samples[0].keys() == {"id", "instruction", "input", "target"}
    lines = description_text({**found, "samples": samples}).splitlines()
    assert lines[0] == "format jsonl: 7 tasks, 28 examples, 2 families"
    assert (
        "left out: examples: beyond the first 4 of a task: 6" in lines
        and "kept: 6 tasks, 21 examples" in lines
    )
    assert sum("add " in line for line in lines) == 3 and max(map(len, lines)) < 130


def test_tasks_with_labels_are_counted_with_their_most_frequent_one(tmp_path: Path) -> None:
    """After the filters; "No." and "no" are one label."""
    targets = {"sentiment": ["no", "No.", "no", "yes"], "sum": ["1", "2", "3", "4"]}
    rows = [
        {
            "id": name,
            "instruction": name,
            "examples": [{"input": f"{i}", "target": target} for i, target in enumerate(row)],
        }
        for name, row in {**targets, "toxic": ["a", "b", "a", "b", "c", "c", "a", "a"]}.items()
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = describe(tmp_path)
    assert found["kept"]["labels"] == {"tasks": 2, "most_frequent": (0.75 + 0.5) / 2}
    assert (
        "labels: 2 tasks have 2 to 10 distinct answers, each twice on average or oftener; the most "
        "frequent one is that of 62% of a task's examples (mean)"
        in description_text(found).splitlines()
    )
    few = describe(tmp_path, filters=FilterConfig(max_examples_per_task=3))
    assert few["kept"]["labels"]["tasks"] == 0


def test_a_task_without_examples_is_counted_and_no_sample(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "t", "instruction": "k", "examples": []}\n')
    found = describe(tmp_path / "a.jsonl")
    assert (found["tasks"], found["examples"], found["samples"]) == (1, 0, [])
    assert found["filtered"] == {"tasks: fewer than 2 examples left": 1}


def test_what_a_reader_leaves_out_is_counted(tmp_path: Path) -> None:
    """Beside what the filters do: here the same words before every question of a chat set."""
    said = [("system", "Be helpful.\n" * 20), ("user", "hot?"), ("assistant", "cold")]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    (tmp_path / "a.json").write_text(json.dumps([row] * 3))
    lines = description_text(describe(tmp_path)).splitlines()
    assert lines[1:3] == [
        "left out: system messages, the same in most rows that have one "
        "('Be helpful. Be helpful. Be helpful. Be helpful. Be...'): 3",
        "left out: examples: exact repeats: 2",
    ]
