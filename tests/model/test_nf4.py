"""NF4 in pieces against bitsandbytes on the whole matrix."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ship_ds.model import nf4
from ship_ds.model.nf4 import Nf4, file_names, pieces_of
from ship_ds.model.streaming import empty_nf4_lm
from ship_ds.tensor_file import TensorFile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_scales_and_values_are_those_of_bitsandbytes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4, "_PIECE", 64 * 100)
    torch.manual_seed(0)
    weight = torch.randn(300, 192).to(dtype)
    own = Nf4.of(weight.shape, dtype, pieces_of(weight, torch.float32))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("has_kernel", [True, False])
def test_dequantised_is_what_bitsandbytes_computes_with(
    dtype: torch.dtype, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernel:
        monkeypatch.setattr(nf4, "_KERNELS", {})
    assert bool(nf4._KERNELS) is has_kernel
    torch.manual_seed(0)
    for shape in ((6, 128), (300, 192), (5, 64)):
        weight = torch.randn(shape)
        made = Nf4.of(shape, dtype, pieces_of(weight, torch.float32))
        expected = bnb.functional.dequantize_4bit(made.packed, made.state)
        assert nf4.dequantised(made.packed, made.state, dtype).equal(expected)


def test_what_is_stored_comes_back_through_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 64)
    own = Nf4.of(weight.shape, torch.float32, pieces_of(weight, torch.float32))
    with TensorFile(tmp_path / "x.safetensors", file_names("w")) as file:
        for name, tensor in own.tensors("w").items():
            file.add(name, tensor)
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(file_names("w"))
    packed = found.pop("w")
    stats = {name.removeprefix("w."): tensor for name, tensor in found.items()}
    back = bnb.nn.Params4bit.from_prequantized(packed, stats, device="cpu")
    assert (
        bnb.functional.dequantize_4bit(back.data, back.quant_state)
        .reshape(-1)
        .equal(own.pieces()(0, weight.numel()))
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_what_is_quantised_is_what_transformers_converts(family: str, tied: bool) -> None:
    settings = AutoConfig.for_model(family, num_hidden_layers=1, tie_word_embeddings=tied)
    with torch.device("meta"):
        named = nf4.quantised_linears(AutoModelForCausalLM.from_config(settings))
    converted = empty_nf4_lm(settings, torch.float32, "eager")
    modules = dict(converted.named_modules())
    assert named and set(named) == {
        path for path, module in modules.items() if isinstance(module, bnb.nn.Linear4bit)
    }


@pytest.mark.parametrize("num_weights", [64, 96, 64 * 300])
def test_bytes_are_those_that_bitsandbytes_holds(num_weights: int) -> None:
    made = Nf4.of(
        (1, num_weights), torch.float32, pieces_of(torch.ones(num_weights), torch.float32)
    )
    state = made.state
    constants = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert made.packed.nbytes == nf4.packed_bytes(num_weights)
    assert sum(tensor.nbytes for tensor in constants) + 4 == nf4.constants_bytes(num_weights)
