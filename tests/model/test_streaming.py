"""A 4-bit base read one matrix at a time: the same bits as transformers' own loading, and clear
lines for bad files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ship_ds.errors import UserError
from ship_ds.model import nf4
from ship_ds.model.loading import load_lm
from tests.model.models import FAMILIES, tiny_lm

CPU = torch.device("cpu")


def _whole(folder: Path, dtype: torch.dtype) -> Any:
    """What transformers loads."""
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=dtype, quantization_config=quantised
    )


def _bits(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and quantisation constant as bytes."""
    found = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        found[name] = tensor.data
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            outer = {"absmax": state.absmax, "code": state.code, "offset": state.offset}
            parts = outer | {"absmax2": state.state2.absmax, "code2": state.state2.code}
            found |= {f"{name}.{part}": value for part, value in parts.items()}
            assert (state.nested, state.blocksize, state.quant_type) == (True, 64, "nf4")
            found[f"{name}.shape"] = torch.tensor(state.shape)
            found[f"{name}.dtype"] = torch.tensor(state.dtype.itemsize)
    return {
        name: value.detach().reshape(-1).contiguous().view(torch.uint8)
        for name, value in found.items()
    }


def _save(folder: Path, family: str, max_shard_size: str = "5GB", **changes: Any) -> Any:
    model = tiny_lm(family)
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_bits_are_those_of_transformers_loading(
    tmp_path: Path, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # these matrices have 32 to 128 blocks: the last slice is shorter
    monkeypatch.setattr(nf4, "_PIECE", 3 * nf4.BLOCK)
    _save(tmp_path, family)
    ours, theirs = load_lm(str(tmp_path), "nf4", dtype, device=CPU), _whole(tmp_path, dtype)
    expected, found = _bits(theirs), _bits(ours)
    assert found.keys() == expected.keys() and sum(".absmax2" in name for name in found) == 2 * 7
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    dtypes = {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    assert {name: parameter.dtype for name, parameter in ours.named_parameters()} == dtypes
    assert not ours.training and type(ours) is type(theirs)
    if family == "gemma2":  # tied
        assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_several_files_with_an_index(tmp_path: Path) -> None:
    _save(tmp_path / "one", "llama")
    _save(tmp_path / "many", "llama", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (
        _bits(load_lm(str(tmp_path / name), "nf4", torch.float32, device=CPU))
        for name in ("one", "many")
    )
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def test_every_matrix_is_sharded_before_the_next_is_read(tmp_path: Path) -> None:
    """The embeddings alone stay whole for the decoder to look at."""
    _save(tmp_path, "llama")
    whole: list[int] = []
    seen: list[str] = []

    def shard(module: torch.nn.Module) -> None:
        seen.append(type(module).__name__)
        for parameter in module.parameters(recurse=False):
            whole.append(parameter.numel())
            parameter.data = parameter.data.new_empty(0)

    model: Any = load_lm(str(tmp_path), "nf4", torch.float32, device=CPU, shard=shard)
    assert (
        seen.count("Linear4bit") == 14
        and seen.count("LlamaRMSNorm") == 5
        and seen.count("Linear") == 1
    )
    assert [name for name, parameter in model.named_parameters() if parameter.numel()] == [
        "model.embed_tokens.weight"
    ]
    assert not any(parameter.is_meta for parameter in model.parameters()) and all(whole)


def test_missing_shard_is_one_line(tmp_path: Path) -> None:
    _save(tmp_path, "llama", max_shard_size="60KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[2]
    lost.unlink()
    _one_line(tmp_path, f"{lost.name}: this file is missing, and model.safetensors.index")


def test_shard_cut_short_is_one_line(tmp_path: Path) -> None:
    _save(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    _one_line(tmp_path, r"model.safetensors: cut short: has \d+ bytes of \d+")


def test_missing_weight_and_other_shape_are_named(tmp_path: Path) -> None:
    _save(tmp_path, "llama")
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    kept = state.pop(name)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    _one_line(tmp_path, f"no weight {name}")
    save_file(
        {**state, name: kept[:-1].contiguous()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    _one_line(tmp_path, rf"{name} is \(127, 64\), and config.json says \(128, 64\)")


def test_tied_model_whose_files_repeat_the_weight(tmp_path: Path) -> None:
    _save(tmp_path, "gemma2")
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    assert "lm_head.weight" not in state
    save_file(
        {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()},
        path,
        {"format": "pt"},
    )
    model: Any = load_lm(str(tmp_path), "nf4", torch.float32, device=CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_quantised_checkpoint_goes_through_transformers_and_says_so(tmp_path: Path) -> None:
    _save(tmp_path / "plain", "llama")
    _whole(tmp_path / "plain", torch.float32).save_pretrained(tmp_path / "nf4")
    assert "quantization_config" in json.loads((tmp_path / "nf4" / "config.json").read_text())
    with pytest.warns(
        UserWarning,
        match="every rank loads the model whole before it is sharded: it is quantised already",
    ):
        model = load_lm(
            str(tmp_path / "nf4"), "nf4", torch.float32, device=CPU, shard=lambda module: None
        )
    plain = _bits(load_lm(str(tmp_path / "plain"), "nf4", torch.float32, device=CPU))
    found = _bits(model)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[name], plain[name])


def _one_line(folder: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern) as error:
        load_lm(str(folder), "nf4", torch.float32, device=CPU)
    assert "\n" not in str(error.value)
