"""Prompts in every block: what tokens attend to is what the stock model makes of states that stand
before each block's input, whatever its family does to them on the way."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ship_ds.config import ModelConfig
from ship_ds.model.adapters.adapter import Adapter, Hypernetwork, Target, build_hypernetwork
from ship_ds.model.adapters.prefix import PrefixAdapter
from ship_ds.model.adapters.sites import (
    linears_of,
    sites_in_each_block,
    weight_of,
    wrap,
    wrap_sites,
)
from ship_ds.model.attention import SDPA
from ship_ds.model.batch import TokenBatch
from ship_ds.model.generation import greedy
from ship_ds.model.language_model import LanguageModel, language_model
from ship_ds.model.lean_modules import make_lean
from ship_ds.model.loading import load_lm
from tests.model.models import EOS, HIDDEN, VOCABULARY, random_rows, tiny_lm, tiny_t5

LENGTH, TASKS, Z = 3, 2, 8
PROMPTS, TARGETS = random_rows([5, 5, 5, 5], 3), random_rows([2, 2, 2, 2], 4)
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
MORE: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama yarn": {"rope_parameters": YARN},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "starcoder2": {},
    "gemma": {"head_dim": 16},
    "glm": {"head_dim": 16},  # turns half of each head
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
}


def _model(name: str) -> PreTrainedModel:
    """Of a family, two blocks; biases and norms are no ones and zeros."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name.split()[0],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        **MORE[name],
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=SDPA).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.requires_grad_(False)


def _prompts(num_places: int, seed: int = 5) -> Tensor:
    """Of each place, (places, T, P, H)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_places, TASKS, LENGTH, HIDDEN, generator=generator)


def _adapter(lm: LanguageModel, prompts: Tensor) -> PrefixAdapter:
    places = zip(lm.attentions(), prompts, strict=True)
    return PrefixAdapter({place: lm.keys_and_values(place, one) for place, one in places})


def _as_published(model: PreTrainedModel, prompts: Tensor) -> Tensor:
    """The labels' logits of the stock model, whose first tokens are prompts: before each block the
    block's own take the place of what came out of the one before it."""
    blocks: Any = model.model.layers

    def put(own_EPH: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.cat([own_EPH, inputs[0][:, LENGTH:]], 1), *inputs[1:]

    handles = [
        block.register_forward_pre_hook(lambda _, inputs, own=own: put(own, inputs))
        for block, own in zip(blocks, prompts.repeat_interleave(2, 1), strict=True)
    ]
    rows = [[9] * LENGTH + prompt + target for prompt, target in zip(PROMPTS, TARGETS, strict=True)]
    logits = model(input_ids=torch.tensor(rows)).logits[:, LENGTH + len(PROMPTS[0]) - 1 : -1]
    for handle in handles:
        handle.remove()
    return logits.flatten(0, 1)


@pytest.mark.parametrize("is_lean", [False, True])
@pytest.mark.parametrize("name", MORE)
def test_tokens_meet_prompts_as_in_the_stock_model(name: str, is_lean: bool) -> None:
    """In each block, before position 0, packed and padded; training's lean modules too."""
    model, prompts = _model(name), _prompts(2)
    expected = _as_published(model, prompts)
    if is_lean:
        make_lean(model)
    wrap_sites(model, ())
    lm, batch = language_model(model), TokenBatch.build(PROMPTS, TARGETS, 0)
    adapter = _adapter(lm, prompts)
    for packed in (False, True):
        logits, _ = lm.score(batch, adapter, TASKS, packed=packed)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert float((lm.score(batch)[0] - expected).abs().max()) > 0.1
    others = _adapter(lm, _prompts(2, 6))
    assert float((lm.score(batch, others, TASKS)[0] - expected).abs().max()) > 0.1


def test_in_one_block_they_are_a_soft_prompt() -> None:
    """What differs between the two begins with the second block."""
    model = tiny_lm("llama")
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    wrap_sites(model, ())
    lm, prompts = language_model(model), _prompts(1)
    adapter, soft = _adapter(lm, prompts), prompts[0].repeat_interleave(2, 0)
    logits, _ = lm.score(TokenBatch.build(PROMPTS, TARGETS, 0), adapter, TASKS)
    expected, _ = lm.score(TokenBatch.build(PROMPTS, TARGETS, 0, LENGTH), soft=soft)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    answers = greedy(lm.stream(TokenBatch.build(PROMPTS, None, 0), adapter), EOS, 6)
    longer = TokenBatch.build(PROMPTS, None, 0, LENGTH)
    assert answers == greedy(lm.stream(longer, soft=soft), EOS, 6)


def test_t5s_attentions_make_what_its_own_forward_makes() -> None:
    """States at every place of both stacks, against what the stock stacks project as they run."""
    model: Any = tiny_t5().requires_grad_(False)
    lm = language_model(model)
    prompts = dict(zip(lm.attentions(), _prompts(6), strict=True))
    read_TPH = prompts["decoder.block.0.layer.1"]
    made: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if path.endswith((".k", ".v")):
            module.register_forward_hook(lambda *call, path=path: made.update({path: call[2]}))
    for path, block in lm.blocks().items():
        own = prompts[path]
        block.register_forward_pre_hook(lambda _, inputs, own=own: (own, *inputs[1:]))
    model.encoder(inputs_embeds=prompts["encoder.block.0"])
    model.decoder(inputs_embeds=prompts["decoder.block.0"], encoder_hidden_states=read_TPH)
    expected = dict(made)
    wrap_sites(model, ())
    for place, states_TPH in prompts.items():
        is_crossing = place.endswith(".layer.1")
        inner = "EncDecAttention" if is_crossing else "layer.0.SelfAttention"
        found = lm.keys_and_values(place, read_TPH if is_crossing else states_TPH)
        for ours, name in zip(found.unbind(1), "kv", strict=True):
            theirs_TPGF = expected[f"{place}.{inner}.{name}"].unflatten(2, (4, 16))
            torch.testing.assert_close(ours, theirs_TPGF.transpose(1, 2))


REFUSED: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "diffllama": {},  # its values go in halves into two attentions
    "doge": {},  # makes a mask of them
    "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16},
    "phi3": {},
    "phi": {},
    "gpt_neox": {},
    "stablelm": {},
    "olmo2": {},
    "olmo": {},
    "smollm3": {},
    "cohere": {},
    "gemma3_text": {"head_dim": 8},
    "mellum": {"head_dim": 8, "moe_intermediate_size": 8, "num_experts": 2, "layer_types": None},
    "olmo3": {},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_projects_otherwise_is_refused_in_one_line(name: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        name, vocab_size=9, pad_token_id=0, **sizes, **heads, **REFUSED[name]
    )
    lm = language_model(AutoModelForCausalLM.from_config(config))
    reason = lm.missing("projection")
    assert reason is not None and "\n" not in reason and "model.hypernetwork.kind" in reason


class NormsLater(LlamaDecoderLayer):
    """Llama's attention in a block that normalises what comes out of it."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        return self.input_layernorm(hidden_states)


def test_a_block_that_normalises_elsewhere_is_refused() -> None:
    model: Any = tiny_lm("llama")
    assert language_model(model).missing("projection") is None
    model.model.layers[1].__class__ = NormsLater
    assert "Llama's and Qwen3's attention" in str(language_model(model).missing("projection"))


@pytest.mark.parametrize("name", MORE)
def test_a_family_that_projects_as_llama_is_not_refused_wrapped_or_not(name: str) -> None:
    model = _model(name)
    assert language_model(model).missing("projection") is None
    make_lean(model)
    wrap_sites(model, ("k_proj",))
    assert language_model(model).missing("projection") is None


def _hypernetwork(lm: LanguageModel, sites: Any, section: dict[str, Any]) -> Hypernetwork:
    torch.manual_seed(1)
    config = ModelConfig.model_validate({"hypernetwork": section}).hypernetwork
    return build_hypernetwork(config, Z, Target.of(lm, sites))


def test_other_parts_of_a_combination_change_no_key_and_no_value() -> None:
    """A LoRA of the same projections: what is made goes by the base's own weights, so that a part
    means in company what it means alone."""
    model = tiny_lm("llama").requires_grad_(False)
    sites = sites_in_each_block(model, ("k_proj", "v_proj"))
    wrap(model, sites)
    lm = language_model(model)
    lora = {"kind": "lora", "rank": 2, "width": 8, "targets": ["k_proj", "v_proj"]}
    alone = {"kind": "layer_prompt", "length": LENGTH, "width": 8}
    both = _hypernetwork(lm, sites, {"kind": "combination", "parts": [lora, alone]})
    with torch.no_grad():
        for parameter in both.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    latent_TZ = torch.randn(TASKS, Z)
    part: Adapter = both.parts[1](latent_TZ)  # type: ignore[operator]
    together = both(latent_TZ)
    batch = TokenBatch.build(PROMPTS, TARGETS, 0)
    lm.score(batch, together, TASKS)  # a LoRA that a block had is gone after it
    for place in lm.blocks():
        keys, values, _ = together.prefix(place, TASKS)
        own_keys, own_values, _ = part.prefix(place, TASKS)  # type: ignore[misc]
        assert torch.equal(keys, own_keys) and torch.equal(values, own_values)
        again: Adapter = both(latent_TZ).parts[1]
        assert torch.equal(again.tensors()[place], part.tensors()[place])


def test_gradients_go_through_4_bit_projections_and_stop_at_them() -> None:
    """Against the same weights, dequantised: those of z and of every weight of the hypernetwork,
    among which the base's are not."""

    def gradients(lm: LanguageModel) -> dict[str, Tensor]:
        section = {"kind": "layer_prompt", "length": LENGTH, "width": 8, "rank": 3}
        hypernetwork = _hypernetwork(lm, {}, section)
        latent_TZ = torch.ones(TASKS, Z).requires_grad_()
        made = hypernetwork(latent_TZ).tensors().values()
        sum((one.square().sum() for one in made), torch.zeros(())).backward()
        assert all(parameter.grad is None for parameter in lm.module.parameters())
        named = [*hypernetwork.named_parameters(), ("z", latent_TZ)]
        return {name: one.grad for name, one in named if one.grad is not None}

    device = torch.device("cpu")
    quantised, plain = (
        load_lm("embedded", how, torch.float32, device=device).requires_grad_(False)
        for how in ("nf4", "none")
    )
    for path, linear in linears_of(quantised).items():
        plain.get_submodule(path).get_parameter("weight").copy_(weight_of(linear))
    ours, theirs = gradients(language_model(quantised)), gradients(language_model(plain))
    assert ours.keys() == theirs.keys() and len(ours) == 13
    for name, one in ours.items():
        assert float(one.abs().max()) > 0, name
        torch.testing.assert_close(one, theirs[name], rtol=1e-4, atol=1e-4)
