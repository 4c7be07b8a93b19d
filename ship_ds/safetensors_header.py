"""The header of a safetensors file: where each tensor lies. Read without torch, so that a damaged
download is told before that is loaded."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ship_ds.errors import LFS_POINTER, UserError, lfs_pointer

TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
}
"""The format's dtypes that torch has too, and torch's names of them."""
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4} | dict.fromkeys(
    ("F16", "BF16", "I16", "U16"), 2
)
"""Of a value, where they are more than one."""
_LONGEST = 100_000_000
"""Bytes of a header; the format's own bound."""
_MOST_AXES = 64
"""Of a tensor; torch has the same bound."""


WEIGHTS_INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"


def refuse_pointer_file(path: Path) -> None:
    """Raise UserError for what Git LFS left in the place of a file that is no text, and OSError
    where it cannot be read."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER.encode():
            raise lfs_pointer(path)


def weight_files(folder: Path) -> list[str]:
    """The safetensors files of a model folder, by its index where it has one.

    Raises:
        UserError: there is none, or the index is none, names none, or a file elsewhere.
    """
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        if (folder / SINGLE_FILE).is_file():
            return [SINGLE_FILE]
        raise UserError(
            f"{folder}: has neither {SINGLE_FILE} nor {WEIGHTS_INDEX}{_in_their_place(folder)}; "
            "give the folder of a model saved as safetensors"
        )
    refuse_pointer_file(index)
    try:
        # As transformers reads it: of bytes json would take UTF-16 and a byte order mark, too.
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
        if not files or any(Path(file).name != file for file in files):
            raise ValueError("no file, or a file elsewhere")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{index}: not an index of safetensors files; download the model again"
        ) from None
    return files


def _in_their_place(folder: Path) -> str:
    """`, but ...`: what else there is that somebody may have taken for the weights."""
    if (folder / SINGLE_FILE).is_symlink():
        return f", but a link to {(folder / SINGLE_FILE).readlink()}, which is not there"
    if (folder / SINGLE_FILE).exists():
        return f", but {SINGLE_FILE} as no plain file"
    for pattern, what in (
        ("adapter_model.*", "an adapter of a model, {}"),
        ("*.bin", "pickled weights, {}, which can run code and are never opened"),
        ("*.gguf", "{}, of which `ship-ds base` makes such a folder"),
        ("model-*-of-*.safetensors", "{} without the index that lists it"),
        ("*.safetensors", "{}, which transformers reads under no such name"),
    ):
        if there := sorted(folder.glob(pattern)):
            return ", but " + what.format(there[0].name)
    return ""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: the bytes `start` to `end` of its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Place]:
    """The tensors of a file by name, in the order in which they lie there.

    Raises:
        UserError: it is no safetensors file, is cut short, or has a dtype that torch has not.
    """
    try:
        refuse_pointer_file(path)
        there = path.stat().st_size
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(size) if size <= min(there, _LONGEST) else b""
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; name a file that can be read"
        ) from None
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(one, str) for one in metadata.values()):
            raise ValueError("metadata are texts")
        places = {name: _place(path, name, row, 8 + size) for name, row in header.items()}
    except UserError:
        raise
    # Not JSON, or not the JSON of a header.
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a safetensors file; download the model again") from None
    expected = max((place.end for place in places.values()), default=0)
    if there < expected:
        raise UserError(
            f"{path}: cut short: has {there} bytes of {expected}; download the model again"
        )
    places = dict(sorted(places.items(), key=lambda item: (item[1].start, item[1].end)))
    ends = [8 + size, *(place.end for place in places.values())]
    # As the format's own reader wants it.
    if [*(place.start for place in places.values()), there] != ends:
        raise UserError(
            f"{path}: damaged: its tensors do not follow each other from the header to its last "
            "byte; download the model again"
        )
    return places


def not_finite(path: Path, name: str) -> UserError:
    """The error of a tensor with an infinity, or with what is no number."""
    return UserError(
        f"{path}: {name} has values that are infinite or no numbers; download the model again, or "
        "give another checkpoint of it"
    )


def missing_weight(folder: Path, name: str) -> UserError:
    """The error of a tensor that a model has and its files have not."""
    return UserError(
        f"{folder}: no weight {name} in its safetensors files; its config.json describes another "
        "model"
    )


def other_shape(place: Path, name: str, there: Sequence[int], expected: Sequence[int]) -> UserError:
    """The error of a tensor that is of another shape in `place` than the model has.

    Args:
        place: the file, or the model's folder.
        name: of the tensor.
        there: its shape in the file.
        expected: its shape in the model.

    Returns:
        The error, which the caller raises.
    """
    return UserError(f"{place}: {name} is {tuple(there)}, and config.json says {tuple(expected)}")


def _place(path: Path, name: str, row: dict[str, Any], offset: int) -> Place:
    dtype, shape, (start, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
    if dtype not in TORCH_NAMES:
        raise UserError(f"{path}: {name} is of dtype {dtype}, which is not supported")
    sizes = (*shape, start, end)
    # Of larger ones the product alone would take seconds.
    if len(shape) > _MOST_AXES or not all(type(one) is int and 0 <= one < 1 << 62 for one in sizes):
        raise ValueError("not a size")
    if end - start != prod(shape) * _BYTES.get(dtype, 1):
        raise ValueError("another size than its shape's")
    return Place(dtype, shape, offset + start, offset + end)
