"""What z carries before any training: the scale that decides how soon both halves begin to
learn."""

import torch

from ship_ds.config import ModelConfig, TaskLlmConfig
from ship_ds.data.rules import RulesConfig, build_world
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.batch import TokenBatch


def test_instructions_differ_by_far_more_than_the_noise_at_step_0() -> None:
    """At 1.3 times the noise, both losses stood still for the first hundred steps."""
    torch.manual_seed(0)
    ship = build_ship(
        ModelConfig(task_llm=TaskLlmConfig(quantisation="none")), LoadedWeights()
    ).eval()
    prompts = ship.encoder_prompts
    texts = [task.task.instruction for task in build_world(RulesConfig()).seen[::16]]
    batch = TokenBatch.build([prompts.encoder_prompt(text) for text in texts], None, prompts.pad_id)
    with torch.no_grad():
        mean_TZ, log_variance_TZ = ship.encoder(batch)
    assert mean_TZ.std(0).mean() > 8 * (log_variance_TZ / 2).exp().mean()
