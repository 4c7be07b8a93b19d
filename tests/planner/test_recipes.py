"""The recipes for real models fit the machines that they name, evaluation and report included."""

import pytest

from ship_ds.config import load_config
from ship_ds.planner.plan import Machines, Plan, make_plan
from ship_ds.planner.public_shapes import with_shapes

pytestmark = pytest.mark.slow
GIGABYTE = 10**9
ONE_CARD, ONE_NODE = Machines(1, 1, 24 * GIGABYTE), Machines(1, 8, 80 * GIGABYTE)


def plan_of(recipe: str, shapes: str, machines: Machines) -> Plan:
    return make_plan(with_shapes(load_config(recipe), shapes), machines)


@pytest.mark.parametrize(
    ("recipe", "shapes", "machines"),
    [
        ("lora-8b", "llama-3-8b", ONE_NODE),
        ("lora-8b", "qwen2.5-7b", ONE_NODE),
        ("lora-8b", "mistral-7b", ONE_NODE),
        ("lora-8b-fused", "llama-3-8b", ONE_NODE),
        ("lora-8b-24gb", "llama-3-8b", ONE_CARD),
        ("lora-8b-24gb", "qwen2.5-7b", ONE_CARD),
        ("lora-70b", "llama-3-70b", ONE_NODE),
    ],
)
def test_a_recipe_fits_the_machines_it_names(recipe: str, shapes: str, machines: Machines) -> None:
    plan = plan_of(recipe, shapes, machines)
    assert plan.fits, (plan.memory, plan.evaluating)
    assert len(plan.passes) == 4 and sum(plan.evaluating.values()) > 0
    model = plan.config.model
    assert (model.backbone, model.task_llm.instruction) == ("shared", "none")
    assert plan.parameters["frozen"] == plan.parameters["task LLM"]  # one base, counted once


def test_the_published_setting_is_refused_on_one_small_card() -> None:
    plan = plan_of("pretrain-7b", "llama-2-7b", ONE_CARD)
    assert not plan.fits and plan.passes
