"""Streams that become one: every row goes on as it would have alone."""

import pytest
import torch
from torch import Tensor

from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.adapters.combination import CombinedAdapter
from ship_ds.model.adapters.prefix import PrefixAdapter
from ship_ds.model.adapters.sites import wrap_sites
from ship_ds.model.adapters.soft_prompt import SoftPrompt
from ship_ds.model.batch import TokenBatch
from ship_ds.model.key_value_cache import ending_at, preallocated_layers
from ship_ds.model.language_model import Stream, language_model
from tests.model.models import FAMILIES, HIDDEN, random_lora, random_rows, stream_of, tiny_lm

TARGETS = ("q_proj", "o_proj", "down_proj")
EARLY, LATE = [9, 4, 7], [3, 12]


def advanced(stream: Stream, num_tokens: int) -> list[list[int]]:
    """The likeliest tokens of each row, each read."""
    rows: list[list[int]] = [[] for _ in range(stream.num_rows)]
    for _ in range(num_tokens):
        next_E = stream.logits_EV.argmax(-1)
        for row, token in zip(rows, next_E.tolist(), strict=True):
            row.append(token)
        stream.advance(next_E)
    return rows


def begun(model: torch.nn.Module, lengths: list[int], adapter: Adapter | None, seed: int) -> Stream:
    batch = TokenBatch.build(random_rows(lengths, seed), None, 0)
    stream = stream_of(model, batch, adapter=adapter)
    stream.reserve(20)
    return stream


def random_prefix(model: torch.nn.Module, lengths: list[int], seed: int) -> PrefixAdapter:
    """One of each task, of which it sees so many keys."""
    generator = torch.Generator().manual_seed(seed)
    lm = language_model(model)
    num_heads, head_size = lm.key_value_heads
    shape = (len(lengths), 2, num_heads, max(lengths), head_size)
    states = {place: torch.randn(shape, generator=generator) for place in lm.attentions()}
    seen_TP = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return PrefixAdapter(states, None if bool(seen_TP.all()) else seen_TP)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["bare", "lora", "prefix", "even prefix", "lora and prefix"])
@torch.no_grad()
def test_joined_rows_go_on_as_alone(family: str, kind: str) -> None:
    model = tiny_lm(family)
    adapters: list[Adapter | None] = [None, None]
    if "lora" in kind:
        sites = wrap_sites(model, TARGETS)
        adapters = [random_lora(sites, 3), random_lora(sites, 2, seed=7)]
    elif kind != "bare":
        wrap_sites(model, ())
    if "prefix" in kind:
        even = kind == "even prefix"
        lengths = ([3, 3, 3], [3, 3]) if even else ([2, 4, 1], [5, 3])
        prefixes = [random_prefix(model, one, seed) for seed, one in enumerate(lengths)]
        adapters = [
            prefix if lora is None else CombinedAdapter((lora, prefix))
            for lora, prefix in zip(adapters, prefixes, strict=True)
        ]
    alone = [
        advanced(begun(model, lengths, adapter, seed), 12)
        for lengths, adapter, seed in zip((EARLY, LATE), adapters, (2, 3), strict=True)
    ]
    early = begun(model, EARLY, adapters[0], 2)
    rows = advanced(early, 5)
    late = begun(model, LATE, adapters[1], 3)
    assert early.join(late) and early.num_rows == 5
    rows = [
        before + after for before, after in zip([*rows, [], []], advanced(early, 3), strict=True)
    ]
    early.select([0, 2, 4])  # and rows leave as before
    last = advanced(early, 4)
    wanted = [alone[0][0], alone[0][2], alone[1][1][:7]]
    assert [rows[row] + tokens for row, tokens in zip((0, 2, 4), last, strict=True)] == wanted
    assert rows[1] == alone[0][1][:8] and rows[3] == alone[1][0][:3]


@torch.no_grad()
def test_a_stream_that_others_join_for_ever_stays_short() -> None:
    model = tiny_lm("llama")
    stream = begun(model, [6], None, 0)
    for seed in range(1, 12):
        advanced(stream, 4)
        assert stream.join(begun(model, [5], None, seed))
        stream.select([1])
    layer = preallocated_layers(stream.cache)[0]  # type: ignore[attr-defined]
    # The prompt, its four tokens, the four of the row before it.
    assert layer.length <= 5 + 4 + 5
    assert torch.isfinite(stream.logits_EV).all()


@torch.no_grad()
def test_what_cannot_join_stays_as_it_is() -> None:
    model = tiny_lm("llama")
    adapter = random_lora(wrap_sites(model, TARGETS), 1)
    one, other = begun(model, [4], adapter, 0), begun(model, [5], None, 1)
    assert not one.join(other) and not other.join(one)
    assert one.num_rows == other.num_rows == 1


def test_factors_lie_as_a_cpu_multiplies_them() -> None:
    sites = wrap_sites(tiny_lm("llama"), TARGETS)
    made = [random_lora(sites, 3), random_lora(sites, 2, seed=7)]
    both = made[0].prepared(torch.float32).beside(made[1].prepared(torch.float32))
    assert both is not None
    for path, (a_TRI, b_TOR) in both.factors.items():
        assert a_TRI.is_contiguous() and b_TOR.mT.is_contiguous()
        wanted = torch.cat([one.factors[path][1] * one.scaling for one in made])
        assert torch.equal(b_TOR, wanted)


def test_prefixes_that_others_join_for_ever_stay_as_short_as_the_longest() -> None:
    model = tiny_lm("llama")
    long, short = random_prefix(model, [9], 0), random_prefix(model, [2], 1)
    both = long.beside(short)
    assert both.length == 9
    left = both.rows(torch.tensor([1])).beside(random_prefix(model, [4, 1], 2))
    assert left.length == 4 and left.seen().sum(1).tolist() == [2, 4, 1]
    place = next(iter(short.states))
    assert torch.equal(left.states[place][0, :, :, :2], short.states[place][0])


def test_soft_prompts_stand_beside_each_other() -> None:
    prompts = [torch.randn(tasks, 2, HIDDEN) for tasks in (2, 1)]
    both = SoftPrompt(prompts[0]).beside(SoftPrompt(prompts[1]))
    assert torch.equal(both.prompt_TPH, torch.cat(prompts))


@pytest.mark.parametrize(
    ("length", "wanted"), [(2, [2.0, 3.0]), (3, [1.0, 2.0, 3.0]), (5, [0.0, 0.0, 1.0, 2.0, 3.0])]
)
def test_columns_are_kept_from_the_end(length: int, wanted: list[float]) -> None:
    columns: Tensor = torch.tensor([[1.0, 2.0, 3.0]])
    assert ending_at(columns, length, 1).tolist() == [wanted]
