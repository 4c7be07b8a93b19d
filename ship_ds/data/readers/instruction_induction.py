"""Instruction induction (Honovich et al. 2022): `raw/execute`, `raw/induce` and `annotations`, joined by task name.

SHIP merges execute and induce and takes annotation 0; the other annotations are paraphrases here. Two tasks have fields of
their own: cause_and_effect (the two events in alphabetical order -> the cause) and common_concept (items -> concept).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ship_ds.data.readers.checks import example, expect, field, load_object, texts
from ship_ds.data.task import Example, Task, read_error

_MORE_ANSWERS = ("possible_outputs", "possible_translations", "other_rhymes")


def matches(path: Path) -> bool:
    return path.is_dir() and (path / "annotations").is_dir() and (path / "raw").is_dir()


def read(path: Path) -> list[Task]:
    tasks = []
    for file in sorted((path / "annotations").glob("*.json")):
        wordings = tuple(dict.fromkeys(text.strip() for text in texts(load_object(file), "annotations", file, "file")))
        raw = [path / "raw" / part / file.name for part in ("execute", "induce")]
        if not any(part.is_file() for part in raw):
            raise read_error(file, "file", f"has no examples: neither {raw[0]} nor {raw[1]} is there")
        examples = [row for part in raw if part.is_file() for row in _read_examples(part)]
        tasks.append(Task(file.stem, wordings[0], tuple(dict.fromkeys(examples)), wordings[1:], source=str(file)))
    return tasks


def _read_examples(path: Path) -> list[Example]:
    rows = field(load_object(path), "examples", dict, path, "file")
    return [_read_example(expect(row, dict, path, f"examples.{key}"), path, f"examples.{key}") for key, row in rows.items()]


def _read_example(row: Mapping[str, Any], path: Path, where: str) -> Example:
    if "cause" in row:
        cause, effect = (field(row, key, str, path, where) for key in ("cause", "effect"))
        first, second = sorted((cause, effect))
        return example(f"Sentence 1: {first} Sentence 2: {second}", (cause,))
    if "concept" in row:
        concepts = (field(row, "concept", str, path, where),)
        concepts += texts(row, "all_common_concepts", path, where) if row.get("all_common_concepts") else ()
        return example(", ".join(texts(row, "items", path, where)), concepts)
    answers = [field(row, "output", str, path, where)]
    for key in _MORE_ANSWERS:
        answers += texts(row, key, path, where) if row.get(key) else ()
    return example(field(row, "input", str, path, where), tuple(answers))
