"""Instructions or latents -> PEFT folders: one forward of encoder and hypernetwork for many, a
proof for each.

Letters: T tasks, Z latent size.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ship_ds.adapter_files import ADAPTER_WEIGHTS, weights_digest
from ship_ds.api import Ship
from ship_ds.errors import UserError
from ship_ds.export.peft_adapter import Exporter
from ship_ds.export.proof import Proof
from ship_ds.export.requests import Request, write_latents
from ship_ds.files import disk_error, new_folder, part_of, publish, refuse_existing
from ship_ds.inference import checks
from ship_ds.model import budget
from ship_ds.model.adapters.adapter import Export
from ship_ds.origin import ORIGIN, read_origin

LATENT_FILE = "latent.safetensors"
_MOST_NAMED = 5
"""Instructions that a warning names."""


def export_one(
    ship: Ship, request: Request, folder: Path, probes: Sequence[str], pad_to: int | None = None
) -> Proof:
    """Write and prove one PEFT folder.

    Args:
        ship: The run.
        request: What to make an adapter of.
        folder: Where to; it must not exist yet.
        probes: Inputs to prove it on.
        pad_to: A rank for servers that take certain ones alone.

    Returns:
        How far it is from the live adapter and from the bare base.

    Raises:
        UserError: The encoder cannot read the instruction, or the proof fails, and nothing is left
            behind; or the folder is there already.
    """
    check_requests(ship, [request])
    exporter = Exporter(ship, probes)
    with new_folder(folder) as part:
        [(encoded, export)] = generate(ship, [request], pad_to)
        return _write(exporter, part, encoded, export)


def check_requests(ship: Ship, requests: Sequence[Request]) -> None:
    """Refuse an instruction that the encoder cannot read, before any adapter is made.

    Raises:
        UserError: It is empty, too long, or has what would not be read as it stands; with the place
            of the first such one.
    """
    for request in requests:
        if request.latent_Z is not None or request.instruction is None:
            continue
        try:
            checks.check_instruction(ship.model, request.instruction)
        except UserError as error:
            raise UserError(f"{request.place}: {error}" if request.place else str(error)) from None


def own_probes(ship: Ship, probes: Sequence[str], answer_tokens: int = 0) -> Sequence[str]:
    """A user's probes; none: the run's.

    Args:
        ship: The run.
        probes: Inputs; a proof compares their logits.
        answer_tokens: Of each that will be answered besides.

    Raises:
        UserError: The Task LLM cannot read one of them.
    """
    if not probes:
        return ship.probes
    try:
        checks.check_inputs(ship.model, probes, answer_tokens)
    except UserError as error:
        raise UserError(f"--probe: {error}") from None
    return probes


def warn_of_far(ship: Ship, requests: Sequence[Request], report: Callable[[str], None]) -> None:
    """Report in one line which instructions are far from all that the run was trained on, where any
    are.

    Args:
        ship: The run.
        requests: What to make adapters of; those that have a latent are not compared.
        report: Takes the line.

    Raises:
        UserError: The encoder cannot read an instruction.
    """
    check_requests(ship, requests)
    if far := _far_ones(ship, requests):
        named = ", ".join(one.place or one.name for one in far[:_MOST_NAMED])
        more = f" and {len(far) - _MOST_NAMED} more" if len(far) > _MOST_NAMED else ""
        report(
            f"{len(far)} of {len(requests)} instructions are far from the instructions this run "
            f"was trained on ({named}{more}): test what these do before you rely on them"
        )


def _far_ones(ship: Ship, requests: Sequence[Request]) -> list[Request]:
    """Those whose instruction is far from all that the run was trained on (`Ship.familiarity`)."""
    read = [one for one in requests if one.latent_Z is None and one.instruction is not None]
    familiarities = ship.familiarities([str(one.instruction) for one in read])
    # None at all where the run knows too few to compare with.
    return [one for one, how in zip(read, familiarities, strict=False) if how.is_far]


@dataclass(frozen=True)
class Batch:
    """What `export_many` did.

    Args:
        num_written: Adapters that it wrote.
        num_kept: Adapters that a killed run had left whole.
        worst: The largest difference from a live adapter and the smallest from the base.
    """

    num_written: int
    num_kept: int
    worst: Proof


def export_many(
    ship: Ship,
    requests: Sequence[Request],
    folder: Path,
    probes: Sequence[str],
    pad_to: int | None = None,
    each: Callable[[int], None] = lambda done: None,
) -> Batch:
    """Write and prove a PEFT folder for each request.

    Until the last one is proved, `folder` is called FOLDER.part; after a kill the same command goes
    on there. Another one takes over what it asks for too, and removes the rest.

    Args:
        ship: The run.
        requests: What to make adapters of; each becomes FOLDER/NAME.
        folder: Where to; it must not exist yet.
        probes: Inputs to prove each on.
        pad_to: A rank for servers that take certain ones alone.
        each: Is told after every adapter how many are done.

    Raises:
        UserError: The encoder cannot read an instruction, or a proof fails, and nothing is left
            behind; or the disk is full.
    """
    check_requests(ship, requests)
    # FOLDER.part is kept on purpose where `new_folder` would begin with an empty one.
    refuse_existing(folder)
    part, exporter = part_of(folder), Exporter(ship, probes)
    proofs: list[Proof] = []
    num_kept = 0
    try:
        part.mkdir(parents=True, exist_ok=True)
        _remove_others(part, requests)
        for request, export in generate(ship, requests, pad_to):
            proof = _finished(part / request.name, exporter, request, export)
            num_kept += proof is not None
            proofs.append(proof or _write_beside(exporter, part / request.name, request, export))
            each(len(proofs))
        publish(part, folder)
    except OSError as error:
        raise disk_error(
            part, error, f"{part} keeps what is written; make room and run the same command again"
        ) from None
    except UserError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    worst = Proof(
        max(proof.from_live for proof in proofs), min(proof.from_base for proof in proofs)
    )
    return Batch(len(proofs) - num_kept, num_kept, worst)


def _remove_others(part: Path, requests: Sequence[Request]) -> None:
    """What a killed run of other requests left would else become a part of FOLDER."""
    names = {request.name for request in requests}
    for path in part.iterdir():
        if path.name in names:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _finished(folder: Path, exporter: Exporter, request: Request, export: Export) -> Proof | None:
    """The proof of this very adapter, where an earlier start wrote it here and its weights are as
    they were; else None."""
    if not (folder / ORIGIN).is_file():
        return None
    origin = read_origin(folder)
    paths = origin.paths(folder)
    if not all((path / ADAPTER_WEIGHTS).is_file() for path in paths):
        return None
    expected = (
        exporter.ship.digest,
        exporter.fingerprint,
        request.source,
        export.shape(),
        weights_digest(paths),
        None,
        export.folders(),
    )
    actual = (
        origin.bundle,
        origin.base_fingerprint,
        origin.made_from,
        origin.shape,
        origin.adapter,
        origin.tuning,
        origin.folders,
    )
    if actual != expected:
        return None
    return Proof(origin.proof["from_live"], origin.proof["from_base"])


def _write_beside(exporter: Exporter, folder: Path, request: Request, export: Export) -> Proof:
    """Write into FOLDER.part first, so that a killed run leaves no half adapter under a whole one's
    name."""
    inner = part_of(folder)
    shutil.rmtree(inner, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    inner.mkdir()
    proof = _write(exporter, inner, request, export)
    inner.rename(folder)
    return proof


@torch.no_grad()
def generate(
    ship: Ship, requests: Sequence[Request], pad_to: int | None = None
) -> Iterator[tuple[Request, Export]]:
    """Make adapters, many in one forward of encoder and hypernetwork.

    Args:
        ship: The run.
        requests: What to make adapters of; their instructions have been checked (`check_requests`).
        pad_to: A rank for servers that take certain ones alone; None: each keeps its own.

    Yields:
        Each request, now with the latent that it was encoded to, and its adapter.

    Raises:
        UserError: The run's adapters have no file format, or no rank to pad, or a higher one.
    """
    size = ship.model.adapter_bytes_of([r.reading or r.instruction for r in requests])
    at_once = max(1, budget.bytes_free(ship.model.device) // size)
    for start in range(0, len(requests), at_once):
        chunk = requests[start : start + at_once]
        texts = [r.instruction for r in chunk if r.latent_Z is None and r.instruction is not None]
        encoded = iter(ship.model.encode(texts) if texts else ())
        latents = [
            next(encoded) if r.latent_Z is None else r.latent_Z.to(ship.model.device) for r in chunk
        ]
        latent_TZ = torch.stack(latents)
        exports = ship.model.hypernetwork.exports(
            ship.model.adapt(latent_TZ, [r.reading or r.instruction for r in chunk])
        )
        if pad_to is not None:
            exports = [export.padded(pad_to) for export in exports]
        for request, latent_Z, export in zip(chunk, latent_TZ, exports, strict=True):
            yield replace(request, latent_Z=latent_Z), export


def _write(exporter: Exporter, part: Path, request: Request, export: Export) -> Proof:
    assert request.latent_Z is not None
    write_latents(
        part / LATENT_FILE, request.latent_Z[None], exporter.ship.digest, [request.instruction]
    )
    return exporter.write(
        part, export, request.source, request.instruction, confidence=request.confidence
    )
