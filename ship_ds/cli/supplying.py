"""The verb `supply` of the panel "Use": more tasks for few, by a trained run."""

from pathlib import Path
from typing import Annotated

import typer

from ship_ds.cli import checks
from ship_ds.cli.verb import BaseOption, DeviceOption, DtypeOption, RunOption, SeedOption, verb
from ship_ds.console import log
from ship_ds.evaluation import ENDPOINT_URL
from ship_ds.placement import check_words

_PANEL = "Use"


@verb(_PANEL)
def supply(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="answers, propose, compress, chains or disagreement (docs/supply.md)",
        ),
    ],
    run: RunOption,
    out: Annotated[Path, typer.Option("--out", help="the .jsonl to write")],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="tasks to start from; default: those that the run trains on"),
    ] = None,
    num_tasks: Annotated[
        int | None,
        typer.Option(min=1, help="to write or to look at, at most; default: 64 new ones, or all"),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help=f"with by=endpoint, default {ENDPOINT_URL}; OPENAI_API_KEY holds its key"
        ),
    ] = None,
    endpoint_model: Annotated[str | None, typer.Option(help="name of the endpoint's model")] = None,
    seed: SeedOption = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="a number of the kind (docs/supply.md)"),
    ] = None,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> int:
    """More tasks, written as JSONL with their origin; goes on where it stopped."""
    check_words(device, dtype)
    from ship_ds.data.readers import read_tasks
    from ship_ds.errors import UserError
    from ship_ds.supply.config import parse_settings
    from ship_ds.supply.journal import journal_of

    config = parse_settings(kind, set_ or ())
    if getattr(config, "by", "") != "endpoint" and (endpoint or endpoint_model):
        raise UserError("--endpoint: nothing asks it; add --set by=endpoint, of propose or answers")
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: expected a name that ends in .jsonl")
    if not journal_of(out).exists():  # else the file is one that a kill left beside it
        checks.check_new(out)
    if data is not None:
        read_tasks(data, "auto")
    checks.check_run(run, base)
    from ship_ds.cli.using import open_run
    from ship_ds.evaluation.config import EndpointConfig
    from ship_ds.supply.make import make

    endpoint_config = EndpointConfig(
        url=endpoint or ENDPOINT_URL, model=endpoint_model or "default"
    )
    ship = open_run(run, device, dtype, base)
    counts = make(ship, config, kind, out, data, num_tasks, seed, endpoint_config, log)
    for name, count in counts.items():
        print(f"{name}: {count}")
    print(out)
    return 0
