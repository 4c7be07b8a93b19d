"""Every kind of head: the base model at step 0, shapes, gradients, sizes; soft prompts and the
reshaped z."""

from typing import Any

import pytest
import torch

from ship_ds.config import (
    LoraHypernetworkConfig,
    ReshapeHypernetworkConfig,
    SoftPromptHypernetworkConfig,
)
from ship_ds.errors import UserError
from ship_ds.model.adapters.adapter import Target, build_hypernetwork
from ship_ds.model.adapters.lora import LoraAdapter, LoraHypernetwork
from ship_ds.model.adapters.sites import wrap_sites
from ship_ds.model.batch import TokenBatch
from tests.model.models import label_logits, random_rows, tiny_lm

Z, WIDTH, RANK = 6, 16, 4
GENERATED = ("per_module", "per_layer", "per_rank")
LEARNED = ("diagonal", "square")
"""Heads with an A and a B that are the same for all tasks."""
KINDS = (*GENERATED, *LEARNED)
SITES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(3)
    for name, shape in (
        ("attn.q", (8, 8)),
        ("attn.k", (8, 4)),
        ("mlp.up", (8, 12)),
        ("mlp.gate", (8, 12)),
    )
}


def _hypernetwork(
    heads: Any, sites: dict[str, tuple[int, int]] = SITES, zero: Any = "b"
) -> LoraHypernetwork:
    torch.manual_seed(0)
    config = LoraHypernetworkConfig(
        rank=RANK, alpha=8, width=WIDTH, heads=heads, starts_at_zero=zero
    )
    return LoraHypernetwork(config, Z, Target(sites, 64))


def _latent(num_tasks: int = 2) -> torch.Tensor:
    return torch.randn(num_tasks, Z, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("heads", KINDS)
def test_every_site_gets_factors_of_its_shape_and_b_is_exactly_zero(heads: str) -> None:
    adapter = _hypernetwork(heads)(_latent())
    assert list(adapter.factors) and set(adapter.factors) == set(SITES) and adapter.scaling == 2.0
    for path, (num_in, num_out) in SITES.items():
        a, b = adapter.factors[path]
        assert a.shape == (2, RANK, num_in) and b.shape == (2, num_out, RANK)
        assert not b.any()


@pytest.mark.parametrize("heads", KINDS)
def test_a_starts_as_in_peft(heads: str) -> None:
    """Uniform in +-1/sqrt(in): standard deviation 1/sqrt(3 in); full rank from the start."""
    sites = {f"model.layers.{i}.m": (64, 8) for i in range(8)}
    a = torch.stack([a for a, _ in _hypernetwork(heads, sites)(_latent()).factors.values()])
    assert float(a.detach().std()) == pytest.approx((3 * 64) ** -0.5, rel=0.25)
    assert torch.linalg.matrix_rank(a, rtol=0.05).unique().tolist() == [RANK]


@pytest.mark.parametrize("heads", GENERATED)
def test_the_other_start_has_a_at_zero_and_b_as_peft_draws_its_weights(heads: str) -> None:
    """Uniform in +-1/sqrt(R), R being the inputs of B; and A's numbers learn, B's not yet."""
    sites = {f"model.layers.{i}.m": (8, 64) for i in range(8)}
    hypernetwork = _hypernetwork(heads, sites, "a")
    factors = hypernetwork(_latent()).factors
    assert not any(a.any() for a, _ in factors.values())
    b = torch.stack([b for _, b in factors.values()])
    assert float(b.detach().std()) == pytest.approx((3 * RANK) ** -0.5, rel=0.25)
    assert torch.linalg.matrix_rank(b, rtol=0.05).unique().tolist() == [RANK]
    sum((b @ a).sum() for a, b in factors.values()).backward()
    learns = {
        name.split(".")[-2]: bool(parameter.grad.any())
        for name, parameter in hypernetwork.heads.named_parameters()
        if parameter.grad is not None and name.endswith("weight")
    }
    assert learns["to_a"] and not learns["to_b"]


@pytest.mark.parametrize("heads", LEARNED)
def test_learned_factors_have_no_other_start(heads: Any) -> None:
    with pytest.raises(ValueError, match="starts_at_zero=a is for heads that make A and B of z"):
        LoraHypernetworkConfig(heads=heads, starts_at_zero="a")


@pytest.mark.parametrize("heads", KINDS)
def test_step_0_is_the_base_model(heads: str) -> None:
    model = tiny_lm("llama")
    hypernetwork = _hypernetwork(heads, wrap_sites(model, ("q_proj", "k_proj", "down_proj")))
    batch = TokenBatch.build(random_rows([5, 3, 6, 4]), random_rows([2, 4, 1, 3], 3), 0)
    base, _ = label_logits(tiny_lm("llama"), batch)
    assert torch.equal(
        label_logits(model, batch, adapter=hypernetwork(_latent()), num_tasks=2)[0], base
    )


def _awake(hypernetwork: LoraHypernetwork) -> LoraHypernetwork:
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in hypernetwork.named_parameters():
            if "to_b" in name or "to_core" in name:
                parameter.normal_(std=0.3)
    return hypernetwork


@pytest.mark.parametrize("heads", GENERATED)
def test_z_the_layer_the_module_and_the_rank_all_matter(heads: str) -> None:
    factors = _awake(_hypernetwork(heads))(_latent()).factors
    for part in (0, 1):
        q0, q1 = factors["model.layers.0.attn.q"][part], factors["model.layers.1.attn.q"][part]
        up, gate = factors["model.layers.0.mlp.up"][part], factors["model.layers.0.mlp.gate"][part]
        ranks = q0.transpose(1, 2) if part else q0
        for left, right in ((q0[0], q0[1]), (q0, q1), (up, gate), (ranks[:, 0], ranks[:, 1])):
            assert not torch.allclose(left, right, atol=1e-3)
    shift = factors["model.layers.0.attn.q"][1][0] - factors["model.layers.0.attn.q"][1][1]
    assert torch.linalg.matrix_rank(shift, rtol=1e-3) > 1, (
        "the ranks of B must depend on z each in its own way"
    )


@pytest.mark.parametrize(("heads", "core_size"), [("diagonal", RANK), ("square", RANK * RANK)])
def test_z_makes_what_stands_between_a_learned_a_and_b(heads: str, core_size: int) -> None:
    """B core A, the core of each task and site made by one linear of the trunk's features."""
    hypernetwork = _awake(_hypernetwork(heads))
    seen: list[tuple[torch.Tensor, ...]] = []
    for head in hypernetwork.heads:
        head.to_core.register_forward_hook(  # type: ignore[union-attr,operator]
            lambda _, inputs, output: seen.append((*inputs, output))
        )
    factors = hypernetwork(_latent()).factors
    for head, (_, core_TJX) in zip(hypernetwork.heads, seen, strict=True):
        assert core_TJX.shape[2] == core_size
        for place, path in enumerate(head.paths):  # type: ignore[arg-type]
            a_TRI, b_TOR = factors[path]
            a_RI = head.a.weight[place].view(RANK, -1)  # type: ignore[union-attr,index,operator]
            b_OR = head.b.weight[place].view(-1, RANK)  # type: ignore[union-attr,index,operator]
            for task, core in enumerate(core_TJX[:, place]):
                square = core.diag() if heads == "diagonal" else core.view(RANK, RANK)
                torch.testing.assert_close(b_TOR[task] @ a_TRI[task], b_OR @ square @ a_RI)
            assert not torch.allclose(b_TOR[0], b_TOR[1], atol=1e-3)


@pytest.mark.parametrize("heads", KINDS)
def test_gradients_reach_every_parameter_and_z(heads: str) -> None:
    hypernetwork, latent = _awake(_hypernetwork(heads)), _latent().requires_grad_()
    adapter = hypernetwork(latent)
    x = torch.randn(2, 5, 8)
    total = torch.stack([adapter.delta(path, x).square().sum() for path in SITES]).sum()
    total.backward()
    for name, parameter in [("z", latent), *hypernetwork.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_a_normalised_latent_cannot_hide_the_places() -> None:
    """How far the A of two sites of one shape differ, by how far those of one site are from zero:
    under a z a thousand times as large they become one, unless what z adds is normalised."""

    def apart(normalises: bool, scale: float) -> float:
        torch.manual_seed(0)
        config = LoraHypernetworkConfig(rank=RANK, width=WIDTH, normalises_latent=normalises)
        hypernetwork = LoraHypernetwork(config, Z, Target(SITES, 64))
        for head in hypernetwork.heads:
            head.to_a.bias.zero_()  # type: ignore[union-attr,operator]
        factors = hypernetwork(scale * _latent()).factors
        (up, _), (gate, _) = (factors[f"model.layers.1.mlp.{name}"] for name in ("up", "gate"))
        return float((up - gate).norm() / up.norm())

    assert apart(False, 1) > 0.3 and apart(False, 1000) < 0.01
    assert apart(True, 1) > 0.3 and apart(True, 1000) == pytest.approx(apart(True, 1), rel=0.5)


def test_state_names_of_the_default() -> None:
    """Bundles hold them."""
    names = {name.rpartition(".")[0] for name in _hypernetwork("per_module").state_dict()}
    assert names == {
        "from_latent",
        "trunk.1",
        "trunk.3",
        "norm",
        *(f"site_embeddings.{i}" for i in range(3)),
        *(f"heads.{i}.{part}" for i in range(3) for part in ("to_a", "to_b")),
    }


def test_head_sizes_by_hand() -> None:
    """Shapes (8, 8), (8, 4) and (8, 12), twice a layer the last; every linear has width + 1 weights
    an output."""
    sizes = {
        heads: sum(
            p.numel() for module in _hypernetwork(heads).head_modules() for p in module.parameters()
        )
        for heads in GENERATED
    }
    one_of_each = (8 + 8) + (8 + 4) + (8 + 12)
    assert sizes == {
        "per_module": (WIDTH + 1) * RANK * one_of_each,
        "per_layer": 3 * (WIDTH + 1) * RANK * (one_of_each + 8 + 12),
        "per_rank": (WIDTH + 1) * one_of_each + 3 * RANK * WIDTH,
    }


@pytest.mark.parametrize("heads", LEARNED)
def test_a_core_of_random_numbers_makes_a_b_as_large(heads: str) -> None:
    """Then B moves as fast as one that is generated: Adam moves every number as far."""
    config = LoraHypernetworkConfig(rank=16, width=WIDTH, heads=heads)  # type: ignore[arg-type]
    hypernetwork = LoraHypernetwork(config, Z, Target({"model.layers.0.m": (8, 64)}, 64))
    (head,) = hypernetwork.heads
    core_TJX = torch.randn(40, 1, head.to_core.out_features)  # type: ignore[union-attr,arg-type]
    b_JOR = head.b.weight.view(1, 64, 16)  # type: ignore[union-attr,operator]
    b_TJOR = head.times_core(b_JOR, core_TJX)  # type: ignore[operator]
    assert float(b_TJOR.detach().std()) == pytest.approx(1.0, rel=0.1)


def test_sizes_of_heads_with_learned_factors_by_hand() -> None:
    """Every site's own A and B, and one linear for each of the three shapes."""
    for heads, core_size in (("diagonal", RANK), ("square", RANK * RANK)):
        size = sum(p.numel() for head in _hypernetwork(heads).heads for p in head.parameters())
        of_sites = RANK * sum(num_in + num_out for num_in, num_out in SITES.values())
        assert size == of_sites + 3 * (WIDTH + 1) * core_size


def test_a_decomposed_soft_prompt_is_of_the_rank_it_says() -> None:
    config = SoftPromptHypernetworkConfig(num_virtual_tokens=5, width=8, rank=2)
    hypernetwork = build_hypernetwork(config, Z, Target({}, 10))
    tokens = hypernetwork(_latent()).virtual_tokens()
    assert tokens is not None and tokens.shape == (2, 5, 10)
    assert torch.linalg.matrix_rank(tokens).tolist() == [2, 2]
    # One row space for all tasks: the learned matrix's.
    assert torch.linalg.matrix_rank(tokens.flatten(0, 1)) == 2
    weights = {name: parameter.shape for name, parameter in hypernetwork.named_parameters()}
    assert weights["layers.2.weight"] == (5 * 2, 8) and weights["basis.weight"] == (10, 2)
    assert hypernetwork.num_products() == Z * 8 + 8 * 5 * 2 + 5 * 2 * 10
    tokens.sum().backward()
    assert all(parameter.grad is not None for parameter in hypernetwork.parameters())
    wide = SoftPromptHypernetworkConfig(num_virtual_tokens=5, width=8, rank=16)
    basis = dict(build_hypernetwork(wide, Z, Target({}, 64)).named_parameters())["basis.weight"]
    # Sums of 16 products are then as large as what they are made of.
    assert float(basis.detach().std()) == pytest.approx(1 / 4, rel=0.1)


def test_soft_prompt_shape_and_gradient() -> None:
    hypernetwork = build_hypernetwork(
        SoftPromptHypernetworkConfig(num_virtual_tokens=3, width=8), Z, Target({}, 10)
    )
    tokens = hypernetwork(_latent()).virtual_tokens()
    assert (
        tokens is not None and tokens.shape == (2, 3, 10) and hypernetwork.num_virtual_tokens == 3
    )
    tokens.sum().backward()
    assert all(parameter.grad is not None for parameter in hypernetwork.parameters())


def test_reshape_is_z_itself() -> None:
    hypernetwork = build_hypernetwork(
        ReshapeHypernetworkConfig(num_virtual_tokens=3), Z, Target({}, 2)
    )
    latent = _latent()
    tokens = hypernetwork(latent).virtual_tokens()
    assert (
        tokens is not None
        and torch.equal(tokens, latent.view(2, 3, 2))
        and not list(hypernetwork.parameters())
    )
    with pytest.raises(
        UserError, match=r"\(3\) x the base's hidden size \(4\) is 12, and model.latent_size is 6"
    ):
        build_hypernetwork(ReshapeHypernetworkConfig(num_virtual_tokens=3), Z, Target({}, 4))


def test_takes_z_in_another_dtype() -> None:
    """Under a bf16 engine the posterior's z stays fp32."""
    for heads in KINDS:
        adapter = _hypernetwork(heads).bfloat16()(_latent())
        assert isinstance(adapter, LoraAdapter)
        assert {a.dtype for a, _ in adapter.factors.values()} == {torch.bfloat16}
