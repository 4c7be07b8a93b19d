"""The schedule, by steps and by time."""

from typing import Literal

import pytest
import torch
from torch import nn

from ship_ds.config import OptimiserConfig, load_config
from ship_ds.data.task import Example, Splits, SplitTask, Task
from ship_ds.planner.shapes import build_shapes
from ship_ds.runtime.engine import groups, highest_rate, learning_rate
from ship_ds.train import num_steps, warn_of_long_warm_up

COSINE = OptimiserConfig(lr=1.0, warmup_steps=4)


def test_warm_up_is_linear_and_the_cosine_ends_at_two_per_cent() -> None:
    assert [learning_rate(step, COSINE, 100) for step in (0, 1)] == [0.25, 0.5]
    assert learning_rate(50, COSINE, 100) == pytest.approx(0.51)
    assert learning_rate(100, COSINE, 100) == pytest.approx(0.02)


def test_the_schedule_ends_with_the_time_where_steps_would_take_longer() -> None:
    assert learning_rate(50, COSINE, 100, spent=1.0) == pytest.approx(0.02)
    assert learning_rate(50, COSINE, 100, spent=0.3) == learning_rate(50, COSINE, 100)
    constant = OptimiserConfig(lr=1.0, warmup_steps=4, schedule="constant")
    assert learning_rate(50, constant, 100, spent=1.0) == 1.0


@pytest.mark.parametrize(
    ("warmup_steps", "steps", "schedule", "highest"),
    [
        (0, 12, "cosine", 1.0),
        (4, 400, "cosine", 0.9999),
        (50, 500, "cosine", 0.9779),
        (50, 100, "cosine", 0.72),
        (50, 12, "cosine", 0.18),
        (50, 12, "constant", 0.24),
        (50, 51, "constant", 1.0),
    ],
)
def test_the_highest_rate_is_said_where_it_is_not_the_one_asked_for(
    warmup_steps: int,
    steps: int,
    schedule: Literal["cosine", "constant"],
    highest: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = OptimiserConfig(lr=1.0, warmup_steps=warmup_steps, schedule=schedule)
    every = [learning_rate(step, config, steps) for step in range(steps)]
    assert highest_rate(config, steps) == max(every) == pytest.approx(highest, abs=1e-4)
    warn_of_long_warm_up(config, steps)
    said = capsys.readouterr().err
    if warmup_steps > steps / 10 and highest < 1:
        assert (
            f"{warmup_steps} of {steps} steps: the learning rate reaches {max(every):.3g} at"
            in said
        )
    else:
        assert said == ""


@pytest.mark.parametrize(("rows", "steps"), [(1, 125), (4, 125), (22, 688)])
def test_an_epoch_meets_every_task_however_few_its_examples(rows: int, steps: int) -> None:
    """1,000 tasks, 8 of them a step, 4 answers each."""
    example = Example("1", "2")
    task = SplitTask(Task("t", "add 1", (example,) * rows), (example,) * rows, ())
    training = load_config("quickstart", ["training.steps=null", "training.epochs=1"]).training
    eight = training.model_copy(update={"tasks_per_step": 8, "examples_per_task": 4})
    assert num_steps(eight, Splits([task] * 1000, [], [])) == steps


class Parts(nn.Module):
    """Three parameters, one of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.lm, self.head, self.base = (nn.Linear(2, 2, bias=False) for _ in range(3))
        self.base.requires_grad_(False)


def test_what_was_pretrained_may_learn_at_a_rate_of_its_own() -> None:
    parts = Parts()
    one = groups(parts, COSINE, {"lm.weight"})
    assert [(group["params"], group["lr"]) for group in one] == [
        ([parts.lm.weight, parts.head.weight], 1.0)
    ]
    two = groups(parts, COSINE.model_copy(update={"pretrained_lr": 0.1}), {"lm.weight"})
    assert [(group["params"], group["lr"]) for group in two] == [
        ([parts.head.weight], 1.0),
        ([parts.lm.weight], 0.1),
    ]


@pytest.mark.parametrize("backbone", ["separate", "shared"])
def test_language_models_and_their_loras_are_the_pretrained_parts(backbone: str) -> None:
    lora = "{kind: lora, rank: 2}"
    config = load_config(
        "quickstart-smoke",
        [
            f"model.backbone={backbone}",
            "run.folder=nowhere",
            *(f"model.{role}.tuning={lora}" for role in ("encoder", "decoder")),
            *(f"model.{role}.quantisation=nf4" for role in ("encoder", "decoder")),
        ],
    )
    model = build_shapes(config.model, torch.float32).ship
    pretrained = model.pretrained_parameters()
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert {name for name in trained if "lora_" in name} == trained & pretrained
    assert {name.split(".")[0] for name in trained - pretrained} == {
        "encoder",
        "decoder",
        "hypernetwork",
    }
