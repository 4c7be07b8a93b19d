"""The formula of useful FLOPs against torch's own counter, to the last operation."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ship_ds.config import ModelConfig, load_config
from ship_ds.flops import (
    Matrices,
    RoleSize,
    Rows,
    StepRows,
    deduction_flops,
    flops_of_parts,
    peak_of,
    query_flops,
)
from ship_ds.model.adapters.adapter import States
from ship_ds.model.adapters.sparse import SparseHypernetwork
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.batch import TokenBatch
from ship_ds.model.encoder import Posterior
from ship_ds.model.language_model import auto_class
from ship_ds.model.loading import Quantisation
from ship_ds.model.ship import ShipModel
from ship_ds.model.sizes import step_rows
from ship_ds.model.step import ShipBatch
from ship_ds.planner.activations import Workload, planned_batch
from ship_ds.planner.shapes import MetaWeights, Shapes, base_config
from tests.export.models import make_t5_base

pytestmark = pytest.mark.slow

LORAS = [
    "model.encoder={quantisation: nf4, tuning: {kind: lora, rank: 8, dropout: 0}}",
    "model.decoder={quantisation: nf4, tuning: {kind: lora, rank: 2, dropout: 0}, max_examples: 1}",
]

BY_LAYER = [
    "model.latent_size=64",
    "model.encoder.pooling={kind: attention, num_queries: 2, shares: true}",
    "model.hypernetwork={kind: lora, latent: by_layer}",
]


class EagerWeights(MetaWeights):
    """Two blocks of a base's shapes, with unfused attention, whose products the counter sees."""

    def language_model(self, base: str, quantisation: Quantisation, sharded: bool) -> nn.Module:
        config = copy.deepcopy(base_config(base))
        config.num_hidden_layers = 2
        lm: nn.Module = auto_class(config).from_config(
            config, dtype=self.dtype, attn_implementation="eager"
        )
        return lm


def model_of(config: ModelConfig) -> ShipModel:
    with torch.device("meta"):
        return build_ship(config, EagerWeights(torch.bfloat16)).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("base", "overrides"),
    [
        ("embedded", []),
        ("embedded", ["model.hypernetwork={kind: lora, heads: per_rank}"]),
        ("embedded", ["model.hypernetwork={kind: lora, heads: per_layer}", *LORAS]),
        ("embedded", ["model.hypernetwork={kind: lora, heads: diagonal}", *LORAS]),
        ("embedded", ["model.hypernetwork={kind: lora, heads: square}", *LORAS]),
        ("embedded", ["model.hypernetwork={kind: soft_prompt}", *LORAS]),
        ("embedded", ["model.hypernetwork={kind: soft_prompt, rank: 4}", *LORAS]),
        ("embedded", [*LORAS, "model.encoder.pooling={kind: attention, num_queries: 3}"]),
        ("embedded", [*LORAS, *BY_LAYER]),
        ("embedded", ["model.hypernetwork={kind: combination, parts: [{}, {kind: bottleneck}]}"]),
        ("llama-3-8b", LORAS),
        ("qwen2.5-7b", LORAS),
    ],
    ids=[
        "embedded",
        "per_rank",
        "lora_roles",
        "diagonal",
        "square",
        "soft_prompt",
        "decomposed",
        "pooling",
        "by_layer",
        "combination",
        "llama",
        "qwen",
    ],
)
def test_the_formula_is_what_torch_counts(base: str, overrides: list[str]) -> None:
    config = load_config(
        "quickstart", [*overrides, f"model.task_llm.base={base}", "loss.kl=0"]
    ).model
    ship = model_of(config)
    shapes = Shapes(config, torch.bfloat16, ship, frozenset())
    batch = planned_batch(shapes, Workload(2, 3, 9, 14, 5, config.decoder.max_examples))
    with FlopCounterMode(display=False) as counter:
        sum(ship(batch).objectives.values(), torch.zeros(())).backward()
    parts = flops_of_parts(ship.flop_size(), step_rows(batch))
    assert sum(parts.values()) == counter.get_total_flops()
    assert (parts["adapters"] == 0) == ("soft_prompt" in str(overrides))
    assert min(count for part, count in parts.items() if part != "adapters") > 0


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run around a T5."""
    base = make_t5_base(tmp_path_factory.mktemp("t5"))
    others = [f"model.{role}.base=embedded" for role in ("encoder", "decoder")]
    return [f"model.task_llm.base={base}", "model.task_llm.quantisation=none", *others]


_ON_T5 = [
    "model.hypernetwork={kind: lora, targets: all-linear}",
    "model.hypernetwork={kind: combination, parts: "
    "[{kind: lora, targets: all-linear}, {kind: bottleneck, targets: [o, wo]}]}",
]


@pytest.mark.parametrize("hypernetwork", _ON_T5, ids=["lora", "combination"])
def test_both_stacks_are_what_torch_counts(t5: list[str], hypernetwork: str) -> None:
    config = load_config("quickstart", [*t5, hypernetwork, "loss.kl=0"]).model
    ship = model_of(config)
    shapes = Shapes(config, torch.bfloat16, ship, frozenset())
    batch = planned_batch(shapes, Workload(2, 3, 9, 14, 5, config.decoder.max_examples))
    with FlopCounterMode(display=False) as counter:
        sum(ship(batch).objectives.values(), torch.zeros(())).backward()
    assert sum(flops_of_parts(ship.flop_size(), step_rows(batch)).values()) == (
        counter.get_total_flops()
    )


@pytest.mark.parametrize("hypernetwork", [*_ON_T5, "model.hypernetwork={kind: prefix, length: 3}"])
@torch.no_grad()
def test_a_query_of_two_stacks_is_what_torch_counts(t5: list[str], hypernetwork: str) -> None:
    ship = build_ship(load_config("quickstart", [*t5, hypernetwork]).model, LoadedWeights()).eval()
    adapter = ship.adapt(torch.zeros(1, ship.config.latent_size))
    for made in (adapter, None):
        batch = TokenBatch.build([list(range(10, 21))], None, ship.prompts.pad_id)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            stream = ship.task_llm.stream(made, batch)
            stream.reserve(3)
            for _ in range(3):
                stream.advance(stream.logits_EV.argmax(-1))
        assert counter.get_total_flops() == query_flops(
            ship.flop_size().task_llm, 11, 4, under_adapter=made is not None
        )


def _flops_and_counted(overrides: list[str]) -> tuple[ShipModel, StepRows, dict[str, int], int]:
    """A model, a step's rows, and the step's FLOPs by the formula and as torch counts them."""
    config = load_config("quickstart", [*overrides, "loss.kl=0"]).model
    ship = model_of(config)
    shapes = Shapes(config, torch.bfloat16, ship, frozenset())
    batch = planned_batch(shapes, Workload(2, 3, 9, 14, 5, config.decoder.max_examples))
    with FlopCounterMode(display=False) as counter:
        sum(ship(batch).objectives.values(), torch.zeros(())).backward()
    rows = step_rows(batch)
    return ship, rows, flops_of_parts(ship.flop_size(), rows), counter.get_total_flops()


def _whole_deltas(ship: ShipModel, rows: StepRows) -> tuple[int, int]:
    """Operations of the deltas of all sites: of whole matrices, in three passes, and of the weights
    that move."""
    hypernetwork, lm = ship.hypernetwork, ship.task_llm.language_model
    assert isinstance(hypernetwork, SparseHypernetwork)
    whole = moved = 0
    has_two_stacks = any(map(lm.is_written, lm.blocks()))
    for path, (num_in, num_out) in hypernetwork.sites.items():
        own = rows.task_llm
        if has_two_stacks:
            own = own.written if lm.is_written(path) else own.read
        whole += 3 * 2 * own.num_tokens * num_in * num_out
        moved += 3 * 2 * own.num_tokens * hypernetwork.counts[path]
    return whole, moved


def test_blocks_below_sparse_deltas_have_no_gradient() -> None:
    """Torch counts whole products where the formula counts the weights that move, and none for the
    gradient of what comes into the first block that has any."""
    ship, rows, parts, counted = _flops_and_counted(
        ["model.hypernetwork={kind: sparse, rank: 2, num_blocks: 1}"]
    )
    whole, moved = _whole_deltas(ship, rows)
    reading = (128 + 2 * 128) * 128  # queries, keys and values of the embedded base's width
    assert counted - whole + 2 * rows.task_llm.num_tokens * reading == sum(parts.values()) - moved
    assert parts["adapters"] == moved > 0
    everywhere = _flops_and_counted(
        ["model.hypernetwork={kind: sparse, rank: 2, num_blocks: null}"]
    )
    assert everywhere[2]["task_llm"] > parts["task_llm"]


def test_sparse_deltas_in_two_stacks_end_the_gradient_in_the_one_that_reads(t5: list[str]) -> None:
    """The other one has it from the keys of its first cross-attention on; the formula counts what
    nobody needs there, too: an attention, its output, and the query that meets those keys."""
    ship, rows, parts, counted = _flops_and_counted(
        [*t5, "model.hypernetwork={kind: sparse, rank: 2, num_blocks: 1, targets: all-linear}"]
    )
    whole, moved = _whole_deltas(ship, rows)
    reading = 3 * 64 * 64  # queries, keys and values of the reading stack's last block
    written = rows.task_llm.written
    unneeded = 2 * written.num_tokens * 2 * 64 * 64 + 2 * 4 * 64 * written.sum_of_squares
    unneeded += 2 * 64 * rows.task_llm.crossing_pairs
    left = counted - whole + 2 * rows.task_llm.read.num_tokens * reading
    assert left == sum(parts.values()) - moved - unneeded


def test_two_stacks_by_hand() -> None:
    """A prompt of three tokens with a target of two, and one of one with three: what is read, what
    is written, and what meets across."""
    rows = Rows.of([5, 4], 5, [2, 3])
    assert (rows.read, rows.written) == (Rows(4, 9 + 1, 0), Rows(5, 4 + 9, 5))
    assert rows.crossing_pairs == 3 * 2 + 1 * 3


def test_states_fused_by_two_stacks_by_hand(t5: list[str]) -> None:
    """A target's tokens alone meet them, in cross-attention: 2 blocks of 4 heads of 16 numbers."""
    config = load_config("quickstart", [*t5, "model.hypernetwork={kind: fusion}"]).model
    ship = build_ship(config, LoadedWeights())
    read = TokenBatch.build([[9] * 3, [9] * 5], None, 0)
    asked = TokenBatch.build([[9] * 4, [9] * 6, [9] * 2, [9] * 2], [[8] * 2, [8], [8], [8]], 0)
    noise_TZ, shows_T = torch.zeros(2, config.latent_size), torch.ones(2, dtype=torch.bool)
    rows = step_rows(ShipBatch(read, asked, read, shows_T, noise_TZ, torch.ones(2)))
    assert rows.fused_written == 3 * (2 + 1) + 5 * (1 + 1)
    size = ship.flop_size()
    fused, alone = (flops_of_parts(one, rows) for one in (size, replace(size, fuses=False)))
    assert fused["task_llm"] - alone["task_llm"] == 3 * 4 * 2 * 4 * 16 * rows.fused_written


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.hypernetwork={kind: soft_prompt}"],
        ["model.encoder.pooling=attention"],
        ["model.hypernetwork={kind: fusion}"],
        ["model.hypernetwork={kind: layer_prompt, rank: 6}"],
        ["model.hypernetwork={kind: combination, parts: [{}, {kind: block_fusion}]}"],
        ["model.hypernetwork={kind: combination, parts: [{kind: fusion}, {kind: block_fusion}]}"],
    ],
    ids=["lora", "soft_prompt", "pooling", "fusion", "layer_prompt", "block_fusion", "two fusions"],
)
@torch.no_grad()
def test_a_query_and_its_adapter_are_what_torch_counts(overrides: list[str]) -> None:
    """A prompt of eleven tokens and an answer of four, under the adapter and bare; before that the
    adapter, of an instruction of nine."""
    config = load_config("quickstart", ["model.task_llm.quantisation=none", *overrides]).model
    ship = build_ship(config, LoadedWeights()).eval()
    size = ship.flop_size()
    counts = {}
    # The counter knows no fused attention of a CPU; the products of the plain one it sees.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        instruction = TokenBatch.build([list(range(10, 19))], None, ship.prompts.pad_id)
        posterior = Posterior(*ship.encoder(instruction))
        states = posterior.states_TSH
        read = () if states is None else (States(states, instruction.real_ES),)
        adapter = ship.hypernetwork(posterior.mean_TZ, *read)
        counts["deduction"] = counter.get_total_flops()
    for name, made in (("adapter", adapter), ("bare", None)):
        virtual = ship.num_virtual_tokens if made else 0
        batch = TokenBatch.build([list(range(10, 21))], None, ship.prompts.pad_id, virtual)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            stream = ship.task_llm.stream(made, batch)
            stream.reserve(3)
            for _ in range(3):
                stream.advance(stream.logits_EV.argmax(-1))
            assert stream.logits_EV.shape[0] == 1
        counts[name] = counter.get_total_flops()
    num_read, num_fused = 11 + ship.num_virtual_tokens, 9 * size.fuses
    assert counts == {
        "deduction": deduction_flops(size, 9),
        "adapter": query_flops(size.task_llm, num_read, 4, True, num_fused),
        "bare": query_flops(size.task_llm, 11, 4, under_adapter=False),
    }


def test_fused_states_by_hand() -> None:
    """Unfused attention takes no prefix, so that torch's counter cannot see a training step: two
    tasks of 3 and 5 states with two questions each."""
    config = load_config("quickstart", ["model.hypernetwork={kind: fusion}"]).model
    ship = build_ship(config, LoadedWeights())
    read = TokenBatch.build([[9] * 3, [9] * 5], None, 0)
    asked = TokenBatch.build([[9] * 4, [9] * 6, [9] * 2, [9] * 2], [[8]] * 4, 0)
    noise_TZ = torch.zeros(2, config.latent_size)
    shows_T = torch.ones(2, dtype=torch.bool)
    rows = step_rows(ShipBatch(read, asked, read, shows_T, noise_TZ, torch.ones(2)))
    assert rows.fused_pairs == 3 * (5 + 7) + 5 * (3 + 3)
    size = ship.flop_size()
    fused, alone = (flops_of_parts(one, rows) for one in (size, replace(size, fuses=False)))
    layers, width = 4, 128  # of the embedded base: attention heads times their size is its width
    assert fused["task_llm"] - alone["task_llm"] == 3 * 4 * layers * width * rows.fused_pairs
    # Each state through a linear, the trunk and a head of keys and values a layer.
    of_state = 128 * 128 + 2 * 2 * 128 * 128 + layers * 128 * 2 * 4 * 32
    assert size.of_state == of_state
    without = flops_of_parts(replace(size, of_state=0), rows)
    assert fused["hypernetwork"] - without["hypernetwork"] == 3 * 2 * of_state * 8
    # By the base's own matrices nothing is learned: two passes.
    by_base = replace(size, base_of_state=100)
    assert flops_of_parts(by_base, rows)["hypernetwork"] - fused["hypernetwork"] == 2 * 2 * 100 * 8


@pytest.mark.parametrize("hypernetwork", ["{kind: layer_prompt}", "{kind: layer_prompt, rank: 6}"])
@pytest.mark.parametrize("others", ["", "{kind: prefix}, {kind: lora}"])
def test_frozen_projections_count_two_passes(hypernetwork: str, others: str) -> None:
    """Three tasks' adapters and their gradients; attention's own share torch's counter cannot see
    (`test_fused_states_by_hand`)."""
    if others:
        hypernetwork = f"{{kind: combination, parts: [{hypernetwork}, {others}]}}"
    overrides = ["model.task_llm.quantisation=none", f"model.hypernetwork={hypernetwork}"]
    ship = build_ship(load_config("quickstart", overrides).model, LoadedWeights())
    latent_TZ = torch.randn(3, ship.config.latent_size).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        made = ship.hypernetwork(latent_TZ).tensors().values()
        sum((one.sum() for one in made), torch.zeros(())).backward()
    nothing = Rows(0, 0, 0)
    parts = flops_of_parts(ship.flop_size(), StepRows(nothing, nothing, nothing, 3))
    assert parts["hypernetwork"] == counter.get_total_flops()


def test_the_terms_by_hand() -> None:
    """Two tokens through 3 x 4 matrices, of which half read a frozen embedding."""
    matrices = Matrices(total=24, reading_embeddings=12)
    assert matrices.flops(2, has_gradient=True, is_trained=True) == 3 * 2 * 2 * 24
    assert matrices.flops(2, has_gradient=True, is_trained=False) == 2 * 2 * 2 * 24
    assert matrices.flops(2, has_gradient=False, is_trained=False) == 2 * 2 * (24 + 12)
    assert Rows.of([2, 3], 4) == Rows(5, 13, 4)


def test_a_prefix_adds_its_keys_to_every_query() -> None:
    """Five tokens that meet 3 keys more, in 2 layers of 4 heads of 8 numbers; three passes."""
    rows, attention = Rows.of([2, 3], 4), 2 * 4 * 8
    plain = RoleSize(Matrices(), Matrices(), attention, 0, False, False)
    more = replace(plain, prefix=3).model_flops(rows) - plain.model_flops(rows)
    assert more == 3 * (2 + 2) * 5 * 3 * attention


def test_a_card_is_known_by_the_name_that_cuda_gives() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA L40S") == 362e12 and peak_of("NVIDIA L4") == 121e12
    assert peak_of("Tesla T4") is None


def test_a_query_pays_for_all_that_was_generated() -> None:
    """Nine tokens run: four read and six new ones, of which the last is not; 3 keys more for each,
    and a bottleneck of 10 products."""
    plain = RoleSize(Matrices(100), Matrices(), 2 * 4 * 8, 0, False, False)
    more = replace(plain, prefix=3, after=10)
    difference = query_flops(more, 4, 6, True) - query_flops(plain, 4, 6, True)
    assert difference == 2 * 10 * 9 + 4 * 2 * 4 * 8 * 3 * 9
    assert query_flops(more, 4, 6, False) == query_flops(plain, 4, 6, False)
