"""NF4 in pieces against bitsandbytes on the whole matrix."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

from ship_ds.errors import UserError
from ship_ds.export import nf4
from ship_ds.export.nf4 import Nf4, pieces_of, stored_names
from ship_ds.tensor_file import TensorFile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_scales_and_values_are_those_of_bitsandbytes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4, "_PIECE", 64 * 100)
    torch.manual_seed(0)
    weight = torch.randn(300, 192).to(dtype)
    own = Nf4.of("w", weight.shape, dtype, pieces_of(weight))
    theirs = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, compress_statistics=True, quant_type="nf4"
    ).to("cpu")
    state = theirs.quant_state
    assert (
        own.packed.equal(theirs.data)
        and own.state.absmax.equal(state.absmax)
        and own.state.offset.equal(state.offset)
    )
    assert own.state.state2.absmax.equal(state.state2.absmax)
    state.dtype = torch.float32
    values, whole = own.pieces(), bnb.functional.dequantize_4bit(theirs.data, state).reshape(-1)
    assert torch.cat([values(start, end) for start, end in nf4.spans(weight.numel())]).equal(whole)


def test_what_is_stored_comes_back_through_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 64)
    own = Nf4.of("w", weight.shape, torch.float32, pieces_of(weight))
    with TensorFile(tmp_path / "x.safetensors", stored_names("w")) as file:
        for name, tensor in own.tensors("w").items():
            file.add(name, tensor)
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(stored_names("w"))
    packed = found.pop("w")
    stats = {name.removeprefix("w."): tensor for name, tensor in found.items()}
    back = bnb.nn.Params4bit.from_prequantized(packed, stats, device="cpu")
    assert (
        bnb.functional.dequantize_4bit(back.data, back.quant_state)
        .reshape(-1)
        .equal(own.pieces()(0, weight.numel()))
    )


def test_rows_that_do_not_split_into_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="has 96 inputs; nf4 needs a multiple of 64"):
        Nf4.of("w", (4, 96), torch.float32, pieces_of(torch.zeros(4, 96)))
