"""Loading from a folder, plain and in NF4."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Dots3NoteTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MambaConfig,
    PreTrainedConfig,
)

from ship_ds.config import base_folder, load_config
from ship_ds.errors import UserError
from ship_ds.model import loading
from ship_ds.model.language_model import language_model
from ship_ds.model.loading import Quantisation, check_models, load_lm
from ship_ds.weights_folder import is_finite
from tests.model.models import HIDDEN, tiny_lm

IDS = torch.arange(2, 14).view(2, 6)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tiny_lm("llama").save_pretrained(tmp_path)
    return str(tmp_path)


def _four_bit(model: Any) -> list[bnb.nn.Linear4bit]:
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def test_nf4_holds_every_linear_in_uint8_and_computes_with_its_dequantised_weight(
    folder: str,
) -> None:
    plain, quantised = load_lm(folder, "none", torch.float32), load_lm(folder, "nf4", torch.float32)
    layers = {
        name: module
        for name, module in quantised.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        state = layer.weight.quant_state
        assert layer.weight.dtype == torch.uint8 and state.quant_type == "nf4" and state.nested
        exact, held = (
            plain.get_submodule(name).weight.detach(),
            bnb.functional.dequantize_4bit(layer.weight.data, state),
        )
        # 9 % is what NF4 loses on a normal distribution
        assert 0.02 < float((held - exact).norm() / exact.norm()) < 0.12
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(x), x @ held.T, rtol=1e-4, atol=1e-4)


def test_nf4_rows_that_the_cpu_kernel_gets_wrong_are_refused(tmp_path: Path) -> None:
    """bitsandbytes 0.50 on a CPU: a third of the weights' norm is wrong where rows are no multiple
    of a block, in silence."""
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=3,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.layers.0.self_attn.q_proj has 96 inputs") as error:
        load_lm(str(tmp_path), "nf4", torch.float32, device=torch.device("cpu"))
    assert "\n" not in str(error.value)
    load_lm(str(tmp_path), "none", torch.float32)


def test_eval_forward_on_avx512_bf16_leaves_the_packed_weights_alone(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repacked in place, the weights make the next training step wrong (design.md, section 4)."""
    repacked = []

    def repack(weight: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        repacked.append(weight)
        return weight, state

    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)  # as on such a CPU
    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", repack)
    model = load_lm(folder, "nf4", torch.float32).eval()
    layers = _four_bit(model)
    before = [layer.weight.data.clone() for layer in layers]
    with torch.no_grad():
        model(IDS)
    assert not repacked and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert all(
        torch.equal(layer.weight.data, old) for layer, old in zip(layers, before, strict=True)
    )
    layers[0].support_avx512bf16_for_cpu = True
    with torch.no_grad():
        model(IDS)
    assert len(repacked) == 1, (
        "bitsandbytes would repack here: if it no longer does, this test shows nothing"
    )


def test_training_steps_around_an_evaluation_take_the_same_loss(folder: str) -> None:
    model = load_lm(folder, "nf4", torch.float32).eval()
    hidden = torch.randn(1, 5, HIDDEN, requires_grad=True)

    def step() -> float:
        return float(model(inputs_embeds=hidden).logits.logsumexp(-1).sum().detach())

    first = step()
    with torch.no_grad():
        model(IDS)
    assert step() == first


def test_soft_capped_model_loads_on_a_cpu(tmp_path: Path) -> None:
    tiny_lm("gemma2").save_pretrained(tmp_path)
    model = load_lm(str(tmp_path), "none", torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, tiny_lm("gemma2")(IDS).logits)


def test_a_base_that_transformers_has_to_load_whole_loads_in_4_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its linears lie transposed in its files. On the device that is asked for: bitsandbytes would
    take the current GPU, and so it would for a folder whose weights have 4 bits already."""
    sizes: Any = {"vocab_size": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "whole")
    maps, load_whole = [], loading._load_whole

    def spy(folder: Path, settings: Any, **how: Any) -> Any:
        maps.append(how.get("device_map"))
        return load_whole(folder, settings, **how)

    monkeypatch.setattr(loading, "_load_whole", spy)
    cpu = torch.device("cpu")
    model = load_lm(str(tmp_path / "whole"), "nf4", torch.float32, device=cpu)
    assert len(_four_bit(model)) == 2 * 4
    model.save_pretrained(tmp_path / "packed")
    again = load_lm(str(tmp_path / "packed"), "none", torch.float32, device=cpu)
    assert len(_four_bit(again)) == 2 * 4 and maps == [{"": cpu}, {"": cpu}]
    load_lm(str(tmp_path / "whole"), "none", torch.float32, device=cpu)
    assert maps[2] is None


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("family", "quantisation"), [("llama", "none"), ("llama", "nf4"), ("gpt2", "none")]
)
def test_a_weight_that_is_no_number_is_named_as_it_is_loaded(
    family: str, value: float, quantisation: Quantisation, tmp_path: Path
) -> None:
    """Of a base too large for the preflight. What transformers quantises itself, as one of GPT-2,
    does not tell."""
    gpt2 = GPT2Config(vocab_size=32, n_embd=64, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(gpt2) if family == "gpt2" else tiny_lm(family)
    name, weight = next(
        (name, weight) for name, weight in model.named_parameters() if "1.mlp" in name
    )
    weight.data[-1, 3] = value
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    line = re.escape(f"{tmp_path / 'model.safetensors'}: {name} has values that are infinite or no")
    with pytest.raises(UserError, match=f"^{line}"):
        load_lm(str(tmp_path), quantisation, torch.bfloat16, device=torch.device("cpu"))


def test_weights_that_fit_their_file_and_not_the_dtype_are_not_laid_to_the_file(
    tmp_path: Path,
) -> None:
    model = tiny_lm("llama")
    next(model.parameters()).data[0, 0] = 1e5
    model.save_pretrained(tmp_path)
    loaded = load_lm(str(tmp_path), "none", torch.float16, device=torch.device("cpu"))
    assert not is_finite(next(loaded.parameters()))


def test_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a model folder with a config.json"):
        load_lm(str(tmp_path), "none", torch.float32)


def test_code_of_a_model_folder_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where somebody at the terminal would say yes."""
    settings = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match=r"config\.json: "):
        load_lm(str(tmp_path), "none", torch.float32)
    assert not (tmp_path / "ran").exists()


def check_role(role: str, base: Path) -> None:
    roles = {one: "embedded" for one in ("task_llm", "encoder", "decoder")} | {role: str(base)}
    bases = [f"model.{name}.base={one}" for name, one in roles.items()]
    check_models(load_config("quickstart-smoke", bases).model)


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 266}


@pytest.mark.parametrize(
    ("config", "roles", "reason"),
    [
        (BertConfig(**SMALL, num_attention_heads=4), "task_llm decoder", "in both directions"),
        (MambaConfig(**SMALL, state_size=4), "task_llm", "hands its blocks nothing"),
        (MambaConfig(**SMALL, state_size=4), "encoder decoder", "has no attention"),
        (LlavaConfig(), "task_llm encoder decoder", "which reads more than texts; give a decoder"),
        (Dots3NoteTextConfig(), "task_llm encoder decoder", "layers have other numbers of heads"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused_by_role(
    config: PreTrainedConfig, roles: str, reason: str, tmp_path: Path
) -> None:
    base = shutil.copytree(base_folder("embedded"), tmp_path / "base")
    config.save_pretrained(base)
    for role in ("task_llm", "encoder", "decoder"):
        if role in roles:
            with pytest.raises(UserError, match=rf"^model\.{role}\.base: .*{reason}") as refused:
                check_role(role, base)
            assert "\n" not in str(refused.value)
        elif reason == "in both directions":
            check_role(role, base)


@pytest.mark.parametrize(
    ("file", "change", "line"),
    [
        ("config.json", {"hidden_act": "swishy"}, "no llama can be made of it: KeyError: 'swishy'"),
        ("config.json", {"pad_token_id": 999}, "no llama can be made of it: AssertionError"),
        ("config.json", {"num_attention_heads": 5}, "not a multiple of the number of attention"),
        ("config.json", {"hidden_size": "64"}, "'hidden_size'.* expected int, got str"),
        (
            "config.json",
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": "yes"}},
            "quantization_config: TypeError: load_in_4bit must be a boolean",
        ),
        ("generation_config.json", {"cache_implementation": "x"}, "Invalid `cache_implementation`"),
    ],
)
def test_settings_that_make_no_model_are_one_line(
    file: str, change: dict[str, Any], line: str, tmp_path: Path
) -> None:
    base = shutil.copytree(base_folder("embedded"), tmp_path / "base")
    path = base / file
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | change))
    with pytest.raises(
        UserError, match=rf"^model\.task_llm\.base: {re.escape(str(path))}: .*{line}"
    ):
        check_role("task_llm", base)
    # Also of whoever loads it without a run.
    with pytest.raises(UserError, match=line) as refused:
        load_lm(str(base), "none", torch.float32)
    assert "\n" not in str(refused.value)


def test_an_encoder_of_masked_words_gives_its_output_layer_up() -> None:
    model = BertLMHeadModel(BertConfig(**SMALL, num_attention_heads=4, intermediate_size=64))
    language_model(model).drop_output_layer()
    assert not any("decoder" in name for name, _ in model.named_parameters())
