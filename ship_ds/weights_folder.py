"""The safetensors files of a model folder: their tensors by name, read one at a time.

weights = WeightsFolder(Path("models/llama"))
weights.entries["lm_head.weight"].shape     # from the headers, before anything is read
weights.read("lm_head.weight")
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ship_ds.errors import UserError
from ship_ds.parsing import read_json_object
from ship_ds.safetensors_header import (
    SINGLE_FILE,
    WEIGHTS_INDEX,
    not_finite,
    read_header,
    weight_files,
)
from ship_ds.tensor_file import DTYPES

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
        for file in weight_files(folder):
            self.entries |= _read_header(folder / file)

    @staticmethod
    def is_one(folder: Path) -> bool:
        """Whether the folder has its weights as safetensors."""
        return (folder / SINGLE_FILE).is_file() or (folder / WEIGHTS_INDEX).is_file()

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

    def read_numbers(self, name: str) -> Tensor:
        """As `read`. Raises UserError also for a tensor that `is_finite` is not true of."""
        tensor = self.read(name)
        if not is_finite(tensor):
            raise not_finite(self.folder / self.entries[name].file, name)
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


def is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor are finite numbers, as integers are.

    By its least and its greatest value, in one pass: `isfinite` makes a tensor of its own and takes
    eight times as long.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # for which torch has neither
        tensor = tensor.float()
    return all(bool(one.isfinite()) for one in torch.aminmax(tensor))


def settings_fingerprint(folder: Path) -> str:
    """SHA-256 over what config.json says of how the model computes: with other settings the same
    weights are another model."""
    settings = read_json_object(folder / "config.json")
    kept = {key: value for key, value in settings.items() if not _SAYS_NOTHING.fullmatch(key)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


_SAYS_NOTHING = re.compile(
    r"_.*|transformers_version|(torch_)?dtype|use_cache|\w*_token_id|auto_map"
)
"""Settings that differ between copies of one model: who wrote it, and what generation reads."""


def _read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file, in the order in which they lie there."""
    if not path.is_file():
        raise UserError(
            f"{path}: this file is missing, and {WEIGHTS_INDEX} lists it; download the model again"
        )
    return {
        name: Entry(path.name, _TORCH_DTYPES[one.dtype], one.shape, one.start, one.end)
        for name, one in read_header(path).items()
    }
