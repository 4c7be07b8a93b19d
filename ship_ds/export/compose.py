"""Several instructions in one adapter: the weighted sum of what they do to the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ship_ds.api import Ship
from ship_ds.export.deduce import check_requests
from ship_ds.export.peft_adapter import Exporter
from ship_ds.export.proof import Proof
from ship_ds.export.requests import Request
from ship_ds.files import new_folder


@dataclass(frozen=True)
class Composition:
    """What was written.

    Args:
        proof: Of the adapter.
        rank: Of the adapter.
        error: Frobenius norm of what compression lost over that of the exact sum; zero when exact.
    """

    proof: Proof
    rank: int
    error: float


def part_requests(parts: Sequence[tuple[float, str]]) -> list[Request]:
    """What is to be summed as requests, each with its place on the command line."""
    texts = [text for _, text in parts]
    return [Request("part", text, place=f"--part {n}") for n, text in enumerate(texts, 1)]


@torch.no_grad()
def compose(
    ship: Ship,
    parts: Sequence[tuple[float, str]],
    folder: Path,
    probes: Sequence[str],
    rank: int | None = None,
) -> Composition:
    """Write the weighted sum of several instructions' LoRAs as one PEFT folder.

    Args:
        ship: The run.
        parts: Weight and instruction of each.
        folder: Where to; it must not exist yet.
        probes: Inputs to prove it on.
        rank: To compress to; None for the exact sum, whose rank is the sum of the parts'.

    Returns:
        Rank, error and proof.

    Raises:
        UserError: The encoder cannot read an instruction, the run's adapters are no LoRAs, the rank
            is too high, or the proof fails.
    """
    check_requests(ship, part_requests(parts))
    adapter = ship.model.adapt(ship.model.encode([text for _, text in parts]))
    exports = ship.model.hypernetwork.exports(adapter)
    weights = [weight for weight, _ in parts]
    total, total_rank, error = type(exports[0]).summed(
        list(zip(weights, exports, strict=True)), rank
    )
    made_from = " + ".join(f"{weight:g} x ({text})" for weight, text in parts)
    with new_folder(folder) as part:
        proof = Exporter(ship, probes).write(part, total, made_from, None)
    return Composition(proof, total_rank, error)
