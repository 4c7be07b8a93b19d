"""What z carries before any training: the scale that decides how soon both halves begin to
learn."""

from typing import Any

import pytest
import torch

from ship_ds.config import (
    AttentionPooling,
    EncoderConfig,
    LastPooling,
    ModelConfig,
    TaskLlmConfig,
)
from ship_ds.data.rules import RulesConfig, build_world
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.batch import TokenBatch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pooling", "times"), [(LastPooling(), 8), (AttentionPooling(), 4)], ids=["last", "attention"]
)
def test_instructions_differ_by_far_more_than_the_noise_at_step_0(pooling: Any, times: int) -> None:
    """At 1.3 times the noise, both losses stood still for the first hundred steps."""
    torch.manual_seed(0)
    config = ModelConfig(
        encoder=EncoderConfig(pooling=pooling), task_llm=TaskLlmConfig(quantisation="none")
    )
    ship = build_ship(config, LoadedWeights()).eval()
    prompts = ship.encoder_prompts
    texts = [task.task.instruction for task in build_world(RulesConfig()).seen[::16]]
    batch = TokenBatch.build([prompts.encoder_prompt(text) for text in texts], None, prompts.pad_id)
    with torch.no_grad():
        mean_TZ, log_variance_TZ = ship.encoder(batch)
    assert mean_TZ.std(0).mean() > times * (log_variance_TZ / 2).exp().mean()
