"""What DeepSpeed leaves alone in a model whose parameters are sharded while it loads."""

import pytest
import torch

from ship_ds.config import LoraHypernetworkConfig, ModelConfig, TaskLlmConfig
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.runtime import ranks, shards


def test_a_replicated_task_llm_reaches_the_device_beside_sharded_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is no parameter of the engine's."""
    ship = build_ship(
        ModelConfig(
            latent_size=8,
            task_llm=TaskLlmConfig(quantisation="none", shard="never"),
            hypernetwork=LoraHypernetworkConfig(rank=2, width=8),
        ),
        LoadedWeights(),
    )
    sharded = next(ship.encoder.parameters())
    sharded.ds_id = 0  # type: ignore[attr-defined]  # as zero.Init marks them
    moved: list[torch.device] = []
    monkeypatch.setattr(ship.task_llm, "to", moved.append)
    monkeypatch.setattr(ranks, "device", lambda: torch.device("cpu", 0))
    shards.cast_and_move_rest(ship, torch.bfloat16)
    assert moved == [torch.device("cpu", 0)]
    assert sharded.dtype == torch.float32, "DeepSpeed casts what it has sharded"
    assert next(ship.hypernetwork.parameters()).dtype == torch.bfloat16
