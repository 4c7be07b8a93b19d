"""The verbs of the panel "Inspect": what there is, what data hold, how good a run is."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ship_ds.cli import checks
from ship_ds.cli.verb import (
    BaseOption,
    BudgetOption,
    DeviceOption,
    DirectionsOption,
    DtypeOption,
    JsonOption,
    MethodsOption,
    NumLooksOption,
    NumTasksOption,
    PatienceOption,
    RunOption,
    SeedOption,
    SetMethodOption,
    verb,
)
from ship_ds.console import log
from ship_ds.errors import UserError
from ship_ds.evaluation import ENDPOINT_URL
from ship_ds.placement import check_words

if TYPE_CHECKING:
    from ship_ds.config import Config
    from ship_ds.data.filters import FilterConfig

_PANEL = "Inspect"
Limit = Annotated[int | None, typer.Option(min=1, help="see data.filters in `ship-ds config`")]


@verb(_PANEL)
def recipes() -> int:
    """The shipped configs, each with its command."""
    from ship_ds.config import recipe_names, recipe_text

    for name in recipe_names():
        print(f"{name:<20} {recipe_text(name).splitlines()[0].removeprefix('# ')}")
    return 0


@verb(_PANEL)
def config(
    key: Annotated[
        str | None,
        typer.Argument(help="a section or setting, such as training or training.steps; none: all"),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Every setting with its type, default and meaning."""
    from ship_ds.schema import chosen_groups, settings_text

    chosen = chosen_groups(key)
    print(
        json.dumps([asdict(group) for group in chosen], indent=2)
        if as_json
        else settings_text(chosen)
    )
    return 0


@verb(_PANEL)
def doctor() -> int:
    """What of the stack is here, and what each missing part costs."""
    from ship_ds import doctor

    print("\n".join(doctor.lines()))
    return 0


@verb(_PANEL)
def data(
    path: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH | KEY=VALUE...]", help="a file or folder of tasks"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--config", help="a recipe or YAML whose data are described, for PATH"),
    ] = None,
    format: Annotated[str, typer.Option(help="its format; auto: found out")] = "auto",
    preset: Annotated[str | None, typer.Option(help="see data.filters in `ship-ds config`")] = None,
    max_input_words: Limit = None,
    max_input_letters: Limit = None,
    max_instruction_words: Limit = None,
    max_examples_per_task: Limit = None,
    min_examples_per_task: Limit = None,
    as_json: JsonOption = False,
) -> int:
    """What a file or folder of tasks, or each source of a mixture, holds and what is left out."""
    from ship_ds.config import load_config
    from ship_ds.data.describe import describe, description_text
    from ship_ds.data.splits import SplitConfig

    options = {
        "preset": preset,
        "max_input_words": max_input_words,
        "max_input_letters": max_input_letters,
        "max_instruction_words": max_instruction_words,
        "max_examples_per_task": max_examples_per_task,
        "min_examples_per_task": min_examples_per_task,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if recipe is not None:
        if given or format != "auto":
            raise UserError(
                "data: filters of a --config are its own: override data.filters instead"
            )
        config = load_config(recipe, path or ())
        descriptions = _of_config(recipe, config)
    elif path is None or len(path) != 1:
        raise UserError("data: give one file or folder, or --config with a recipe")
    else:
        descriptions = [describe(Path(path[0]), format, _filters(given), SplitConfig())]
    if as_json:
        print(json.dumps(descriptions if recipe else descriptions[0], indent=2))
    else:
        print("\n\n".join(map(description_text, descriptions)))
        if recipe is not None:
            _print_as_trained(config)
    return 0


def _filters(given: dict[str, Any]) -> "FilterConfig":
    """Raises UserError for a preset that there is not."""
    from pydantic import ValidationError

    from ship_ds.data.filters import FilterConfig
    from ship_ds.section import first_error

    try:
        return FilterConfig.model_validate(given)
    except ValidationError as error:
        first = first_error(error)
        option = str(first.location[0]).replace("_", "-")
        raise UserError(f"--{option}: {first.text}") from None


def _of_config(recipe: str, config: "Config") -> list[dict[str, Any]]:
    """A description of each file, folder or generator of the config's data."""
    from ship_ds.data.source import source_of

    source = source_of(config.data)
    source.check()
    descriptions = source.describe()
    if not descriptions:
        raise UserError(f"data: {recipe}: nothing is said of its tasks before they are read")
    return descriptions


def _print_as_trained(config: "Config") -> None:
    """What a training says of the data as it reads them: what is cut or left out by its tokens, and
    what near copies and test inputs cost."""
    from ship_ds.config import base_folder
    from ship_ds.data.source import source_of
    from ship_ds.data.task import DataError

    base = config.model.task_llm.base
    try:
        base_folder(base)
    except UserError as error:
        print(f"\nnothing is said of the length of texts in tokens: {error}")
        return
    # Imports torch.
    from ship_ds.model.loading import load_tokenizer

    lines: list[str] = []
    try:
        source_of(config.data).read(load_tokenizer(base), lines.append)
    except DataError as error:
        lines.append(f"a training would end here: {error}")
    if lines:
        print(f"\nas a training reads them, with the tokenizer of {base}:")
        print("\n".join(f"  {line}" for line in lines))


@verb(_PANEL)
def evaluate(
    context: typer.Context,
    run: RunOption,
    methods: MethodsOption = "all",
    parts: Annotated[
        str | None,
        typer.Option(
            help="of seen, dev, unseen, unseen_paraphrase; default: seen,unseen; with --data unseen"
        ),
    ] = None,
    directions: DirectionsOption = "all",
    num_tasks: NumTasksOption = 120,
    num_shown: Annotated[
        str, typer.Option(help="examples shown; of several (5,1,2,3) the first is the report's own")
    ] = "5",
    budget: BudgetOption = "minutes",
    minutes: Annotated[float, typer.Option(help="with --budget minutes, of each baseline")] = 5,
    patience: PatienceOption = 4,
    num_looks: NumLooksOption = 4,
    judge: Annotated[
        str, typer.Option(help="of execution, rouge, similarity, endpoint; or none")
    ] = "execution,rouge",
    endpoint: Annotated[
        str, typer.Option(help="of the judge; OPENAI_API_KEY holds its key")
    ] = ENDPOINT_URL,
    endpoint_model: Annotated[str, typer.Option(help="name of the judge's model")] = "default",
    endpoint_prompts: Annotated[
        str, typer.Option(help="of strict, published, published-lists: what the judge is asked")
    ] = "strict",
    seed: SeedOption = 0,
    set_: SetMethodOption = None,
    base: BaseOption = None,
    other_data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="tasks of another file or folder, in place of the run's unseen ones; or a section "
            "in braces, as data of kind files",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> int:
    """SHIP beside the baselines in every direction; goes on where it stopped."""
    check_words(device, dtype)
    from ship_ds.data.task_files import parse_benchmark
    from ship_ds.evaluation.config import HarnessConfig

    others = None if other_data is None else parse_benchmark(other_data, "--data")
    settings = HarnessConfig.from_options(
        methods=methods,
        parts=parts if parts is not None else "seen,unseen" if others is None else "unseen",
        directions=directions,
        num_tasks=num_tasks,
        num_shown=num_shown,
        budget=budget,
        minutes=minutes,
        patience=patience,
        num_looks=num_looks,
        judge=judge,
        endpoint=endpoint,
        endpoint_model=endpoint_model,
        endpoint_prompts=endpoint_prompts,
        seed=seed,
        changes=set_ or (),
    )
    checks.check_run(run, base)
    from ship_ds.evaluation.evaluate import evaluate, print_methods
    from ship_ds.evaluation.harness import results_name
    from ship_ds.runtime import ranks

    ranks.quiet_libraries()
    if ranks.is_launched():
        ranks.start(None)
    else:
        ranks.log_threads()
    report = evaluate(
        run, settings, context.obj, log, ranks.device_of_rank(device), dtype, base, others
    )
    if ranks.rank() == 0:
        print_methods(report)
        print(run / results_name(others) / "report.md")
    return 0


@verb(_PANEL)
def plot(
    run: RunOption,
    runs: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN...", help="others, for the figures over runs"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder; default RUN/figures")] = None,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> int:
    """Figures of a run, and of several runs against each other, as PNG."""
    check_words(device, dtype)
    folders = [run, *(runs or ())]
    for folder in folders:
        checks.check_exists(folder)
    from ship_ds.evaluation import figures
    from ship_ds.evaluation.evaluate import write_latent_map
    from ship_ds.runtime import ranks

    ranks.quiet_libraries()
    out = out or run / "figures"
    others = [name for name in figures.FIGURES if name not in figures.OF_LATENTS]
    for path in figures.plot(folders, out, log, others):
        print(path, flush=True)
    write_latent_map(run, log, device, dtype, base)
    for path in figures.plot(folders, out, log, figures.OF_LATENTS):
        print(path)
    return 0
