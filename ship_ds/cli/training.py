"""The verbs of the panel "Train": before and while a model is trained."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from ship_ds.cli import checks
from ship_ds.cli.verb import (
    BudgetOption,
    ConfigOption,
    DeviceOption,
    DirectionsOption,
    DtypeOption,
    JsonOption,
    MethodsOption,
    NumLooksOption,
    NumTasksOption,
    OutOption,
    OverridesArgument,
    PartsOption,
    PatienceOption,
    SeedOption,
    SetMethodOption,
    verb,
)
from ship_ds.console import log
from ship_ds.errors import UserError
from ship_ds.exit_codes import BAD_INPUT
from ship_ds.placement import check_words

_PANEL = "Train"
Count = Annotated[
    int | None, typer.Option(min=1, max=1_000_000, help="instead of the recipe's limit")
]


@verb(_PANEL)
def train(config: ConfigOption, overrides: OverridesArgument = None) -> int:
    """Train in one process; for several, start ship_ds/train.py by deepspeed or torchrun."""
    from ship_ds.config import load_config
    from ship_ds.runtime import preflight

    preflight.check(load_config(config, overrides or ()), os.environ)
    from ship_ds import train
    from ship_ds.runtime import ranks

    try:
        return train.main(["--config", config, *(overrides or ())])
    except KeyboardInterrupt:
        return ranks.say_interrupted()


@verb(_PANEL)
def plan(
    config: ConfigOption,
    overrides: OverridesArgument = None,
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
    as_json: JsonOption = False,
) -> int:
    """What a recipe needs of each GPU and sends in a step, from its shapes alone. Ends with 2 where
    it does not fit.
    """
    from ship_ds.config import load_config
    from ship_ds.planner.public_shapes import check_planned_bases, with_shapes
    from ship_ds.runtime import preflight
    from ship_ds.runtime.deepspeed_config import read_deepspeed_config

    checks.check_positive("--gpu-memory", gpu_memory)
    settings = load_config(config, overrides or ())
    if shapes is not None:
        settings = with_shapes(settings, shapes)
    check_planned_bases(settings)
    read_deepspeed_config(settings.training.deepspeed)
    preflight.check_division(
        settings.training.tasks_per_step, nodes * gpus, settings.training.accumulation
    )
    from ship_ds.planner.plan import Machines, advise, make_plan
    from ship_ds.planner.show import as_json as to_json
    from ship_ds.planner.show import plan_text

    lengths = (instruction_tokens, input_tokens, target_tokens)
    log("counting what a step holds, on the meta device: a minute or two for the deepest bases")
    planned = make_plan(settings, Machines(nodes, gpus, int(gpu_memory * 1e9)), lengths)
    changes = advise(planned, lengths)
    print(
        json.dumps(to_json(planned, changes), indent=2) if as_json else plan_text(planned, changes)
    )
    return 0 if planned.fits else BAD_INPUT


@verb(_PANEL)
def compare(
    context: typer.Context,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME... [SECTION.KEY=VALUE]...",
            help="recipes, configs or files of variants; settings are of all of them",
        ),
    ],
    out: Annotated[Path, typer.Option(help="the folder of all; the same one goes on")],
    minutes: Annotated[
        float | None,
        typer.Option(help="of each training, a baseline's too; default: as their configs say"),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="each variant once with each, such as 0,1,2")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="ranks of each training, by torchrun")] = 1,
    parts: PartsOption = "seen,dev,unseen",
    directions: DirectionsOption = "deduction,induction",
    num_tasks: NumTasksOption = 120,
    methods: MethodsOption = "ship,prompting",
    budget: BudgetOption = "minutes",
    patience: PatienceOption = 4,
    num_looks: NumLooksOption = 4,
    set_: SetMethodOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the commands, start nothing")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> int:
    """Train variants for equal minutes and put them into one table; goes on where it stopped."""
    check_words(device, dtype)
    if minutes is not None:
        checks.check_positive("--minutes", minutes)
    from ship_ds.evaluation import compare as comparing
    from ship_ds.evaluation import variants
    from ship_ds.evaluation.config import HarnessConfig

    settings = HarnessConfig.from_options(
        methods=methods,
        parts=parts,
        directions=directions,
        num_tasks=num_tasks,
        budget=budget,
        patience=patience,
        num_looks=num_looks,
        changes=set_ or (),
    )
    if "ship" not in settings.methods:
        raise UserError("--methods: ship is missing, whose rows are the variants: add it")
    variant_names, common = variants.parse_names(names)
    if not variant_names:
        raise UserError("compare: name a recipe, a config or a file of variants")
    several = None if seeds is None else _seeds(seeds)
    trials = variants.plan(variants.read_variants(variant_names), common, out, minutes, several)
    comparing.check_changes(settings)
    if dry_run:
        print("\n".join(variants.commands(trials, nproc)))
        return 0
    variants.check(trials, nproc, os.environ)
    settings = settings.model_copy(update={"minutes": trials[0].config.training.max_minutes})
    return comparing.compare(trials, settings, out, nproc, context.obj, log, device, dtype)


@verb(_PANEL)
def oracles(
    config: ConfigOption,
    out: OutOption,
    overrides: OverridesArgument = None,
    steps: Annotated[int, typer.Option(min=1, help="of each oracle")] = 40,
    lr: Annotated[float, typer.Option(help="of Adam, at its highest")] = 1e-2,
    examples_per_step: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="of each task; default: training.examples_per_task"),
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> int:
    """A LoRA for each seen task, trained on its examples, for loss.oracles; goes on if stopped."""
    check_words(device, dtype)
    checks.check_positive("--lr", lr)
    from ship_ds.config import load_config, why_no_oracles
    from ship_ds.data.source import source_of
    from ship_ds.runtime import preflight

    settings = load_config(config, overrides or ())
    if reason := why_no_oracles(settings.model):
        raise UserError(f"oracles: {reason}")
    preflight.check_base("model.task_llm.base", settings.model.task_llm.base)
    preflight.check_stacks(settings.model)
    source_of(settings.data).check()
    checks.check_new(out)
    from ship_ds.evaluation.oracle_training import BankRecipe, in_words, make_bank
    from ship_ds.placement import choose_device, choose_dtype
    from ship_ds.runtime import ranks

    ranks.quiet_libraries()
    ranks.log_threads()
    where = choose_device(device)
    count = examples_per_step or settings.training.examples_per_task
    recipe = BankRecipe(steps, lr, count, seed)
    learnt = make_bank(settings, out, recipe, where, choose_dtype(dtype, where), log)
    for one in learnt:
        print(f"{one.task_id}: {one.before:.3f} -> {one.after:.3f}")
    print(in_words(learnt))
    print(out)
    return 0


def _seeds(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(seed) for seed in text.split(",")))
    except ValueError:
        raise UserError(f"--seeds {text}: expected numbers with commas, such as 0,1,2") from None
