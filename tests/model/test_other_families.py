"""Families that are built otherwise than Llama: read right, or refused in words."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from ship_ds.base_files import check_base_files
from ship_ds.config import ALL_LINEAR, base_folder
from ship_ds.errors import UserError
from ship_ds.model import decoder_only
from ship_ds.model.adapters.adapter import Adapter, Sites
from ship_ds.model.adapters.bottleneck import BottleneckAdapter
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.model.adapters.prefix import PrefixAdapter
from ship_ds.model.adapters.sites import sites_anywhere, wrap, wrap_sites
from ship_ds.model.adapters.sparse import SparseAdapter, draw_columns
from ship_ds.model.attention import SDPA
from ship_ds.model.batch import TokenBatch
from ship_ds.model.language_model import language_model
from tests.model.models import HIDDEN, VOCABULARY, random_lora, random_rows

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "attn_implementation": SDPA,
}


_NAMES = "mixtral stablelm opt gpt2 gpt_neox starcoder2 gpt_oss phi phi3 deepseek".split()
_EXPERTS_BY_PEFT = ("mixtral", "deepseek")
"""Here `peft` takes experts and routers, which are no linears, for targets besides."""


def _other(name: str) -> Any:
    torch.manual_seed(0)
    match name:
        case "mixtral":
            experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
            return MixtralForCausalLM(MixtralConfig(**_SIZES, **experts)).eval()
        case "stablelm":
            return StableLmForCausalLM(StableLmConfig(**_SIZES)).eval()
        case "opt":
            sizes = {key: _SIZES[key] for key in _SIZES if "intermediate" not in key}
            return OPTForCausalLM(
                OPTConfig(**sizes, ffn_dim=96, word_embed_proj_dim=HIDDEN, dropout=0.0)
            ).eval()
        case "gpt_neox":
            sizes = {key: _SIZES[key] for key in _SIZES if "key_value" not in key}
            return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).eval()
        case "phi":
            return PhiForCausalLM(PhiConfig(**_SIZES)).eval()
        case "phi3":  # q, k and v, and gate and up, are one linear each
            sizes = _SIZES | {"pad_token_id": 0, "sliding_window": 8}
            return Phi3ForCausalLM(Phi3Config(**sizes)).eval()
        case "starcoder2":
            return Starcoder2ForCausalLM(Starcoder2Config(**_SIZES)).eval()
        case "deepseek":  # its cache holds latents, of which a linear makes keys and values
            heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
            latents = {"q_lora_rank": 32, "kv_lora_rank": 16, "num_key_value_heads": 4}
            experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
            sizes = _SIZES | heads | latents | experts
            return DeepseekV3ForCausalLM(
                DeepseekV3Config(
                    **sizes, topk_group=1, first_k_dense_replace=1, moe_intermediate_size=32
                )
            ).eval()
        case "gpt_oss":
            experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16}
            sizes = _SIZES | {"attn_implementation": "eager"}
            return GptOssForCausalLM(GptOssConfig(**sizes, **experts, sliding_window=8)).eval()
        case _:
            sizes = {
                "vocab_size": VOCABULARY,
                "n_embd": HIDDEN,
                "n_layer": 2,
                "n_head": 4,
                "attn_implementation": SDPA,
            }
            return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).eval()


@pytest.mark.parametrize("name", _NAMES)
def test_labels_are_scored_as_the_stock_model_does(name: str) -> None:
    """In whatever layout the port takes: samples see nothing of each other."""
    model = _other(name)
    prompts, targets = random_rows([9, 4, 7]), random_rows([2, 5, 1], 5)
    lm = language_model(model)
    with torch.no_grad():
        logits_KV, _ = lm.score(TokenBatch.build(prompts, targets, 0), packed=lm.packs)
        alone = [
            model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
            for prompt, target in zip(prompts, targets, strict=True)
        ]
    torch.testing.assert_close(logits_KV, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert lm.costs.decoded_row(10, 5) > 0


def test_blocks_that_do_not_hand_on_where_a_sequence_ends_are_padded_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = language_model(_other("stablelm"))
    assert "do not hand on where a sequence ends" in str(lm.missing("packing"))
    # One that is not known by its name is met in its attention.
    monkeypatch.setattr(decoder_only, "_KEEP_ENDS_TO_THEMSELVES", frozenset())
    batch = TokenBatch.build(random_rows([9, 4]), random_rows([2, 5], 5), 0)
    with pytest.raises(UserError, match="samples would see each other"):
        lm.score(batch, packed=True)


@pytest.mark.parametrize("name", _NAMES)
def test_files_of_the_family_pass_the_preflight(name: str, tmp_path: Path) -> None:
    """With and without the sizes that a config leaves out, and with names as on the hub, where
    GPT-2's begin with no "transformer."."""
    model = _other(name)
    model.save_pretrained(tmp_path)
    for file in base_folder("embedded").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    check_base_files(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    prefix = f"{model.base_model_prefix}."
    bare = {path.removeprefix(prefix): value for path, value in weights.items()}
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    check_base_files(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": json.loads(config.read_text())["model_type"]}))
    check_base_files(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in _NAMES if name not in _EXPERTS_BY_PEFT])
def test_all_linears_of_the_blocks_are_adapted_as_peft_does(name: str) -> None:
    """The same A and B, by `peft` with target_modules="all-linear" and by us: equal logits, and
    other ones than without."""
    model = _other(name)
    prompts, targets = random_rows([6, 6]), random_rows([3, 3], 5)
    batch = TokenBatch.build(prompts, targets, 0)
    bare, _ = language_model(model).score(batch)
    theirs = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, lora_alpha=4, target_modules=ALL_LINEAR)
    )
    theirs.eval()
    sites = wrap_sites(model, (ALL_LINEAR,))
    factors = {}
    for path, (inputs, outputs) in sites.items():
        a_RI, b_OR = torch.randn(2, inputs) / 8, torch.randn(outputs, 2) / 8
        layer: Any = theirs.base_model.model.get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(a_RI)
        layer.lora_B["default"].weight.data.copy_(b_OR)
        factors[path] = (a_RI[None], b_OR[None])
    modules = theirs.base_model.model.named_modules()
    assert {path for path, module in modules if hasattr(module, "lora_A")} == set(sites)
    with torch.no_grad():
        ours_KV, _ = language_model(model).score(batch, LoraAdapter(factors, 2.0))
        alone = [
            theirs(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
            for prompt, target in zip(prompts, targets, strict=True)
        ]
    torch.testing.assert_close(ours_KV, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert (ours_KV - bare).abs().max() > 0.01


def _random_adapter(kind: str, sites: Sites, num_tasks: int) -> Adapter:
    if kind == "lora":
        return random_lora(sites, num_tasks)
    if kind == "bottleneck":
        return BottleneckAdapter(random_lora({p: (o, o) for p, (_, o) in sites.items()}, num_tasks))
    columns = {path: draw_columns(path, size, 2 * size[1]) for path, size in sites.items()}
    generator = torch.Generator().manual_seed(1)
    values = {
        path: 0.2 * torch.randn(num_tasks, *one.shape, generator=generator)
        for path, one in columns.items()
    }
    return SparseAdapter(values, columns)


@pytest.mark.parametrize("kind", ["lora", "sparse", "bottleneck"])
@torch.no_grad()
def test_rows_leave_and_join_where_a_linear_reads_the_whole_cache(kind: str) -> None:
    """Tasks with unequally many rows, each of which is read as under its own adapter alone."""
    model = _other("deepseek")
    sites = wrap_sites(model, (ALL_LINEAR,))
    assert any("kv_b_proj" in path for path in sites)
    lm, adapter = language_model(model), _random_adapter(kind, sites, 2)
    texts = random_rows([6, 9, 7, 8, 5, 4])
    stream = lm.stream(TokenBatch.build(texts[:4], None, 0), adapter)
    stream.reserve(6)
    tasks = [0, 0, 1, 1, 0, 1]
    rows = [0, 1, 2, 3]

    def check() -> None:
        for row, logits_V in zip(rows, stream.logits_EV, strict=True):
            one = adapter.rows(torch.tensor([tasks[row]]))
            alone = lm.logits(TokenBatch.build([texts[row]], None, 0), one)
            torch.testing.assert_close(logits_V, alone[0, -1], rtol=1e-4, atol=1e-4)

    def advance() -> None:
        next_E = stream.logits_EV.argmax(-1)
        for row, token in zip(rows, next_E.tolist(), strict=True):
            texts[row].append(token)
        stream.advance(next_E)
        check()

    advance()
    stream.select([0, 2, 3])
    rows = [0, 2, 3]
    advance()
    advance()
    assert stream.join(lm.stream(TokenBatch.build(texts[4:], None, 0), adapter))
    rows = [0, 2, 3, 4, 5]
    advance()


def _hybrid(name: str) -> Any:
    """Blocks that keep states which are no keys and values, beside such as keep both or these."""
    torch.manual_seed(0)
    two = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
    match name:
        case "qwen3_next":
            heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
            sizes = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
            experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
            given = _SIZES | two | heads | sizes | experts
            return Qwen3NextForCausalLM(
                Qwen3NextConfig(**given, shared_expert_intermediate_size=32)
            ).eval()
        case "lfm2":
            kinds = {"layer_types": ["conv", "full_attention"]}
            return Lfm2ForCausalLM(Lfm2Config(**_SIZES, **kinds)).eval()
        case _:
            kinds = {"layers_block_type": ["linear_attention", "hybrid"]}
            mamba = {"mamba_d_state": 16, "n_mamba_heads": 8, "num_mem_blocks": 1, "chunk_size": 8}
            return Zamba2ForCausalLM(Zamba2Config(**_SIZES, **kinds, **mamba)).eval()


def test_a_prefix_for_keys_and_values_of_two_sizes_is_refused() -> None:
    reason = language_model(_other("deepseek")).missing("prefix")
    assert reason is not None and "such as lora" in reason and "\n" not in reason


@pytest.mark.parametrize("targets", [(), (ALL_LINEAR,)])
def test_a_cache_of_latents_is_counted_as_what_it_holds(targets: tuple[str, ...]) -> None:
    """Also where what makes keys and values of them is adapted."""
    model = _other("deepseek")
    wrap_sites(model, targets)
    lm = language_model(model)
    stream = lm.stream(TokenBatch.build(random_rows([6]), None, 0))
    held = sum(one.nbytes for layer in stream.cache.layers for one in layer.buffers)  # type: ignore[attr-defined]
    assert 6 * lm.costs.cache == held


def test_rows_of_a_prefix_are_counted_behind_what_gemma_3n_puts_before_them() -> None:
    """Its blocks get four versions of the states, whatever the rows."""
    torch.manual_seed(0)
    wide = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
    kinds = {"layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 0, "head_dim": 16}
    sizes = {**_SIZES, **wide, **kinds, "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 4}
    model = Gemma3nForCausalLM(Gemma3nTextConfig(**sizes)).eval()
    wrap_sites(model, ())
    lm = language_model(model)
    num_heads, head_size = lm.key_value_heads
    states = {path: torch.randn(2, 2, num_heads, 3, head_size) for path in lm.attentions()}
    adapter, rows = PrefixAdapter(states), random_rows([6, 6])
    with torch.no_grad():
        both = lm.logits(TokenBatch.build(rows, None, 0), adapter)
        for task, row in enumerate(rows):
            one = adapter.rows(torch.tensor([task]))
            alone = lm.logits(TokenBatch.build([row], None, 0), one)
            torch.testing.assert_close(both[task], alone[0], rtol=1e-4, atol=1e-4)
        bare = lm.logits(TokenBatch.build(rows, None, 0))
    assert float((both - bare).abs().max()) > 0.01


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "zamba2"])
@torch.no_grad()
def test_rows_of_a_hybrid_take_all_of_their_states_along(name: str) -> None:
    """Repeated, turned around and fewer, as beams and rows that end go; each is as if it had grown
    alone."""
    lm, prompts = language_model(_hybrid(name)), random_rows([6, 6, 6])
    stream = lm.stream(TokenBatch.build(prompts, None, 0))
    texts = prompts
    for step, rows in enumerate(([0, 0, 1, 1, 2, 2], [1, 0, 3, 2, 5, 5], [4, 1, 0, 2], [3])):
        stream.select(rows)
        texts = [[*texts[row], 10 + 7 * step + e] for e, row in enumerate(rows)]
        stream.advance(torch.tensor([text[-1] for text in texts]))
        for text, logits_V in zip(texts, stream.logits_EV, strict=True):
            alone = lm.stream(TokenBatch.build([text[:6]], None, 0))
            for token in text[6:]:
                alone.advance(torch.tensor([token]))
            torch.testing.assert_close(logits_V, alone.logits_EV[0], rtol=1e-4, atol=1e-4)


_EXPERTS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
}
_MAMBA = {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
_MAMBA_OF_NEMOTRON = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16}
_LOOKED_AT: dict[str, dict[str, Any]] = {
    # Its prefix is no attribute.
    "llama4_text": _EXPERTS | {"head_dim": 16, "intermediate_size_mlp": 96},
    # Its forward looks at its stack.
    "falcon_h1": _MAMBA | {"head_dim": 16, "mamba_n_groups": 1, "lm_head_multiplier": 0.5},
    # Its stack looks at its blocks.
    "nemotron_h": _EXPERTS
    | _MAMBA_OF_NEMOTRON
    | {"head_dim": 16, "n_groups": 1, "chunk_size": 8}
    | {"layers_block_type": ["linear_attention", "full_attention"]},
    # Its stack calls its blocks by name.
    "longcat_flash": {
        **{"num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "moe_topk": 2},
        **{"q_lora_rank": 32, "kv_lora_rank": 16, "num_key_value_heads": 4, "head_dim": 8},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12},
        **{"n_routed_experts": 4, "zero_expert_num": 1},
    },
    # Its router is a linear that gives two tensors, and its windows are in the mask alone.
    "phimoe": _EXPERTS | {"sliding_window": 4},
}


@pytest.mark.parametrize("kind", _LOOKED_AT)
def test_models_that_look_at_their_parts_are_adapted(kind: str) -> None:
    """All linears, in padded rows and packed where the port packs; each row as alone, and other
    than the bare base."""
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    config = AutoConfig.for_model(kind, **{**_SIZES, **ends, **_LOOKED_AT[kind]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=SDPA).eval()
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.15)
    prompts, targets = random_rows([9, 4, 7, 5]), random_rows([2, 5, 1, 3], 5)
    batch = TokenBatch.build(prompts, targets, 0)
    sites = wrap_sites_of(model)
    lm = language_model(model)
    adapter = random_lora(sites, 2)
    with torch.no_grad():
        padded = lm.score(batch, adapter, 2)[0]
        bare = lm.score(batch, None)[0]
        rows = [
            lm.score(TokenBatch.build([prompt], [target], 0), adapter.rows(torch.tensor([e // 2])))
            for e, (prompt, target) in enumerate(zip(prompts, targets, strict=True))
        ]
        alone = torch.cat([logits for logits, _ in rows])
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)
        if lm.packs:
            packed = lm.score(batch, adapter, 2, packed=True)[0]
            torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
        stream = lm.stream(TokenBatch.build(prompts, None, 0), adapter)
        stream.advance(stream.logits_EV.argmax(-1))
    assert lm.packs == (kind == "longcat_flash")
    assert float((padded - bare).abs().max()) > 0.01 and stream.logits_EV.isfinite().all()


def wrap_sites_of(model: Any) -> Sites:
    """All linears that blocks have, which here are not the same in each."""
    sites = sites_anywhere(model, (ALL_LINEAR,))
    wrap(model, sites)
    return sites
