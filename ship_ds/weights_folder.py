"""The safetensors files of a model folder: their tensors by name, read one at a time.

weights = WeightsFolder(Path("models/llama"))
weights.entries["lm_head.weight"].shape     # from the headers, before anything is read
weights.read("lm_head.weight")
"""

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

WEIGHTS_INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, and the bytes `start` to `end` of that file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class WeightsFolder:
    """The tensors of a model folder, in one safetensors file or in several with an index.

    Opening reads the headers and compares them with the files' sizes; it reads no weight.

    Args:
        folder: With model.safetensors, or with model.safetensors.index.json and what that lists.

    Raises:
        UserError: A file is missing, cut short or not safetensors; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: tuple[str, Any] | None = None
        self.entries: dict[str, Entry] = {}
        for file in self._files():
            self.entries |= _read_header(folder / file)

    @staticmethod
    def is_one(folder: Path) -> bool:
        """Whether the folder has its weights as safetensors."""
        return (folder / SINGLE_FILE).is_file() or (folder / WEIGHTS_INDEX).is_file()

    def _files(self) -> list[str]:
        index = self.folder / WEIGHTS_INDEX
        if index.is_file():
            try:
                return sorted(
                    set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                )
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(
                    f"{index}: not an index of safetensors files; download the model again"
                ) from None
        if (self.folder / SINGLE_FILE).is_file():
            return [SINGLE_FILE]
        raise UserError(
            f"{self.folder}: has neither {SINGLE_FILE} nor {WEIGHTS_INDEX}; give the folder of a "
            "model saved as safetensors"
        )

    def read(self, name: str) -> Tensor:
        """A tensor, backed by the file's pages until it is copied: it takes no memory of the
        process's own."""
        path = self.folder / self.entries[name].file
        try:
            # One file is open at a time: a large model has a hundred and more.
            if self._open is None or self._open[0] != path.name:
                self._open = path.name, safe_open(path, framework="pt")
            tensor: Tensor = self._open[1].get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path}: damaged ({error}); download the model again") from None
        return tensor

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes, dtypes and the first 4 KiB of every tensor: tells fine-tunes
        of one model apart without reading all of it, and does not depend on how the tensors are
        spread over files."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            with (self.folder / entry.file).open("rb") as file:
                file.seek(entry.start)
                sample = file.read(min(_SAMPLE_BYTES, entry.end - entry.start))
            digest.update(f"{name} {entry.shape} {entry.dtype}".encode() + sample)
        return digest.hexdigest()


def _read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file, in the order in which they lie there."""
    if not path.is_file():
        raise UserError(
            f"{path}: this file is missing, and {WEIGHTS_INDEX} lists it; download the model again"
        )
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header: dict[str, Any] = json.loads(file.read(size))
        # The first eight bytes of another file ask for more memory than there is.
        except (ValueError, MemoryError, OverflowError):
            raise UserError(f"{path}: not a safetensors file; download the model again") from None
    header.pop("__metadata__", None)
    entries = {}
    for name, row in header.items():
        if row["dtype"] not in _TORCH_DTYPES:
            raise UserError(f"{path}: {name} is of dtype {row['dtype']}, which is not supported")
        start, end = (8 + size + offset for offset in row["data_offsets"])
        entries[name] = Entry(
            path.name, _TORCH_DTYPES[row["dtype"]], tuple(row["shape"]), start, end
        )
    expected = max((entry.end for entry in entries.values()), default=0)
    if (there := path.stat().st_size) < expected:
        raise UserError(
            f"{path}: cut short: has {there} bytes of {expected}; download the model again"
        )
    return dict(sorted(entries.items(), key=lambda item: item[1].start))
