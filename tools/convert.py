r"""From what a training run left to what other software loads: checkpoint -> bundle -> adapters ->
merged models.

    python tools/convert.py runs/quickstart --out deploy \
        --instruction "add 5 to element 2" --target original --target nf4
    python tools/convert.py runs/x/checkpoints/step-00000400 --out deploy --file instructions.txt

writes deploy/bundle (unless the run has one), deploy/adapters/NAME for each instruction and
deploy/merged/NAME-TARGET. Each of them is there whole or not at all, and what is there is not made
again: after a kill the same command goes on.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ship_ds.bundle import WEIGHTS, Ship, bundle_folder, bundle_from_checkpoint, verify
from ship_ds.errors import UserError
from ship_ds.export.deduce import export_many
from ship_ds.export.drift import drift, show
from ship_ds.export.merge import Merge
from ship_ds.export.requests import Request, read_instructions, read_lines
from ship_ds.runtime import checkpoint


def find_bundle(source: Path, out: Path) -> Path:
    """The run's own bundle; else one made from the checkpoint given, or from the run's newest good
    one."""
    if (bundle_folder(source) / WEIGHTS).is_file():
        return bundle_folder(source)
    if not out.exists():
        is_run = (source / "checkpoints").is_dir()
        found = checkpoint.newest_good(source / "checkpoints", print) if is_run else source
        if found is None:
            raise UserError(
                f"{source}: has neither a bundle nor a whole checkpoint; train on, or "
                "give a checkpoint's folder"
            )
        bundle_from_checkpoint(found, out)
        print(f"{out}: bundle of {found}")
    verify(out)
    return out


def make_adapters(
    bundle: Path, requests: list[Request], out: Path, probes: list[str], pad_to: int | None
) -> None:
    if out.exists():
        missing = [request.name for request in requests if not (out / request.name).is_dir()]
        if missing:
            raise UserError(
                f"{out}: is of other instructions (no {missing[0]}); remove it or "
                "choose another --out"
            )
        return
    batch = export_many(Ship.from_run(bundle), requests, out, probes, pad_to)
    print(f"{out}: {len(requests)} adapters, peft = live within {batch.worst.from_live:.1e}")


def merge_one(adapter: Path, out: Path, args: argparse.Namespace, target: str) -> None:
    if out.exists():
        return
    merge = Merge(adapter, target, args.base, args.dtype, args.shard_gigabytes)  # type: ignore[arg-type]
    report = merge.run(
        out,
        (lambda part: {}) if args.no_drift else (lambda part: drift(part, adapter, merge.folder)),
    )
    print(f"{out}: {target}" + ("" if args.no_drift else f"\n  {show(report)}"))


def convert(args: argparse.Namespace) -> None:
    requests = read_instructions(Path(args.file)) if args.file else read_lines(args.instruction)
    bundle = find_bundle(args.source, args.out / "bundle")
    if not requests:
        return
    make_adapters(bundle, requests, args.out / "adapters", args.probe, args.pad_to)
    for request in requests:
        for target in args.target:
            merge_one(
                args.out / "adapters" / request.name,
                args.out / "merged" / f"{request.name}-{target}",
                args,
                target,
            )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="CHECKPOINT_OR_RUN")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--instruction", action="append", default=[], help="may be given several times"
    )
    parser.add_argument("--file", help="as in `ship-ds deduce --file`, instead of --instruction")
    parser.add_argument(
        "--probe", nargs="+", default=["3 7 3 5", "1 3 9 3 0"], help="inputs to prove adapters on"
    )
    parser.add_argument("--pad-to", type=int, help="LoRA rank to reach with zero rows")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        choices=["original", "dequantised", "nf4"],
        help="merge each adapter into this; may be given several times; default: no merging",
    )
    parser.add_argument("--base", help="where the base is now")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"]
    )
    parser.add_argument("--shard-gigabytes", type=float, default=2.0)
    parser.add_argument(
        "--no-drift",
        action="store_true",
        help="do not load base and result to measure how far logits drift",
    )
    try:
        convert(parser.parse_args(arguments))
    except UserError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
