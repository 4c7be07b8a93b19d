"""Modules with backward passes of their own: who takes them, and that nothing else changes."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.nanochat import modeling_nanochat as nanochat
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi import modeling_phi as phi
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from ship_ds.model.lean_modules import make_lean

SIZE = 12


def _norm(kind: type[nn.Module] = LlamaRMSNorm, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    norm = kind(SIZE, eps=1e-5)
    assert isinstance(norm.weight, Tensor)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm.to(dtype)


def _results(norm: nn.Module, x: Tensor, trained: bool = True) -> list[Tensor]:
    """The output and the gradients of the input and, if trained, of the weight."""
    norm.requires_grad_(trained)
    out = norm(x)
    weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    leaves = [x, *norm.parameters()] if trained else [x]
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_output_and_gradients_are_transformers_own(
    shape: tuple[int, ...], trained: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(1)
    x = torch.randn(*shape, SIZE).mul(3).to(dtype).requires_grad_()
    theirs = _results(_norm(dtype=dtype), x, trained)
    ours = _results(make_lean(_norm(dtype=dtype)), x, trained)
    assert len(ours) == 2 + trained
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        scale = other.detach().abs().max().item()
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_input_and_a_number_a_token(dtype: torch.dtype) -> None:
    x = torch.randn(5, SIZE).to(dtype).requires_grad_()
    norm = make_lean(_norm(dtype=dtype)).requires_grad_(False)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(x)
    assert [tuple(tensor.shape) for tensor in kept] == [(5, SIZE), (SIZE,), (5, 1)]
    assert kept[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_norm_is_transformers_own(dtype: torch.dtype) -> None:
    x = torch.randn(5, SIZE).to(dtype)
    norm = make_lean(_norm(dtype=dtype))
    with torch.no_grad():
        assert norm(x).equal(_norm(dtype=dtype)(x))


@pytest.mark.parametrize(
    ("kind", "is_taken"),
    [
        (LlamaRMSNorm, True),
        (MistralRMSNorm, True),
        (Qwen2RMSNorm, True),
        (Qwen3RMSNorm, True),
        (GemmaRMSNorm, False),
        (Olmo2RMSNorm, False),
        (T5LayerNorm, False),
    ],
)
def test_is_for_those_that_compute_as_llama_does(kind: type[nn.Module], is_taken: bool) -> None:
    norm = _norm(kind)
    names = list(norm.state_dict())
    x = torch.randn(3, SIZE)
    expected = norm(x)
    make_lean(nn.Sequential(norm))
    assert (type(norm) is not kind) == is_taken
    assert isinstance(norm, kind)
    assert list(norm.state_dict()) == names
    torch.testing.assert_close(norm(x), expected)


def test_a_weight_of_another_dtype_takes_transformers_way() -> None:
    """Its result is in the wider of both."""
    x = torch.randn(3, SIZE).bfloat16().requires_grad_()
    assert make_lean(_norm())(x).dtype == torch.float32


def _mlp_results(mlp: nn.Module) -> list[Tensor]:
    """The output and the gradient of the input."""
    torch.manual_seed(1)
    x = torch.randn(2, 3, 64).bfloat16().requires_grad_()
    out = mlp(x)
    weights = torch.linspace(-1, 1, out.numel()).bfloat16().view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), [x])]


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "is_swiglu"), [("silu", True), ("gelu", False)])
def test_a_feed_forward_layer_is_taken_where_it_is_compiled(
    activation: str, is_swiglu: bool
) -> None:
    """SwiGLU alone has a backward pass of its own there, which keeps gate and up."""
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=96, hidden_act=activation
    )
    torch.manual_seed(0)
    mlp = llama.LlamaMLP(config).bfloat16().requires_grad_(False)
    theirs = _mlp_results(mlp)
    assert type(make_lean(mlp)) is llama.LlamaMLP
    assert type(make_lean(mlp, "compiled")) is not llama.LlamaMLP
    ours = _mlp_results(mlp)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * other.abs().max().item())
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(x)
    assert kept.count((3, 96)) == (2 if is_swiglu else 3)
    with torch.no_grad():
        assert mlp(x).equal(llama.LlamaMLP.forward(mlp, x))  # type: ignore[arg-type]


SHAPE = dict(
    hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=1
)


def _attention(
    family: ModuleType, name: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """An attention of a family, and what runs it on states (E, S, H)."""
    config = AutoConfig.for_model(name.lower(), **SHAPE)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    attention = getattr(family, f"{name}Attention")(config, 0).to(dtype).requires_grad_(False)
    rotary = getattr(family, f"{name}RotaryEmbedding")(config)

    def run(attention: nn.Module, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])[None]
        out = attention(x, position_embeddings=rotary(x, places), attention_mask=None)[0]
        assert isinstance(out, Tensor)
        return out

    return attention, run


@pytest.mark.parametrize(
    ("family", "name"), [(llama, "Llama"), (qwen3, "Qwen3"), (mistral, "Mistral"), (phi, "Phi")]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_an_attention_turns_its_queries_and_keys_as_before(
    family: ModuleType, name: str, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 7, 32).to(dtype).requires_grad_()
    weights = torch.randn(2, 7, 32).to(dtype)
    turn = family.apply_rotary_pos_emb
    results = []
    for make in (lambda module: module, make_lean):
        attention, run = _attention(family, name, dtype)
        out = run(make(attention), x)
        (gradient,) = torch.autograd.grad((out * weights).sum(), x)
        results.append((out, gradient))
    assert type(attention) is not getattr(family, f"{name}Attention")
    assert isinstance(attention, getattr(family, f"{name}Attention"))
    assert family.apply_rotary_pos_emb is turn
    for ours, theirs in zip(*results, strict=True):
        scale = theirs.detach().abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)
    with torch.no_grad():
        assert run(attention, x).equal(run(_attention(family, name, dtype)[0], x))


def test_turning_keeps_the_angles_alone() -> None:
    attention, run = _attention(llama, "Llama")
    lean, x = make_lean(attention), torch.randn(2, 7, 32).requires_grad_()
    nodes, seen = [run(lean, x).grad_fn], set()
    saved = []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [one for one, _ in node.next_functions]
        if node.name() == "_TurnBackward":
            saved.append([tuple(one.shape) for one in node.saved_tensors])
    assert saved == [[(1, 1, 7, 8), (1, 1, 7, 8)]] * 2


@pytest.mark.parametrize(("family", "name"), [(cohere, "Cohere"), (nanochat, "NanoChat")])
def test_an_attention_that_turns_otherwise_stays(family: ModuleType, name: str) -> None:
    """Cohere's pairs are neighbours, not halves; NanoChat's turn the other way."""
    kind = getattr(family, f"{name}Attention")
    assert type(make_lean(kind(AutoConfig.for_model(name.lower(), **SHAPE), 0))) is kind


def test_a_second_time_changes_nothing() -> None:
    model = nn.Sequential(_norm(), _attention(llama, "Llama")[0])
    kinds = [type(module) for module in make_lean(model)]
    assert [type(module) for module in make_lean(model)] == kinds
