"""The verb `serve`: a run behind OpenAI's API."""

import os
from typing import Annotated

import typer

from ship_ds.cli import checks
from ship_ds.cli.using import open_run
from ship_ds.cli.verb import BaseOption, DeviceOption, DtypeOption, RunOption, verb
from ship_ds.console import log
from ship_ds.errors import UserError
from ship_ds.placement import check_words


@verb("Use")
def serve(
    run: RunOption,
    host: Annotated[
        str, typer.Option(help="to listen on; another one than this machine's needs a key")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            help="that clients have to send; safer in SHIP_DS_API_KEY, which no process list shows",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="of the bare base among the models; default: the run's")
    ] = None,
    max_rows: Annotated[
        int, typer.Option(min=1, max=4096, help="answers that are written at once")
    ] = 64,
    max_waiting: Annotated[
        int, typer.Option(min=1, max=100_000, help="requests that wait; more get a 429")
    ] = 256,
    max_wait: Annotated[
        float, typer.Option(help="seconds that one waits; then it gets a 503")
    ] = 60.0,
    max_connections: Annotated[
        int, typer.Option(min=1, max=65_536, help="that are open at a time; more get a 503")
    ] = 512,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="that a request may ask for")
    ] = 4096,
    max_adapters: Annotated[
        int, typer.Option(min=1, max=10_000_000, help="unnamed adapters that are remembered")
    ] = 10_000,
    max_names: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="adapters that have names at a time")
    ] = 1000,
    prepare: Annotated[
        bool,
        typer.Option(
            "--prepare", help="first make what explaining adapters needs: minutes, once a run"
        ),
    ] = False,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> int:
    """An OpenAI-compatible server: model="ship:<instruction>" answers as the instruction says."""
    check_words(device, dtype)
    checks.check_positive("--max-wait", max_wait)
    key = os.environ.get("SHIP_DS_API_KEY") if api_key is None else api_key
    if key is not None and not key.strip():
        raise UserError("--api-key: is empty; leave it out, or give one")
    if key is not None and not (key.isascii() and key.strip().isprintable()):
        raise UserError(
            "--api-key: has other letters than printable ASCII, which many clients cannot send; "
            "choose another one"
        )
    try:
        from ship_ds.serving.server import address, is_loopback, listening, serve_ship
    except ModuleNotFoundError as error:
        raise UserError(
            f"serve: {error.name} is not installed: pip install 'ship-ds[serve]'"
        ) from error
    if key is None and not is_loopback(host):
        raise UserError(
            f"--host {host}: others could ask this server: give a key (--api-key or "
            "SHIP_DS_API_KEY), or leave it at 127.0.0.1"
        )
    checks.check_run(run, base)
    with listening(host, port) as listener:
        from ship_ds.serving.limits import Limits

        log(f"opening {run}, to be served at {address(listener)}")
        limits = Limits(
            max_rows=max_rows,
            max_waiting=max_waiting,
            wait_seconds=max_wait,
            max_connections=max_connections,
            max_new_tokens=max_new_tokens,
            max_cached=max_adapters,
            max_names=max_names,
        )
        ship = open_run(run, device, dtype, base)
        if prepare:
            ship.prepare_to_explain(log)
        return serve_ship(
            ship,
            limits,
            listener,
            name=name or run.resolve().name,
            api_key=key.strip() if key else None,
            host=host,
        )
