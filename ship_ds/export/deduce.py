"""Instructions or latents -> PEFT folders: one forward of encoder and hypernetwork for many, a
proof for each.

Letters: T tasks, Z latent.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ship_ds.api import Ship
from ship_ds.errors import UserError
from ship_ds.export.peft_adapter import Exportable, Exporter, exports_of
from ship_ds.export.proof import Proof
from ship_ds.export.requests import Request, write_latents
from ship_ds.files import disk_error, new_folder, part_of, publish, refuse_existing, sha256
from ship_ds.lora_folder import ADAPTER_WEIGHTS
from ship_ds.origin import ORIGIN, read_origin

LATENT_FILE = "latent.safetensors"
_CHUNK = 64
"""Instructions encoded, and adapters generated, in one forward."""


def export_one(
    ship: Ship, request: Request, folder: Path, probes: Sequence[str], pad_to: int | None = None
) -> Proof:
    """Raises UserError, leaving nothing behind, when the proof fails."""
    exporter = Exporter(ship, probes)
    with new_folder(folder) as part:
        [(known, export)] = generate(ship, [request], pad_to)
        return _write(exporter, part, known, export)


@dataclass(frozen=True)
class Batch:
    """How many adapters were written and how many a killed run had left; the worst proof."""

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
    """`folder` with one PEFT folder a request. Until the last one is proved it is called
    FOLDER.part; after a kill the same command goes on there. Raises UserError when a proof fails,
    leaving nothing behind."""
    refuse_existing(folder)
    part, exporter = part_of(folder), Exporter(ship, probes)
    proofs: list[Proof] = []
    num_kept = 0
    try:
        part.mkdir(parents=True, exist_ok=True)
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


def _finished(
    folder: Path, exporter: Exporter, request: Request, export: Exportable
) -> Proof | None:
    """Its proof, when a run before this one wrote this very adapter there and the weights are as
    they were."""
    if not (folder / ORIGIN).is_file():
        return None
    origin = read_origin(folder)
    wanted = (
        exporter.ship.digest,
        exporter.fingerprint,
        _made_from(request),
        export.shape(),
        sha256(folder / ADAPTER_WEIGHTS),
    )
    there = (origin.bundle, origin.base_fingerprint, origin.made_from, origin.shape, origin.adapter)
    return Proof(**origin.proof) if wanted == there else None


def _write_beside(exporter: Exporter, folder: Path, request: Request, export: Exportable) -> Proof:
    """Into FOLDER.part first, so that a killed run leaves no half adapter under a whole one's
    name."""
    inner = part_of(folder)
    shutil.rmtree(inner, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    inner.mkdir()
    proof = _write(exporter, inner, request, export)
    inner.rename(folder)
    return proof


def _made_from(request: Request) -> str:
    return (
        request.instruction
        if request.instruction is not None
        else f"a saved latent ({request.name})"
    )


@torch.no_grad()
def generate(
    ship: Ship, requests: Sequence[Request], pad_to: int | None = None
) -> Iterator[tuple[Request, Exportable]]:
    """Each request with its adapter, and with the latent it was made from."""
    for start in range(0, len(requests), _CHUNK):
        chunk = requests[start : start + _CHUNK]
        texts = [r.instruction for r in chunk if r.latent_Z is None and r.instruction is not None]
        encoded = iter(ship.model.encode(texts) if texts else ())
        latents = [
            next(encoded) if r.latent_Z is None else r.latent_Z.to(ship.model.device) for r in chunk
        ]
        latent_TZ = torch.stack(latents)
        exports = exports_of(ship.model.adapt(latent_TZ), len(chunk), pad_to)
        for request, latent_Z, export in zip(chunk, latent_TZ, exports, strict=True):
            yield Request(request.name, request.instruction, latent_Z), export


def _write(exporter: Exporter, part: Path, request: Request, export: Exportable) -> Proof:
    assert request.latent_Z is not None
    write_latents(
        part / LATENT_FILE, request.latent_Z[None], exporter.ship.digest, [request.instruction]
    )
    return exporter.write(part, export, _made_from(request), request.instruction)
