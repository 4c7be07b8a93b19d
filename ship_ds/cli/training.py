"""The verbs of the panel "Train": before and while a model is trained."""

import json
import os
from typing import Annotated

import typer

from ship_ds.cli import checks
from ship_ds.cli.verb import AsJson, Overrides, Recipe, verb

_PANEL = "Train"
Count = Annotated[int | None, typer.Option(min=1, help="instead of the recipe's limit")]


@verb(_PANEL)
def train(config: Recipe, overrides: Overrides = None) -> int:
    """Train in one process; for several, start ship_ds/train.py by deepspeed or torchrun."""
    from ship_ds.config import load_config
    from ship_ds.runtime import preflight

    preflight.check(load_config(config, overrides or ()), os.environ)
    from ship_ds import train

    return train.main(["--config", config, *(overrides or ())])


@verb(_PANEL)
def plan(
    config: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="on each node")] = 8,
    nodes: Annotated[int, typer.Option(min=1, help="of that many GPUs each")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="GB of one GPU")] = 80,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="a published model's shapes in place of the base: llama-2-7b, llama-3-70b, ..."
        ),
    ] = None,
    instruction_tokens: Count = None,
    input_tokens: Count = None,
    target_tokens: Count = None,
    as_json: AsJson = False,
) -> int:
    """What a recipe needs of each GPU and sends in a step, from its shapes alone."""
    from ship_ds.config import load_config
    from ship_ds.planner.public_shapes import check_bases, with_shapes
    from ship_ds.runtime import preflight
    from ship_ds.runtime.deepspeed_config import read_deepspeed_config

    checks.check_positive("--gpu-memory", gpu_memory)
    settings = load_config(config, overrides or ())
    if shapes is not None:
        settings = with_shapes(settings, shapes)
    check_bases(settings)
    read_deepspeed_config(settings.training.deepspeed)
    preflight.check_division(
        settings.training.tasks_per_step, nodes * gpus, settings.training.accumulation
    )
    from ship_ds.planner.plan import Machines, advise, make_plan
    from ship_ds.planner.show import as_json as to_json
    from ship_ds.planner.show import show

    lengths = (instruction_tokens, input_tokens, target_tokens)
    planned = make_plan(settings, Machines(nodes, gpus, int(gpu_memory * 1e9)), lengths)
    changes = advise(planned, lengths)
    print(json.dumps(to_json(planned, changes), indent=2) if as_json else show(planned, changes))
    return 0
