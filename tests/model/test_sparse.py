"""Sparse deltas: which weights move, and that their product is that of the whole matrix."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ship_ds.config import ModelConfig, ScatterHypernetworkConfig, SparseHypernetworkConfig
from ship_ds.errors import UserError
from ship_ds.model import assemble
from ship_ds.model.adapters import sparse
from ship_ds.model.adapters.adapter import Target
from ship_ds.model.adapters.sites import sites_in_each_block, wrap
from ship_ds.model.adapters.sparse import (
    ScatterHypernetwork,
    SparseAdapter,
    SparseHypernetwork,
    draw_columns,
    laid_out,
    places_of,
    sites_of_last_blocks,
    weights_per_site,
)
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.batch import TokenBatch
from ship_ds.model.language_model import language_model
from tests.model.models import random_rows, tiny_lm, tiny_t5

TASKS, SIZE, COUNT = 3, (24, 16), 37
"""37 weights: two of every output, and three of the first five."""


def _adapter(dtype: torch.dtype = torch.float32) -> SparseAdapter:
    values_TX = torch.randn(TASKS, COUNT, generator=torch.Generator().manual_seed(1))
    values_TXO = laid_out(values_TX.to(dtype), SIZE[1])
    return SparseAdapter({"a": values_TXO}, {"a": draw_columns("a", SIZE, COUNT)})


def _whole(values_TXO: Tensor) -> Tensor:
    """(T, O, I), by indexing."""
    values_TX = values_TXO.flatten(1)[:, :COUNT]
    output_X, input_X = places_of(draw_columns("a", SIZE, COUNT), COUNT)
    whole_TOI = torch.zeros(TASKS, SIZE[1], SIZE[0], dtype=values_TX.dtype)
    return whole_TOI.index_put((torch.arange(TASKS)[:, None], output_X, input_X), values_TX)


EQUAL, RAGGED = [4, 8, 12], [5, 5, 12]


@pytest.mark.parametrize("at_once", [2**25, TASKS * SIZE[0] * 8], ids=["at once", "two pieces"])
@pytest.mark.parametrize("ends", [EQUAL, RAGGED], ids=["equal", "ragged"])
def test_the_product_and_its_gradients_are_those_of_whole_matrices(
    ends: list[int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "_AT_ONCE", at_once)
    x_NI = torch.randn(12, SIZE[0], generator=torch.Generator().manual_seed(2))
    weight_NO = torch.randn(12, SIZE[1], generator=torch.Generator().manual_seed(3))
    task_N = torch.searchsorted(torch.tensor(ends), torch.arange(12), right=True)

    def gradients(delta: Callable[[SparseAdapter, Tensor], Tensor]) -> tuple[Tensor, ...]:
        adapter, x = _adapter(), x_NI.clone().requires_grad_()
        values_TXO = adapter.values["a"].requires_grad_()
        out_NO = delta(adapter, x)
        (out_NO * weight_NO).sum().backward()
        assert x.grad is not None and values_TXO.grad is not None
        return out_NO.detach(), x.grad, values_TXO.grad.flatten(1)[:, :COUNT]

    def ours(adapter: SparseAdapter, x: Tensor) -> Tensor:
        offsets = None if ends is EQUAL else torch.tensor(ends, dtype=torch.int32)
        added = adapter.over(offsets).delta("a", x[None])
        assert added is not None and adapter.delta("b", x) is None
        return added[0]

    def theirs(adapter: SparseAdapter, x: Tensor) -> Tensor:
        return torch.einsum("ni,noi->no", x, _whole(adapter.values["a"])[task_N])

    for mine, wanted in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ends", [None, [1, 1, 3]], ids=["equal", "ragged"])
def test_few_tokens_pick_their_weights(
    ends: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token a task, or of a task that has none, without gradients; no matrix is written out."""
    x_NI = torch.randn(3, SIZE[0], generator=torch.Generator().manual_seed(2))
    adapter = _adapter().over(None if ends is None else torch.tensor(ends, dtype=torch.int32))
    whole_TOI = _whole(adapter.values["a"])[torch.tensor([0, 1, 2] if ends is None else [0, 2, 2])]
    wanted_NO = torch.einsum("ni,noi->no", x_NI, whole_TOI)
    with_gradient = adapter.delta("a", x_NI)
    monkeypatch.setattr(sparse, "_written_out", None)
    with torch.no_grad():
        picked = adapter.delta("a", x_NI)
    torch.testing.assert_close(picked, wanted_NO, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(with_gradient, wanted_NO, atol=1e-5, rtol=1e-5)


def test_in_16_bits_a_sum_is_rounded_once() -> None:
    adapter, x_NI = _adapter(torch.bfloat16), torch.randn(12, SIZE[0]).bfloat16()
    added = adapter.delta("a", x_NI)
    whole_TOI = _whole(adapter.values["a"].float())
    wanted = torch.bmm(x_NI.float().view(TASKS, 4, -1), whole_TOI.mT).flatten(0, 1)
    assert added is not None and added.dtype == torch.bfloat16
    torch.testing.assert_close(added, wanted.bfloat16(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("size", [(24, 16), (16, 24), (7, 7), (64, 3)])
def test_places_are_spread_evenly_and_none_comes_twice(size: tuple[int, int]) -> None:
    num_in, num_out = size
    for count in (1, num_out + 2, num_in * num_out):
        output_X, input_X = places_of(draw_columns("a.b", size, count), count)
        assert len((output_X * num_in + input_X).unique()) == count
        for place_X, number in ((output_X, num_out), (input_X, num_in)):
            of_each = torch.bincount(place_X, minlength=number)
            assert len(of_each) == number and int(of_each.max() - of_each.min()) <= 2
    assert int(torch.bincount(output_X).min()) == num_in


def test_places_follow_from_path_and_sizes_alone() -> None:
    torch.manual_seed(5)
    first = draw_columns("layers.1.q_proj", (8, 4), 8)
    assert first.tolist() == [[5, 0, 6, 4], [6, 4, 1, 3]]
    torch.manual_seed(6)
    with torch.device("meta"):
        assert torch.equal(draw_columns("layers.1.q_proj", (8, 4), 8), first)
    assert torch.equal(draw_columns("layers.1.q_proj", (8, 4), 20)[:2], first)
    assert not torch.equal(draw_columns("layers.0.q_proj", (8, 4), 8), first)


def _target(model: torch.nn.Module) -> Target:
    sites = sites_in_each_block(model, ("all-linear",))
    wrap(model, sites)
    return Target.of(language_model(model), sites)


def test_nothing_of_the_places_is_kept() -> None:
    hypernetwork = SparseHypernetwork(SparseHypernetworkConfig(), 8, _target(tiny_lm("llama")))
    assert not [name for name in hypernetwork.state_dict() if "columns" in name]
    assert hypernetwork.columns().keys() == hypernetwork.sites.keys()
    scatter = ScatterHypernetwork(ScatterHypernetworkConfig(), 8, _target(tiny_lm("llama")))
    assert not scatter.state_dict()


def test_as_many_weights_as_a_lora_has() -> None:
    config = SparseHypernetworkConfig(rank=3, num_blocks=None)
    hypernetwork = SparseHypernetwork(config, 8, _target(tiny_lm("llama")))
    adapter = hypernetwork(torch.zeros(2, 8))
    assert len(adapter.values) == 14
    for path, (num_in, num_out) in hypernetwork.sites.items():
        assert hypernetwork.numbers(adapter)[path].shape == (2, 3 * (num_in + num_out))
    assert hypernetwork.products_after() == {
        path: 3 * sum(size) for path, size in hypernetwork.sites.items()
    }


def test_the_last_blocks_of_each_stack() -> None:
    target = _target(tiny_t5())
    chosen = sites_of_last_blocks(target, 1)
    assert {path.split(".layer.")[0] for path in chosen} == {"encoder.block.1", "decoder.block.1"}
    assert len(chosen) * 2 == len(target.sites) == len(sites_of_last_blocks(target, None))


def test_the_backward_pass_ends_at_the_last_blocks() -> None:
    """Nothing below them is made with a gradient."""
    model = tiny_lm("llama").requires_grad_(False)
    target = _target(model)
    config = SparseHypernetworkConfig(rank=2, num_blocks=1)
    hypernetwork = SparseHypernetwork(config, 8, target)
    seen: dict[str, bool] = {}
    for path in target.blocks:

        def see(_: object, __: object, out: Tensor, path: str = path) -> None:
            seen[path] = out.requires_grad

        model.get_submodule(path).register_forward_hook(see)
    batch = TokenBatch.build(random_rows([4, 3], 1), random_rows([2, 2], 2), 0)
    logits, _ = language_model(model).score(batch, hypernetwork(torch.ones(1, 8)), 1)
    assert seen == {"model.layers.0": False, "model.layers.1": True} and logits.requires_grad


def test_z_is_spread_by_size() -> None:
    assert weights_per_site(10, {"a": 30, "b": 10, "c": 60}) == {"a": 3, "b": 1, "c": 6}
    assert weights_per_site(7, {"a": 30, "b": 10, "c": 60}) == {"a": 2, "c": 5}
    assert weights_per_site(100, {"a": 30, "b": 10, "c": 60}) == {"a": 30, "b": 10, "c": 60}
    target = _target(tiny_lm("llama"))
    hypernetwork = ScatterHypernetwork(ScatterHypernetworkConfig(scale=0.5), 40, target)
    latent_TZ = torch.randn(2, 40)
    adapter = hypernetwork(latent_TZ)
    numbers = torch.cat(list(hypernetwork.numbers(adapter).values()), 1)
    assert torch.equal(numbers, 0.5 * latent_TZ)


@pytest.mark.parametrize(
    ("section", "latent_size", "message"),
    [
        (
            {"kind": "sparse", "rank": 22},
            8,
            r"rank \(22\): .*k_proj has 2048: give at most 21, or other targets",
        ),
        (
            {"kind": "sparse", "num_blocks": 3},
            8,
            r"num_blocks \(3\): the Task LLM has 2 blocks in a row: give no more",
        ),
        (
            {"kind": "scatter", "targets": ["k_proj"]},
            2 * 2048 + 1,
            r"model.latent_size \(4097\): .* linears have 4096: give at most these",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    section: dict[str, object], latent_size: int, message: str
) -> None:
    config = ModelConfig.model_validate({"hypernetwork": section}).hypernetwork
    model = tiny_lm("llama")
    sites = sites_in_each_block(model, tuple(section.get("targets", ["all-linear"])))  # type: ignore[arg-type]
    kind = SparseHypernetwork if section["kind"] == "sparse" else ScatterHypernetwork
    with pytest.raises(UserError, match=message) as caught:
        kind(config, latent_size, Target.of(language_model(model), sites))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "section",
    [
        {"kind": "scatter"},
        {"kind": "reshape"},
        {"kind": "combination", "parts": [{"kind": "lora"}, {"kind": "scatter"}]},
    ],
)
def test_a_latent_that_does_not_fit_is_told_before_heads_of_its_size_are_made(
    section: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped one would fill the memory first."""

    def fail(*arguments: object, **named: object) -> None:
        raise AssertionError("an encoder was made")

    monkeypatch.setattr(assemble, "Encoder", fail)
    config = ModelConfig.model_validate({"hypernetwork": section, "latent_size": 10**9})
    with pytest.raises(UserError, match=r"model.latent_size"):
        build_ship(config, LoadedWeights(device=torch.device("cpu")))


def test_a_distance_is_that_of_the_weights() -> None:
    adapter = _adapter()
    other = adapter.rows(torch.tensor([1]))
    whole_TOI = _whole(adapter.values["a"])
    wanted_T = (whole_TOI - whole_TOI[1]).square().sum((1, 2)) / whole_TOI[1].square().sum()
    torch.testing.assert_close(adapter.distance(other), wanted_T)
    assert adapter.distance(other)[1] == 0 < adapter.distance(other)[0]
    assert other.update_norms() == {"a": pytest.approx(float(whole_TOI[1].norm()))}
