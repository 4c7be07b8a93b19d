"""A safetensors file written one tensor at a time: nothing but the tensor at hand is in memory.

    with TensorFile(path, names) as file:
        for name in names:
            file.add(name, tensor_of(name))

The library's own `save_file` wants all tensors at once. The header's room is kept free at the start
and filled on leaving the block, so a file that was cut off in between has no header and opens
nowhere.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_ENTRY_BYTES = 200
"""Room in the header for one tensor's dtype, shape and offsets, beside its name."""
_ALIGNMENT = 8
_PIECE_BYTES = 1 << 25


class TensorFile:
    """names: every tensor that may be added. Written under `path` itself; the caller syncs and
    renames. Raises OSError."""

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        self.metadata = {"format": "pt"}
        needed = sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names) + 4096
        self._room = needed + -needed % _ALIGNMENT
        self._entries: dict[str, dict[str, object]] = {}
        self._late: list[tuple[str, Tensor]] = []
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
        self.add_pieces(name, tensor.dtype, tensor.shape, [tensor])

    def add_pieces(
        self, name: str, dtype: torch.dtype, shape: Sequence[int], pieces: Iterable[Tensor]
    ) -> None:
        """A tensor that comes in pieces, in row-major order."""
        if math.prod(shape) * dtype.itemsize % _ALIGNMENT:
            # The next one would start at an address that torch cannot view it from: to the end with
            # it.
            self._late.append(
                (name, torch.cat([piece.reshape(-1) for piece in pieces]).reshape(list(shape)))
            )
        else:
            self._write(name, dtype, shape, pieces)

    def _write(
        self, name: str, dtype: torch.dtype, shape: Sequence[int], pieces: Iterable[Tensor]
    ) -> None:
        start = self._offset
        for piece in pieces:
            assert piece.dtype == dtype
            for part in piece.reshape(-1).split(_PIECE_BYTES // dtype.itemsize):
                self._file.write(part.contiguous().view(torch.uint8).numpy().data)
                self._offset += part.nbytes
        assert self._offset - start == math.prod(shape) * dtype.itemsize, name
        self._entries[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, self._offset],
        }

    def _finish(self) -> None:
        for name, tensor in sorted(self._late, key=lambda late: -late[1].dtype.itemsize):
            self._write(name, tensor.dtype, tensor.shape, [tensor])
        header = json.dumps(
            {"__metadata__": self.metadata, **self._entries}, separators=(",", ":")
        ).encode()
        assert len(header) <= self._room, "more tensors than names"
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
