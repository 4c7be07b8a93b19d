"""Instruction induction (Honovich et al. 2022): `raw/execute`, `raw/induce` and `annotations`,
joined by task name.

SHIP merges execute and induce and takes annotation 0; the other annotations are paraphrases here.
Two tasks have fields of their own: cause_and_effect (the two events in alphabetical order -> the
cause) and common_concept (items -> concept). `other_rhymes` lists the input word too; it is no
answer here, since copying the input would then always be right.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ship_ds.data.readers.checks import distinct, example, expect, field, load_object, texts
from ship_ds.data.readers.files import files_of, stem_of
from ship_ds.data.task import Example, PaperMetric, Task, read_error

_METRICS: dict[str, PaperMetric] = {
    "common_concept": "f1",
    "informal_to_formal": "f1",
    "orthography_starts_with": "set",
    "taxonomy_animal": "set",
    "synonyms": "contains",
}
"""As the paper's evaluation scores its tasks; `exact` the others."""
_MORE_ANSWERS = ("possible_outputs", "possible_translations", "other_rhymes")


def files(path: Path) -> list[Path]:
    """Those of annotations/ and of both folders of raw/."""
    inner = ("annotations", "raw/execute", "raw/induce")
    return [file for name in inner for file in files_of(path / name, (".json",))]


def matches(path: Path) -> bool:
    """Whether a folder has the two subfolders of this format."""
    return path.is_dir() and (path / "annotations").is_dir() and (path / "raw").is_dir()


def read(path: Path, counts: Counter[str]) -> list[Task]:
    """The tasks of the folder, one for each file below annotations/."""
    annotations = files_of(path / "annotations", (".json",))
    raw = {part: files_of(path / "raw" / part, (".json",)) for part in ("execute", "induce")}
    names = {stem_of(file) for file in annotations}
    for file in (file for files in raw.values() for file in files):
        if stem_of(file) not in names:
            place = path / "annotations" / f"{stem_of(file)}.json"
            raise read_error(file, "file", f"has no instruction: {place} is not there")
    tasks = []
    for file in annotations:
        name = stem_of(file)
        wordings = distinct(texts(load_object(file), "annotations", file, "file"))
        parts = [one for files in raw.values() for one in files if stem_of(one) == name]
        if not parts:
            places = [path / "raw" / part / f"{name}.json" for part in raw]
            raise read_error(
                file, "file", f"has no examples: neither {places[0]} nor {places[1]} is there"
            )
        examples = [row for part in parts for row in _read_examples(part)]
        metric = _METRICS.get(name, "exact")
        tasks.append(
            Task(
                name,
                wordings[0],
                tuple(examples),
                wordings[1:],
                source=str(file),
                paper_metric=metric,
            )
        )
    return tasks


def _read_examples(path: Path) -> list[Example]:
    rows = field(load_object(path), "examples", dict, path, "file")
    return [
        _read_example(expect(row, dict, path, f"examples.{key}"), path, f"examples.{key}")
        for key, row in rows.items()
    ]


def _read_example(row: Mapping[str, Any], path: Path, where: str) -> Example:
    if "cause" in row:
        cause, effect = (field(row, key, str, path, where) for key in ("cause", "effect"))
        first, second = sorted((cause, effect))
        return example(f"Sentence 1: {first} Sentence 2: {second}", (cause,))
    if "concept" in row:
        concepts = (field(row, "concept", str, path, where),)
        concepts += (
            texts(row, "all_common_concepts", path, where) if row.get("all_common_concepts") else ()
        )
        return example(", ".join(texts(row, "items", path, where)), concepts)
    text, output = (field(row, key, str, path, where) for key in ("input", "output"))
    others = [
        answer for key in _MORE_ANSWERS if row.get(key) for answer in texts(row, key, path, where)
    ]
    if "other_rhymes" in row:
        others = [answer for answer in others if answer != text]
    return example(text, (output, *others))
