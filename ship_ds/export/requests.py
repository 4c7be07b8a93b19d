"""What is to be exported: one instruction, a file of them, or saved latents.

A latent file is safetensors with `latent_TZ` and, in its metadata, the SHA-256 of the bundle it
belongs to (a latent means nothing to another run) and one instruction for each z where there is
one.

Instructions are read, and latents checked, without torch: what is wrong with them is told before it
is loaded.

Letters: T tasks, Z latent size.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ship_ds.data.task import Reading
from ship_ds.errors import UserError
from ship_ds.parsing import (
    is_folder_name,
    parse_json,
    read_text,
    split_lines,
    trimmed,
    unicode_text,
)
from ship_ds.safetensors_header import refuse_pointer_file

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LATENT = "latent_TZ"
_FLOATS = ("F32", "F16", "F64")


@dataclass(frozen=True)
class Request:
    """One adapter that is wanted.

    Args:
        name: Of its folder.
        instruction: What it is to do; None where a latent alone is known.
        latent_Z: What it is made from; None until the instruction is encoded.
        made_from: Of what, for the model card; None: of the instruction, or of a saved latent.
        reading: What the encoder read; None: the instruction.
        confidence: `Confidence.summary()` of its answers to the probes, where it was asked for.
        place: Where it was read, for messages, such as "FILE:3"; "": it was given by itself.
    """

    name: str
    instruction: str | None
    latent_Z: "Tensor | None" = None
    made_from: str | None = None
    reading: Reading | None = None
    confidence: "Mapping[str, float | None] | None" = None
    place: str = ""

    @property
    def source(self) -> str:
        """Of what the adapter is made, as its model card and ship.json say it."""
        if self.made_from is not None:
            return self.made_from
        return f"a saved latent ({self.name})" if self.instruction is None else self.instruction


def read_instructions(path: Path) -> list[Request]:
    """Read instructions from a file: one a line, or JSON lines such as
    {"instruction": "reverse the list", "id": "reverse"}, where `id` may be left out.

    Raises:
        UserError: The file is missing or empty, or a row is wrong; with file and line.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected one instruction a line, or .jsonl with an "
            "instruction in each row"
        )
    lines = split_lines(read_text(path))
    is_json = path.suffix.lower() in (".jsonl", ".ndjson")
    requests = _read_rows(path, lines) if is_json else read_lines(lines, str(path))
    if not requests:
        raise UserError(f"{path}: has no instructions; expected one a line")
    _check_names(path, requests)
    return requests


def read_lines(lines: Iterable[str], source: str) -> list[Request]:
    """One instruction a line, named by its number and first words; empty lines are left out.

    Args:
        lines: As they were given.
        source: Of the lines, for messages.
    """
    return [
        _request(f"{source}:{number}", number, line.strip())
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _request(place: str, number: int, instruction: str, name: str | None = None) -> Request:
    return Request(name or f"{number:05d}-{slug(instruction)}", instruction, place=place)


def _read_rows(path: Path, lines: Iterable[str]) -> list[Request]:
    return [
        _request(f"{path}:{n}", n, *_read_row(f"{path}:{n}", line))
        for n, line in enumerate(lines, 1)
        if line.strip()
    ]


def _read_row(place: str, line: str) -> tuple[str, str | None]:
    row = parse_json(line, place, is_line=True)
    if not isinstance(row, dict) or "instruction" not in row:
        raise UserError(f'{place}: expected a JSON object with an "instruction"')
    instruction, name = row["instruction"], row.get("id")
    if (
        not isinstance(instruction, str)
        or not instruction.strip()
        or not isinstance(name, str | None)
    ):
        raise UserError(f"{place}: expected text in instruction (and in id, where it is given)")
    if name is not None and not is_folder_name(name):
        raise UserError(
            f"{place}: id {name[:100]!r} becomes a folder's name: use letters, digits, '.', '_' "
            "and '-', 200 of them at most, and neither .part nor .replaced at the end"
        )
    return unicode_text(trimmed(instruction), f"{place}: instruction"), name


def slug(text: str) -> str:
    """A name of small letters, digits and hyphens for a folder: "Add 3!" -> "add-3"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].rstrip("-") or "instruction"


def _check_names(path: Path, requests: Iterable[Request]) -> None:
    seen: set[str] = set()
    for request in requests:
        if request.name in seen:
            raise UserError(
                f"{path}: id {request.name!r} is there twice; each becomes a folder of its own"
            )
        seen.add(request.name)


def write_latents(
    path: Path, latent_TZ: "Tensor", bundle: str, instructions: Sequence[str | None]
) -> None:
    """Write latents with the digest of the bundle that they belong to and their instructions.

    Args:
        path: Of the file.
        latent_TZ: The latents, on any device.
        bundle: SHA-256 of the bundle that they belong to.
        instructions: One of each latent; None where there is none.
    """
    from safetensors.torch import save_file

    save_file(
        {LATENT: latent_TZ.cpu().contiguous()},
        path,
        {"bundle": bundle, "instructions": json.dumps(list(instructions))},
    )


def read_latents(path: Path, bundle: str, latent_size: int) -> list[Request]:
    """A request for each latent of a file, in their order, with its instruction where it has one.

    Args:
        path: Of the file.
        bundle: SHA-256 of the bundle that they have to belong to.
        latent_size: Z of the run.

    Raises:
        UserError: It is no latent file, or of another run or size; or its numbers are no
            floats that numpy has or not all finite, or its instructions not one a latent.
    """
    import torch

    latent_TZ, instructions = load_latents(path, bundle, latent_size)
    return [
        Request(f"{t:05d}-{slug(text or 'latent')}", text, latent_Z)
        for t, (text, latent_Z) in enumerate(
            zip(instructions, torch.from_numpy(latent_TZ), strict=True)
        )
    ]


def load_latents(
    path: Path, bundle: str, latent_size: int
) -> tuple["np.ndarray[Any, Any]", list[str | None]]:
    """The latents of a file and their instructions, without torch.

    Args:
        path: Of the file.
        bundle: SHA-256 of the bundle that they have to belong to.
        latent_size: Z of the run.

    Returns:
        The latents (T, Z) in fp32, and the instruction of each; None where there is none.

    Raises:
        UserError: It is no latent file, or of another run or size; or its numbers are no
            floats that numpy has or not all finite, or its instructions not one a latent.
    """
    import numpy as np

    try:
        refuse_pointer_file(path)
        with safe_open(path, "np") as file:
            kind, metadata = file.get_slice(LATENT).get_dtype(), file.metadata() or {}
            if kind not in _FLOATS:
                raise UserError(f"{path}: {LATENT} is {kind}; expected {', '.join(_FLOATS)}")
            with np.errstate(over="ignore"):  # what fp32 cannot hold is refused below
                latent_TZ = file.get_tensor(LATENT).astype(np.float32)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: not a latent file: {error}; expected safetensors with {LATENT}"
        ) from None
    if metadata.get("bundle", bundle) != bundle:
        raise UserError(
            f"{path}: was made with another run's weights ({metadata['bundle'][:12]}); "
            "use the run it came from"
        )
    if latent_TZ.ndim != 2 or latent_TZ.shape[1] != latent_size or not np.isfinite(latent_TZ).all():
        raise UserError(
            f"{path}: {LATENT} is {tuple(latent_TZ.shape)}; expected finite numbers, "
            f"rows of {latent_size}"
        )
    texts = parse_json(metadata.get("instructions", "null"), f"{path}: instructions")
    texts = [None] * len(latent_TZ) if texts is None else texts
    if (
        not isinstance(texts, list)
        or len(texts) != len(latent_TZ)
        or not all(isinstance(text, str | None) for text in texts)
    ):
        raise UserError(
            f"{path}: instructions: expected a list of {len(latent_TZ)} texts or nulls, one for "
            "each latent"
        )
    return latent_TZ, texts
