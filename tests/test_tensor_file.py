"""A safetensors file written one tensor at a time: the library reads it back, and half a file does
not open."""

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ship_ds.tensor_file import TensorFile

TENSORS = {
    "odd": torch.arange(7, dtype=torch.uint8),
    "scalar": torch.tensor(2.5),
    "bf16": torch.randn(3, 5).bfloat16(),
    "rows": torch.randn(4, 6)[:, ::2],
    "none": torch.zeros(0, 4),
    "half": torch.randn(9).half(),
    "ids": torch.arange(3),
}


def write(path: Path) -> None:
    with TensorFile(path, TENSORS) as file:
        for name, tensor in TENSORS.items():
            file.add(name, tensor)
        file.metadata["why"] = "said last"


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (
            found[name].dtype == tensor.dtype
            and found[name].shape == tensor.shape
            and found[name].equal(tensor)
        ), name
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "why": "said last"}


def test_pieces_make_the_same_tensor(tmp_path: Path) -> None:
    whole = torch.randn(64, 3)
    with TensorFile(tmp_path / "x.safetensors", ["w"]) as file:
        file.add_pieces("w", torch.float32, whole.shape, whole.split(10))
    assert load_file(tmp_path / "x.safetensors")["w"].equal(whole)


def test_a_file_that_was_cut_off_does_not_open(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(KeyboardInterrupt), TensorFile(path, TENSORS) as file:
        file.add("bf16", TENSORS["bf16"])
        raise KeyboardInterrupt
    with pytest.raises(SafetensorError):
        load_file(path)
