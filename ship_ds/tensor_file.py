"""A safetensors file written one tensor at a time, with no other tensor in memory.

    with TensorFile(path, names) as file:
        for name in names:
            file.add(name, tensor_of(name))

The library's own `save_file` wants all tensors at once. In a safetensors file the header, which
says where each tensor lies, comes first; here its room is kept free and filled when the block ends,
so that a file that was cut off in between has no header and opens nowhere.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ship_ds.safetensors_header import TORCH_NAMES

DTYPES = {getattr(torch, theirs): name for name, theirs in TORCH_NAMES.items()}
"""torch's dtypes and their names in the format."""
_ENTRY_BYTES = 200
"""Room in the header for one tensor's dtype, shape and offsets, beside its name."""
_ALIGNMENT = 8
_CHUNK_BYTES = 1 << 25


class TensorFile:
    """A safetensors file that is open for writing; to be used in a `with` block.

    Args:
        path: Written under this very name; the caller syncs and renames.
        names: Every tensor that may be added; the header's room is measured by them.

    Raises:
        OSError: From its methods, when the disk is full.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        self.metadata = {"format": "pt"}
        needed = sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names) + 4096
        self._room = needed + -needed % _ALIGNMENT
        self._entries: dict[str, dict[str, object]] = {}
        self._unaligned: list[tuple[str, Tensor]] = []
        self._offset = 0

    def __enter__(self) -> "TensorFile":
        self._file = self.path.open("wb")
        self._file.seek(8 + self._room)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor."""
        self.add_pieces(name, tensor.dtype, tensor.shape, [tensor])

    def add_pieces(
        self, name: str, dtype: torch.dtype, shape: Sequence[int], pieces: Iterable[Tensor]
    ) -> None:
        """Write a tensor that comes in pieces.

        Args:
            name: Of the tensor.
            dtype: Of the tensor, and of every piece.
            shape: Of the whole tensor.
            pieces: Its values in row-major order, cut anywhere.
        """
        if math.prod(shape) * dtype.itemsize % _ALIGNMENT:
            # The tensor after it would start at an address that torch cannot map it from, so this
            # one waits until all others are written.
            flat = torch.cat([piece.reshape(-1) for piece in pieces])
            self._unaligned.append((name, flat.reshape(list(shape))))
        else:
            self._write(name, dtype, shape, pieces)

    def _write(
        self, name: str, dtype: torch.dtype, shape: Sequence[int], pieces: Iterable[Tensor]
    ) -> None:
        start = self._offset
        for piece in pieces:
            assert piece.dtype == dtype
            # A view of part of a tensor may have to be copied to be contiguous: part by part.
            for chunk in piece.reshape(-1).split(_CHUNK_BYTES // dtype.itemsize):
                self._file.write(chunk.contiguous().view(torch.uint8).numpy().data)
                self._offset += chunk.nbytes
        assert self._offset - start == math.prod(shape) * dtype.itemsize, name
        self._entries[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, self._offset],
        }

    def _finish(self) -> None:
        # Wide dtypes first: each then starts at a multiple of its own width.
        for name, tensor in sorted(self._unaligned, key=lambda row: -row[1].dtype.itemsize):
            self._write(name, tensor.dtype, tensor.shape, [tensor])
        header = json.dumps(
            {"__metadata__": self.metadata, **self._entries}, separators=(",", ":")
        ).encode()
        assert len(header) <= self._room, "more tensors than names"
        self._file.seek(0)
        # Spaces after a header are part of the format.
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
