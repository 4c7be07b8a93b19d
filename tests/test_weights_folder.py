"""The safetensors files of a model folder, read one tensor at a time."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ship_ds.errors import UserError
from ship_ds.safetensors_header import SINGLE_FILE, WEIGHTS_INDEX
from ship_ds.weights_folder import WeightsFolder

TENSORS = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a.weight": torch.arange(4, dtype=torch.bfloat16),
}


def write_two_files(folder: Path) -> None:
    folder.mkdir()
    places = {}
    for i, (name, tensor) in enumerate(TENSORS.items()):
        places[name] = f"model-{i}.safetensors"
        save_file({name: tensor}, folder / places[name])
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": places}))


def test_one_file_and_several_hold_the_same(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    save_file(TENSORS, tmp_path / "one" / SINGLE_FILE)
    write_two_files(tmp_path / "two")
    one, two = (WeightsFolder(tmp_path / name) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    for name, tensor in TENSORS.items():
        assert one.entries[name].shape == tensor.shape and one.entries[name].dtype == tensor.dtype
        assert one.read(name).equal(tensor) and two.read(name).equal(tensor)
    (tmp_path / "three").mkdir()
    other = {**TENSORS, "a.weight": torch.ones(4, dtype=torch.bfloat16)}
    save_file(other, tmp_path / "three" / SINGLE_FILE)
    assert WeightsFolder(tmp_path / "three").fingerprint != one.fingerprint


def header(shape: list[int]) -> bytes:
    text = json.dumps({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"model-1.safetensors: this file is missing, and model.safetensors.index"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"cut short: has \d+ bytes of \d+"),
        (lambda path: path.write_bytes(b"x" * 88), "not a safetensors file"),
        (lambda path: path.write_bytes(b""), "not a safetensors file"),
        (
            lambda path: path.write_bytes(header([0] + [2**62] * 60)),
            "not a safetensors file",
        ),
        (lambda path: path.write_bytes(header([0] + [2**61] * 65)), "not a safetensors file"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"F4"  ')),
            "a.weight is of dtype F4, which is not supported",
        ),
    ],
)
def test_a_bad_file_is_one_line(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    write_two_files(tmp_path / "two")
    damage(tmp_path / "two" / "model-1.safetensors")
    with pytest.raises(UserError, match=message) as raised:
        WeightsFolder(tmp_path / "two")
    assert "\n" not in str(raised.value)


def test_a_folder_without_weights_and_a_bad_index_are_one_line(tmp_path: Path) -> None:
    assert not WeightsFolder.is_one(tmp_path)
    with pytest.raises(UserError, match="has neither model.safetensors nor model.safetensors.ind"):
        WeightsFolder(tmp_path)
    (tmp_path / WEIGHTS_INDEX).write_text("[]")
    with pytest.raises(UserError, match="not an index of safetensors files"):
        WeightsFolder(tmp_path)
