"""A run or checkpoint -> bundle -> adapters -> merged models, for `ship-ds convert`.

    OUT/bundle                    unless the run has one
    OUT/made_from.json            of which checkpoint that is
    OUT/adapters/NAME             a PEFT folder for each instruction
    OUT/merged/NAME-TARGET        a model folder for each of them and each target

Each of them is there whole or not at all, and what is there is not made again: after a kill the
same command goes on. What is there of another checkpoint, instruction or merge is refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ship_ds.adapter_files import ADAPTER_CONFIG
from ship_ds.api import Ship
from ship_ds.bundle import (
    SHIP_WEIGHTS,
    bundle_folder,
    check_checkpoint,
    check_leaves,
    check_merges,
    verify,
)
from ship_ds.console import log
from ship_ds.errors import UserError
from ship_ds.export import drift
from ship_ds.export.bundling import bundle_from_checkpoint
from ship_ds.export.deduce import export_many, own_probes, warn_of_far
from ship_ds.export.merge import MERGE_REPORT, Merge, MergedDtype, MergePlan
from ship_ds.export.requests import Request
from ship_ds.export.targets import TargetName
from ship_ds.files import MANIFEST, sha256, write_json
from ship_ds.origin import read_origin
from ship_ds.parsing import read_json_object
from ship_ds.runtime import checkpoint

_MADE_FROM = "made_from.json"


@dataclass(frozen=True)
class Conversion:
    """What is made of a run beside its bundle.

    Args:
        probes: inputs to prove each adapter on; () for the run's own.
        targets: what each adapter is merged into; () for no merging.
        base: where the base is now, if not where the run had it.
        measures_drift: load base and result to compare their logits.
        device, compute_dtype: where adapters are made, and in which numbers; see `Ship.from_run`.
    """

    requests: Sequence[Request]
    probes: Sequence[str]
    pad_to: int | None
    targets: Sequence[TargetName]
    base: str | None
    dtype: MergedDtype
    shard_gigabytes: float
    measures_drift: bool
    device: str = "auto"
    compute_dtype: str | None = None


def convert(source: Path, out: Path, conversion: Conversion, report: Callable[[str], None]) -> None:
    """Make what is not there yet.

    Args:
        source: a run or a checkpoint.
        out: the folder that takes all of it.
        conversion: what is wanted.
        report: takes one line about each thing that was made or is there already.

    Raises:
        UserError: there is nothing to start from, something in OUT is of another checkpoint, of
            other instructions or another merge, or the run's adapters cannot be merged.
    """
    bundle = find_bundle(source, out / "bundle", report, conversion.base)
    if not conversion.requests:
        report(f"{bundle}: whole; an --instruction or --file makes adapters of it")
        return
    if conversion.targets:
        check_merges("convert", bundle)
    _make_adapters(bundle, out / "adapters", conversion, report)
    for request in conversion.requests:
        for target in conversion.targets:
            merged = out / "merged" / f"{request.name}-{target}"
            adapter = out / "adapters" / request.name
            if merged.exists():
                _check_merged(merged, adapter, target, conversion)
                report(f"{merged}: there already")
            else:
                merge = Merge(
                    adapter, target, conversion.base, conversion.dtype, conversion.shard_gigabytes
                )
                report(
                    describe(merged, merge, merge_into(merged, merge, conversion.measures_drift))
                )


def find_bundle(
    source: Path, out: Path, report: Callable[[str], None], base: str | None = None
) -> Path:
    """The run's own bundle; else one made from the checkpoint given, or from the run's newest good
    one.

    Args:
        source: a run or a checkpoint.
        out: where a bundle goes that has to be made; one that is there already is taken.
        report: takes a line about the bundle that was made, and one about each damaged checkpoint
            that was passed over.
        base: where the base is now; None: where the run had it.

    Returns:
        The bundle's folder.

    Raises:
        UserError: there is neither a bundle nor a whole checkpoint, a frozen model of the
            checkpoint is another one now, or the bundle at `out` is damaged or of another
            checkpoint.
    """
    if (bundle_folder(source) / SHIP_WEIGHTS).is_file():
        return bundle_folder(source)
    is_run = (source / "checkpoints").is_dir()
    chosen = checkpoint.newest_good(source / "checkpoints", report) if is_run else source
    mark = out.with_name(_MADE_FROM)
    if out.exists():
        # Where there is no checkpoint, they have made room since.
        if chosen is not None:
            _check_bundle(out, mark, chosen)
        verify(out)
        return out
    if chosen is None:
        raise UserError(
            f"{source}: has neither a bundle nor a whole checkpoint; train on, or give a "
            "checkpoint's folder"
        )
    check_checkpoint(chosen)
    # Before the bundle: one without a mark is an earlier version's, and taken as it is.
    write_json(mark, _mark_of(chosen))
    bundle_from_checkpoint(chosen, out, base)
    report(f"{out}: bundle of {chosen}")
    verify(out)
    return out


def _check_bundle(out: Path, mark: Path, chosen: Path) -> None:
    """See that the bundle there is of this checkpoint."""
    if not mark.is_file():
        return
    there = read_json_object(mark)
    if there.get("manifest") != _mark_of(chosen)["manifest"]:
        raise UserError(
            f"{out}: is of another checkpoint ({there.get('checkpoint')}) than {chosen}: give "
            "that one, remove what is there, or choose another --out"
        )


def _mark_of(chosen: Path) -> dict[str, str | None]:
    manifest = chosen / MANIFEST
    # A checkpoint without one is refused as its tensors are read.
    digest = sha256(manifest) if manifest.is_file() else None
    return {"checkpoint": str(chosen.resolve()), "manifest": digest}


def _make_adapters(
    bundle: Path, out: Path, conversion: Conversion, report: Callable[[str], None]
) -> None:
    requests = conversion.requests
    if out.exists():
        digest = verify(bundle, hashes=False).files[SHIP_WEIGHTS].sha256
        for request in requests:
            if other := _other_than(out / request.name, request, digest, conversion.pad_to):
                raise UserError(f"{out}: is of {other}; remove it or choose another --out")
        report(f"{out}: there already, {len(requests)} adapters")
        return
    check_leaves("convert", bundle)
    ship = Ship.from_run(bundle, conversion.device, conversion.compute_dtype, conversion.base)
    probes = own_probes(ship, conversion.probes)
    warn_of_far(ship, requests, log)
    batch = export_many(ship, requests, out, probes, conversion.pad_to)
    report(f"{out}: {len(requests)} adapters, peft = live within {batch.worst.from_live:.1e}")


def _other_than(folder: Path, request: Request, bundle: str, pad_to: int | None) -> str | None:
    """Of what else the adapter there is; None: it is the one that is asked for."""
    if not folder.is_dir():
        return f"other instructions (no {folder.name})"
    origin = read_origin(folder)
    if origin.bundle != bundle:
        return f"another checkpoint ({folder.name}: weights {origin.bundle[:12]})"
    if origin.made_from != request.source:
        return f"other instructions ({folder.name}: {origin.made_from!r:.80})"
    if pad_to is not None:
        # What has a rank comes first, as `Export.padded` has it.
        rank = read_json_object(origin.paths(folder)[0] / ADAPTER_CONFIG).get("r")
        if rank != pad_to:
            return f"another --pad-to ({folder.name}: rank {rank})"
    return None


def _check_merged(merged: Path, adapter: Path, target: TargetName, conversion: Conversion) -> None:
    """See that the merged model there is what would be made now, as far as its report says."""
    origin, report = read_origin(adapter), merged / MERGE_REPORT
    plan = MergePlan(
        origin.adapter,
        origin.base_fingerprint,
        target,
        conversion.dtype,
        conversion.shard_gigabytes,
    )
    there = read_json_object(report) if report.is_file() else {}
    for name, expected in asdict(plan).items():
        if there.get(name, expected) != expected:
            raise UserError(
                f"{merged}: is another merge ({name} {there[name]!r:.80}, and {expected!r:.80} is "
                "asked for); remove it or choose another --out"
            )


def merge_into(out: Path, merge: Merge, measures_drift: bool) -> dict[str, Any]:
    """Write the merged model.

    Args:
        out: its folder, which must not exist yet.
        merge: what is merged.
        measures_drift: load base and result to compare their logits.

    Returns:
        What merge.json says, with the drift of the logits where it is measured.

    Raises:
        UserError: the folder is there already, or holds the beginning of another merge; or the disk
            is full.
    """
    if not measures_drift:
        return merge.run(out)
    return merge.run(out, lambda part: drift.drift(part, merge.adapter, merge.folder))


def describe(out: Path, merge: Merge, report: dict[str, Any]) -> str:
    """ "merged: dequantised, 1 shard(s)", a second line on the drift where it was measured, one on
    what `peft` has to load besides, and a warning where the merged weights are not those that
    training saw.

    Args:
        out: the merged model's folder.
        merge: what was merged.
        report: what merge.json says, as `merge_into` returns it.
    """
    num_kept = report["num_shards_kept"]
    earlier = f", {num_kept} of them from a run that was cut off" if num_kept else ""
    lines = [f"{out}: {merge.plan.target}, {report['num_shards']} shard(s){earlier}"]
    if "logit_drift" in report:
        lines.append(f"  {drift.drift_line(report)}")
    for name in report.get("around", ()):
        lines.append(
            f"  {name}/ is the adapter's other part, without which this answers otherwise: "
            f"PeftModel.from_pretrained(model, {str(out / name)!r})"
        )
    if merge.differs_from_training:
        lines.append(f"  warning: {drift.drift_warning(report)}")
    return "\n".join(lines)
