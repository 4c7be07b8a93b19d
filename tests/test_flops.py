"""The formula of useful FLOPs against torch's own counter, to the last operation."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ship_ds.config import ModelConfig, load_config
from ship_ds.flops import Matrices, RoleSize, Rows, flops_of_parts, peak_of
from ship_ds.model.assemble import build_ship
from ship_ds.model.language_model import auto_class
from ship_ds.model.loading import Quantisation
from ship_ds.model.ship import ShipModel
from ship_ds.model.sizes import rows_of
from ship_ds.planner.activations import Workload, planned_batch
from ship_ds.planner.shapes import MetaWeights, Shapes, base_config

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
        ("embedded", ["model.hypernetwork={kind: soft_prompt}", *LORAS]),
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
        "soft_prompt",
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
    parts = flops_of_parts(ship.flop_size(), rows_of(batch))
    assert sum(parts.values()) == counter.get_total_flops()
    assert (parts["adapters"] == 0) == ("soft_prompt" in str(overrides))
    assert min(count for part, count in parts.items() if part != "adapters") > 0


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
