"""A model folder's safetensors shards, read one tensor at a time."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ship_ds.errors import UserError
from ship_ds.tensor_file import DTYPES

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Entry:
    """Where a tensor is; start and end count from the beginning of the file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class BaseWeights:
    """Raises UserError naming the folder or shard that is missing, cut short or not safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for file in self._files():
            self.entries |= {
                name: entry
                for name, entry in sorted(self._read_header(file).items(), key=lambda e: e[1].start)
            }

    def _files(self) -> list[str]:
        index = self.folder / INDEX
        if index.is_file():
            return sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        raise UserError(
            f"{self.folder}: has neither {SINGLE} nor {INDEX}; give the folder of a "
            "model saved as safetensors"
        )

    def _read_header(self, file: str) -> dict[str, Entry]:
        path = self.folder / file
        if not path.is_file():
            raise UserError(
                f"{path}: this shard is missing, and {INDEX} lists it; download the model again"
            )
        with path.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            try:
                header: dict[str, Any] = json.loads(opened.read(size))
            except (ValueError, MemoryError, OverflowError):
                raise UserError(
                    f"{path}: not a safetensors file; download the model again"
                ) from None
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            found[name] = Entry(
                file, _TORCH_DTYPES[entry["dtype"]], tuple(entry["shape"]), start, end
            )
        expected, there = (
            max((entry.end for entry in found.values()), default=0),
            path.stat().st_size,
        )
        if there < expected:
            raise UserError(
                f"{path}: cut short: has {there} bytes of {expected}; download the model again"
            )
        return found

    def get(self, name: str) -> Tensor:
        """A view of the file's pages: it takes no memory of the process's own."""
        entry = self.entries[name]
        try:
            with safe_open(self.folder / entry.file, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(
                f"{self.folder / entry.file}: {error}; download the model again"
            ) from None
        return tensor

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes, dtypes and the first 4 KiB of every tensor: tells fine-tunes
        of one model apart without reading all of it, and does not depend on how the tensors are
        spread over shards."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            with (self.folder / entry.file).open("rb") as file:
                file.seek(entry.start)
                sample = file.read(min(_SAMPLE_BYTES, entry.end - entry.start))
            digest.update(f"{name} {entry.shape} {entry.dtype}".encode() + sample)
        return digest.hexdigest()
