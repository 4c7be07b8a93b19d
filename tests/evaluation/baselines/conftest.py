"""An untrained SHIP over the embedded tiny LM and a small world; methods made from it with a few
steps to spend."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ship_ds.api import Ship
from ship_ds.config import (
    Config,
    EvaluationConfig,
    LoraHypernetworkConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from ship_ds.data.rules import RulesConfig, build_world
from ship_ds.data.task import Splits
from ship_ds.evaluation.baselines.itd import Itd, ItdRecipe
from ship_ds.evaluation.baselines.oracles import OracleRecipe
from ship_ds.evaluation.baselines.prompt_tuning import PromptTuning, PromptTuningRecipe
from ship_ds.evaluation.baselines.tagi import Tagi, TagiRecipe
from ship_ds.evaluation.baselines.text_to_lora import TextToLora, TextToLoraRecipe
from ship_ds.evaluation.budgets import Steps
from ship_ds.evaluation.method import Setting
from ship_ds.model.assemble import LoadedWeights, build_ship


@pytest.fixture(scope="session")
def ship() -> Ship:
    config = Config(
        run=RunConfig(folder="unused"),
        model=ModelConfig(
            hypernetwork=LoraHypernetworkConfig(
                rank=4, alpha=8, width=16, targets=("q_proj", "down_proj")
            )
        ),
        training=TrainingConfig(steps=1, tasks_per_step=3, examples_per_task=2),
        evaluation=EvaluationConfig(max_new_tokens=8, max_instruction_tokens=16),
    )
    torch.manual_seed(0)
    return Ship(
        build_ship(config.model, LoadedWeights(device=torch.device("cpu"))).eval(),
        config,
        "untrained",
    )


@pytest.fixture(scope="session")
def splits() -> Splits:
    return build_world(RulesConfig(train_examples=6, test_examples=3, num_seen=6))


@pytest.fixture
def make(
    ship: Ship, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """make(method, steps=4, seed=0, folder="a"); whatever counts steps of its own takes few."""
    few = OracleRecipe(steps=3)
    monkeypatch.setattr(TextToLora, "recipe", TextToLoraRecipe(oracles=few))
    monkeypatch.setattr(Tagi, "recipe", TagiRecipe(oracles=few))
    monkeypatch.setattr(
        PromptTuning, "recipe", PromptTuningRecipe(num_virtual_tokens=4, reasoning_steps=3)
    )
    monkeypatch.setattr(
        Itd, "recipe", ItdRecipe(proposals_per_task=1, rows_per_step=8, num_beams=3)
    )
    monkeypatch.setattr("ship_ds.evaluation.baselines.itd._ANSWERED_BETWEEN_LOOKS", 32)

    def build(method: Any, steps: int = 4, seed: int = 0, folder: str = "a") -> Any:
        return method(Setting(ship, splits, tmp_path / folder, None, seed), Steps(steps))

    return build
