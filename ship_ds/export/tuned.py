"""An adapter that was trained on from a generated one, as a PEFT folder or two: written and proved
as `ship-ds deduce` does, with the curve beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ship_ds.api import Ship
from ship_ds.export.peft_adapter import Exporter
from ship_ds.export.proof import Proof
from ship_ds.files import new_folder, write_text
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.origin import Tuning

TUNING_CURVE = "tune.jsonl"


def export_tuned(
    ship: Ship,
    adapter: Adapter,
    instruction: str,
    tuning: Tuning,
    curve: Sequence[Mapping[str, Any]],
    folder: Path,
    probes: Sequence[str],
    pad_to: int | None = None,
) -> Proof:
    """Write and prove one PEFT folder.

    Args:
        ship: the run that it started from.
        adapter: of one task.
        instruction: whose generated adapter was the start.
        tuning: what was done to it since, for ship.json.
        curve: rows of tune.jsonl.
        folder: where to; it must not exist yet.
        probes: inputs to prove it on.
        pad_to: a rank for servers that take certain ones alone.

    Returns:
        How far it is from the live adapter and from the bare base.

    Raises:
        UserError: the proof fails, and nothing is left behind; or the folder is there already.
    """
    [export] = ship.model.hypernetwork.exports(adapter)
    if pad_to is not None:
        export = export.padded(pad_to)
    exporter = Exporter(ship, probes)
    with new_folder(folder) as part:
        write_text(part / TUNING_CURVE, "".join(json.dumps(row) + "\n" for row in curve))
        return exporter.write(part, export, instruction, instruction, tuning)
