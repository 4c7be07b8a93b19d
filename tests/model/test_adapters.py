"""Adapters as explicit values: applied per row, seen again by a recomputation, nothing left
behind."""

import pytest
import torch
from torch import Tensor, nn
from transformers import JambaConfig, JambaForCausalLM

from ship_ds.config import ALL_LINEAR
from ship_ds.errors import UserError
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.model.adapters.sites import AdaptedLinear, wrap_sites
from ship_ds.model.adapters.soft_prompt import SoftPrompt
from ship_ds.model.attention import Prefix
from ship_ds.model.batch import TokenBatch
from tests.model.models import HIDDEN, label_logits, random_lora, random_rows, tiny_lm

TARGETS = ("q_proj", "v_proj", "down_proj")


def _batch(num_virtual: int = 0, seed: int = 2) -> TokenBatch:
    return TokenBatch.build(
        random_rows([5, 3, 6, 4], seed), random_rows([2, 4, 1, 3], seed + 1), 0, num_virtual
    )


def _lora_pair(sites: dict[str, tuple[int, int]]) -> list[tuple[Adapter, list[Tensor]]]:
    adapters = [random_lora(sites, 2, seed=seed) for seed in (1, 2)]
    return [
        (adapter, [tensor for pair in adapter.factors.values() for tensor in pair])
        for adapter in adapters
    ]


def _prompt_pair(sites: dict[str, tuple[int, int]]) -> list[tuple[Adapter, list[Tensor]]]:
    torch.manual_seed(3)
    prompts = [torch.randn(2, 3, HIDDEN, requires_grad=True) for _ in range(2)]
    return [(SoftPrompt(prompt), [prompt]) for prompt in prompts]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["lora", "soft_prompt"])
def test_two_forwards_then_two_backwards_with_checkpointing(kind: str, packed: bool) -> None:
    """Recomputation must see the adapter of its own forward, not the last one that was current."""
    gradients: dict[bool, list[Tensor]] = {}
    for checkpointing in (False, True):
        model = tiny_lm("llama").requires_grad_(False)
        sites = wrap_sites(model, TARGETS)
        pairs = _lora_pair(sites) if kind == "lora" else _prompt_pair(sites)
        num_virtual = 0 if kind == "lora" else 3
        losses = []
        for (adapter, _), seed in zip(pairs, (2, 7), strict=True):
            tokens = adapter.virtual_tokens()
            soft = None if tokens is None else tokens.repeat_interleave(2, 0)
            logits, labels = label_logits(
                model,
                _batch(num_virtual, seed),
                soft,
                adapter,
                packed=packed,
                checkpointing=checkpointing,
                num_tasks=2,
            )
            losses.append(nn.functional.cross_entropy(logits, labels))
        for loss in losses:
            loss.backward()
        gradients[checkpointing] = [
            tensor.grad for _, leaves in pairs for tensor in leaves if tensor.grad is not None
        ]
        assert len(gradients[checkpointing]) == sum(len(leaves) for _, leaves in pairs)
    for plain, recomputed in zip(gradients[False], gradients[True], strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, recomputed)


def test_checkpointing_recomputes_every_block() -> None:
    model = tiny_lm("llama").requires_grad_(False)
    sites = wrap_sites(model, TARGETS)
    calls = []
    for block in model.model.layers:
        block.block.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    logits, _ = label_logits(
        model, _batch(), adapter=random_lora(sites, 2), checkpointing=True, num_tasks=2
    )
    assert len(calls) == 2
    logits.sum().backward()
    assert len(calls) == 4


def test_no_adapter_stays_current_after_a_forward_that_raised() -> None:
    model = tiny_lm("llama")
    sites = wrap_sites(model, TARGETS)
    with pytest.raises(RuntimeError):
        # 4 rows cannot belong to 3 tasks
        label_logits(model, _batch(), adapter=random_lora(sites, 3), num_tasks=3)
    assert all(
        module.adapter is None for module in model.modules() if isinstance(module, AdaptedLinear)
    )


def test_no_adapter_stays_current_after_a_prefix_that_found_no_memory() -> None:
    class Greedy(LoraAdapter):
        """A LoRA whose prefix takes more than there is."""

        def prefix(self, path: str, num_rows: int) -> Prefix | None:
            raise torch.OutOfMemoryError("out of memory")

    model = tiny_lm("llama")
    lora = random_lora(wrap_sites(model, TARGETS), 1)
    with pytest.raises(torch.OutOfMemoryError):
        label_logits(model, _batch(), adapter=Greedy(lora.factors, lora.scaling))
    assert not [one for one in model.modules() if getattr(one, "adapter", None) is not None]


def test_every_linear_of_a_jamba_that_is_adapted_has_a_part_in_its_answers() -> None:
    """Its state-space layers read the weight of `dt_proj` and never call it: an adapter there would
    do nothing, and something else once it was merged."""
    sizes = {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 1, "mamba_dt_rank": 8}
    experts = {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2}
    model = JambaForCausalLM(
        JambaConfig(
            **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "pad_token_id": 0},
            **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts_per_tok": 1},
            **experts,
            **sizes,
        )
    ).requires_grad_(False)
    sites = wrap_sites(model, (ALL_LINEAR,))
    assert "model.layers.0.mamba.x_proj" in sites
    adapter = random_lora(sites, 1)
    for factors in adapter.factors.values():
        for factor in factors:
            factor.requires_grad_()
    model(input_ids=torch.arange(1, 9)[None], ship_adapter=adapter).logits.square().sum().backward()
    for path, factors in adapter.factors.items():
        for factor in factors:
            assert factor.grad is not None and factor.grad.abs().max() > 0, path


def test_rows_of_tasks_answer_as_each_task_alone() -> None:
    model = tiny_lm("llama")
    adapter = random_lora(wrap_sites(model, TARGETS), 2)
    both, _ = label_logits(model, _batch(), adapter=adapter, num_tasks=2)
    prompts, targets = random_rows([5, 3, 6, 4], 2), random_rows([2, 4, 1, 3], 3)
    for task, rows in enumerate((slice(0, 2), slice(2, 4))):
        alone, _ = label_logits(
            model,
            TokenBatch.build(prompts[rows], targets[rows], 0),
            adapter=adapter.rows(torch.tensor([task])),
        )
        torch.testing.assert_close(
            both[slice(0, 6) if task == 0 else slice(6, 10)], alone, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("index", [[0, 0, 1, 1], [1, 0], [1]])
def test_rows_expand_reorder_and_compact(index: list[int]) -> None:
    chosen = torch.tensor(index)
    lora = random_lora({"a": (4, 6)}, 2).over(torch.tensor([3, 5], dtype=torch.int32))
    picked = lora.rows(chosen)
    x = torch.randn(len(index), 5, 4)
    a_TRI, b_TOR = lora.factors["a"]
    expected = torch.stack(
        [2.0 * row @ a_TRI[t].T @ b_TOR[t].T for row, t in zip(x, index, strict=True)]
    )
    delta = picked.delta("a", x)
    assert delta is not None and picked.delta("another", x) is None
    torch.testing.assert_close(delta, expected)
    prompt = torch.randn(2, 3, HIDDEN)
    torch.testing.assert_close(SoftPrompt(prompt).rows(chosen).virtual_tokens(), prompt[chosen])


def test_zero_b_is_the_base_model() -> None:
    model, stock = tiny_lm("llama"), tiny_lm("llama")
    sites = wrap_sites(model, TARGETS)
    adapter = random_lora(sites, 2)
    silent = LoraAdapter(
        {path: (a, torch.zeros_like(b)) for path, (a, b) in adapter.factors.items()}, 2.0
    )
    base, _ = label_logits(stock, _batch())
    assert torch.equal(label_logits(model, _batch(), adapter=silent, num_tasks=2)[0], base)
    assert not torch.allclose(
        label_logits(model, _batch(), adapter=adapter, num_tasks=2)[0], base, atol=1e-2
    )


def test_sites_are_keyed_by_module_path_with_their_shapes() -> None:
    sites = wrap_sites(tiny_lm("llama"), ("k_proj", "down_proj"))
    assert sites == {
        f"model.layers.{layer}.{name}": shape
        for layer in (0, 1)
        for name, shape in (("self_attn.k_proj", (HIDDEN, 32)), ("mlp.down_proj", (128, HIDDEN)))
    }


def test_missing_target_is_named_and_nothing_is_wrapped() -> None:
    model = tiny_lm("llama")
    with pytest.raises(
        UserError, match="'c_attn'; its blocks have down_proj, gate_proj, k_proj"
    ) as error:
        wrap_sites(model, ("q_proj", "c_attn"))
    assert "\n" not in str(error.value)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
