"""Configs, overrides of them, and DeepSpeed's."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ship_ds.config import flat, load_config, parse_config, recipe_text
from ship_ds.runtime.deepspeed_config import CONFIGS_FOLDER, complete, read_deepspeed_config
from tests.fuzz.documents import (
    broken,
    changed,
    copies,
    files,
    fuzz,
    reads_or_says,
    values,
    variants,
)

CONFIG: Any = load_config("quickstart").model_dump(mode="json")
KEYS = sorted({key.rpartition(".")[2] for key in flat(CONFIG)} | CONFIG.keys())
WORDS = ["lora", "files", "mixture", "kind", "path", "nf4", "all-linear", "embedded", "on", "1:30"]
_PIECES = r"""
run:_ a:_ -_ ?_ <<:_ { } [ ] ,_ :_ ¶ ¶__ &a_ *a --- 2001-01-01 2001-99-99 0x 0o8 0b1 1:30 .inf -. ~
!!bool_ !!int_ !!float_ !!null_ !!timestamp_ !!binary_ !!set_ !!pairs_ !!omap_ !!map_ !!seq_ = <<
" "" "\UFFFFFFFF" "\U00110000" "\uD800" "\x" ' |¶ >-¶ 1e999
"""
YAML_PIECES = [one.replace("_", " ").replace("¶", "\n") for one in _PIECES.split()]
"""What PyYAML takes for more than a text, and what it stumbles over."""


def _parse(document: dict[str, Any]) -> str:
    return parse_config(document, "here").model_dump_json()


@pytest.mark.slow
@fuzz
@given(variants(st.one_of(changed(CONFIG, values(KEYS, WORDS)), values(KEYS, WORDS))))
def test_values_are_a_config_or_one_line(documents: list[Any]) -> None:
    for document in documents:
        if isinstance(document, dict):
            reads_or_says(partial(_parse, document))


def test_a_file_is_a_config_or_one_line(tmp_path: Path) -> None:
    documents = st.one_of(changed(CONFIG, values(KEYS, WORDS)), values(KEYS, WORDS))
    texts = st.one_of(
        documents.map(lambda one: yaml.safe_dump(json.loads(json.dumps(one)))),
        st.just(recipe_text("quickstart")),
        st.text(alphabet="abc:{}[]&*!<>|-? \n\t#'\"01.~", max_size=60),
        st.lists(st.sampled_from(YAML_PIECES), max_size=12).map("".join),
    )

    @fuzz
    @given(copies(broken(texts)))
    def check(contents: list[bytes]) -> None:
        path = tmp_path / "own.yaml"
        for content in contents:
            path.write_bytes(content)
            reads_or_says(lambda: load_config(str(path)))

    check()


_NAMES = st.lists(st.sampled_from([*KEYS, "0", "", "targets"]), min_size=1, max_size=4).map(
    ".".join
)
_VALUES = st.one_of(
    values(KEYS, WORDS).map(json.dumps), st.text(alphabet="[]{}:,&*-~ab01.e'\"", max_size=12)
)
_OVERRIDES = st.lists(st.tuples(_NAMES, _VALUES).map("=".join), min_size=1, max_size=3)


@fuzz
@given(copies(_OVERRIDES.map(lambda overrides: "\0".join(overrides).encode(errors="replace"))))
def test_overrides_are_taken_or_one_line(contents: list[bytes]) -> None:
    for content in contents:
        overrides = content.decode(errors="replace").split("\0")
        reads_or_says(partial(load_config, "quickstart", overrides))


def test_a_deepspeed_config_is_taken_or_one_line(tmp_path: Path) -> None:
    good = json.loads((CONFIGS_FOLDER / "zero3_offload_cpu.json").read_text())
    keys = [*good, *good["zero_optimization"], "fp16", "data_types", "enabled", "device"]

    @fuzz
    @given(copies(files(good, keys)))
    def check(contents: list[bytes]) -> None:
        path = tmp_path / "own.json"
        for content in contents:
            path.write_bytes(content)
            reads_or_says(lambda: complete(read_deepspeed_config(str(path))))

    check()
