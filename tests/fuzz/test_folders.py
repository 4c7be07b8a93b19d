"""Folders that others hand on: adapters, bundles, bases, checkpoints and their files."""

import json
import re
import shutil
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ship_ds.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ship_ds.base_files import check_base_files
from ship_ds.bundle import PROGRESS, Bundle, check_checkpoint, frozen_bases, write_bundle
from ship_ds.cli.checks import check_run
from ship_ds.config import base_folder, load_config
from ship_ds.console import no_log
from ship_ds.errors import UserError
from ship_ds.files import Manifest
from ship_ds.lora_folder import read_lora
from ship_ds.origin import read_origin
from ship_ds.runtime import checkpoint
from ship_ds.safetensors_header import read_header
from tests.fuzz.documents import broken, copies, files, fuzz, reads_or_says

ORIGIN: dict[str, Any] = {
    "made_from": "k",
    "run": "r",
    "bundle": "0a",
    "base": "embedded",
    "base_fingerprint": "0b",
    "quantisation": "nf4",
    "shape": "rank 2",
    "prompt_format": {"version": 2},
    "probes": [[1, 2]],
    "proof": {"from_live": 0.0, "from_base": 1.0},
    "adapter": "0c",
    "tuning": {
        "start": "generated",
        "steps": 3,
        "lr": 0.01,
        "seed": 0,
        "num_examples": 4,
        "num_held_out": 1,
        "held_out_loss": [2.0, 1.0],
    },
    "confidence": {"agreement": 0.5, "threshold": None, "auc": 0.5},
}
LORA = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "bias": "none",
    "init_lora_weights": True,
    "use_rslora": False,
    "base_model_name_or_path": "embedded",
}


def test_ship_json_is_read_or_one_line(tmp_path: Path) -> None:
    """Three of its fields are objects whose keys the model card names."""

    @fuzz
    @given(copies(files(ORIGIN, list(ORIGIN))))
    def check(contents: list[bytes]) -> None:
        for content in contents:
            (tmp_path / "ship.json").write_bytes(content)
            reads_or_says(lambda: read_origin(tmp_path).card())

    check()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("proof", {"from_live": 0.0}, "proof: has no 'from_base'"),
        ("confidence", {}, "has no 'agreement'"),
        ("confidence", {"agreement": 0.5}, "has no 'threshold'"),
        ("tuning", {}, "tuning.start"),
        ("tuning", {**ORIGIN["tuning"], "held_out_loss": [1.0]}, "tuning.held_out_loss"),
    ],
)
def test_a_key_that_the_card_names_is_missed_by_its_name(
    key: str, value: object, said: str, tmp_path: Path
) -> None:
    """Found by `make fuzz`: a KeyError, where the card is written or the proof is taken up."""
    (tmp_path / "ship.json").write_text(json.dumps({**ORIGIN, key: value}))
    with pytest.raises(UserError, match=re.escape(said)):
        read_origin(tmp_path)
    (tmp_path / "ship.json").write_text(json.dumps(ORIGIN))
    assert "then trained by gradient on 4 examples: 3 steps" in read_origin(tmp_path).card()


def test_an_adapter_is_read_or_one_line(tmp_path: Path) -> None:
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    good = {f"{path}.lora_A.weight": torch.ones(2, 3), f"{path}.lora_B.weight": torch.ones(4, 2)}
    save_file(good, tmp_path / ADAPTER_WEIGHTS)
    weights = (tmp_path / ADAPTER_WEIGHTS).read_bytes()
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(LORA))
    read_lora(tmp_path)  # imports peft, for which no input is to blame

    settings = files(LORA, [*LORA, "rank_pattern", "use_dora"])
    either = st.one_of(
        st.tuples(st.just(ADAPTER_CONFIG), copies(settings)),
        st.tuples(st.just(ADAPTER_WEIGHTS), copies(_safetensors(weights))),
    )

    @fuzz
    @given(either)
    def check(drawn: tuple[str, list[bytes]]) -> None:
        name, contents = drawn
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(LORA))
        (tmp_path / ADAPTER_WEIGHTS).write_bytes(weights)
        for content in contents:
            (tmp_path / name).write_bytes(content)
            reads_or_says(lambda: read_lora(tmp_path))

    check()


def _safetensors(good: bytes) -> st.SearchStrategy[bytes]:
    """The file broken, or its header another, with its length right or not."""
    size = struct.unpack("<Q", good[:8])[0]
    header, rest = json.loads(good[8 : 8 + size]), good[8 + size :]
    names = [*header, "dtype", "shape", "data_offsets", "__metadata__"]

    def whole(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + rest

    return st.one_of(
        files(header, names).map(whole),
        broken(st.just("")).map(lambda extra: good + extra),
        st.integers(0, len(good)).map(lambda end: good[:end]),
        st.integers(0, 2**64 - 1).map(lambda wrong: struct.pack("<Q", wrong) + good[8:]),
        st.binary(max_size=40),
    )


def test_a_header_is_read_or_one_line(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "good")
    path = tmp_path / "a.safetensors"

    @fuzz
    @given(copies(_safetensors((tmp_path / "good").read_bytes())))
    def check(contents: list[bytes]) -> None:
        for content in contents:
            path.write_bytes(content)
            reads_or_says(lambda: read_header(path))

    check()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_config("quickstart-smoke")
    folder = tmp_path_factory.mktemp("fuzz") / "bundle"
    state = {"a": torch.ones(2)}
    write_bundle(folder, state, config, {"version": 2}, frozen_bases(config), ["k"], ["x"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["config.json", "prompt_format.json", "bases.json", "known_instructions.json", "probes.json"],
)
def test_a_bundle_is_opened_or_one_line(name: str, bundle: Path, tmp_path: Path) -> None:
    """Its manifest, which anyone can write, lists the files as they are."""
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    document: Any = json.loads((bundle / name).read_text())

    @fuzz
    @given(copies(files(document, list(document) if isinstance(document, dict) else ["k"])))
    def check(contents: list[bytes]) -> None:
        for content in contents:
            (folder / name).write_bytes(content)
            # Not by its own `write`, which waits for the disk.
            listed = {name: asdict(row) for name, row in Manifest.of(folder).files.items()}
            (folder / "manifest.json").write_text(json.dumps(listed))
            reads_or_says(lambda: Bundle.open(folder))
            if name == "config.json":
                reads_or_says(lambda: check_run(folder))

    check()


def test_a_manifest_is_read_or_one_line(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    document = json.loads((bundle / "manifest.json").read_text())

    @fuzz
    @given(copies(files(document, [*document, "bytes", "sha256", "../x", "/etc/passwd"])))
    def check(contents: list[bytes]) -> None:
        for content in contents:
            (folder / "manifest.json").write_bytes(content)
            reads_or_says(lambda: Bundle.open(folder))

    check()


@pytest.mark.parametrize("name", [PROGRESS, checkpoint.EVALUATION, "manifest.json"])
def test_a_checkpoint_is_gone_on_from_or_one_line(name: str, tmp_path: Path) -> None:
    """As far as it goes without a model."""
    config = load_config("quickstart-smoke").model_dump(mode="json")
    progress = asdict(checkpoint.Progress(2, 1.5, 30, 0, 1, config, "0a", git_revision="0b"))
    folder = checkpoint.folder_of(tmp_path, 2)
    folder.mkdir()
    (folder / PROGRESS).write_text(json.dumps(progress))
    checkpoint.record_evaluation(folder, 1)
    Manifest.of(folder, [PROGRESS]).write(folder)
    document = json.loads((folder / name).read_text())

    def go_on() -> None:
        if name != "manifest.json":
            then = checkpoint.read_progress(folder)
            checkpoint.check_same_run(folder, then, config, "0a", {})
        elif checkpoint.newest_good(tmp_path, no_log):
            check_checkpoint(folder)

    go_on()

    @fuzz
    @given(copies(files(document, [*document, "bytes", "sha256", "../x", "seed"])))
    def check(contents: list[bytes]) -> None:
        for content in contents:
            (folder / name).write_bytes(content)
            reads_or_says(go_on)

    check()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"]
)
def test_a_base_is_looked_through_or_one_line(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base_folder("embedded"), tmp_path / "base"))
    document = json.loads((folder / name).read_text())
    if name == "tokenizer.json":
        document = {key: document[key] for key in ("version", "model")} | {"model": {}}

    @fuzz
    @given(copies(files(document, [*document, "auto_map", "quantization_config", "quant_method"])))
    def check(contents: list[bytes]) -> None:
        for content in contents:
            (folder / name).write_bytes(content)
            reads_or_says(lambda: check_base_files(folder))

    check()
