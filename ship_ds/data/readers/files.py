"""Which files of a folder are data, and what is in them: names in any case, compressed or not.

`a.jsonl`, `A.JSONL`, `a.ndjson`, `a.jsonl.gz` and `a.jsonl.xz` are of one kind,
".jsonl". What begins with a dot (`._a.jsonl`, `.DS_Store`) was put there by a system, not by a
user, and is passed over.
"""

import bz2
import gzip
import lzma
import os
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ship_ds.data.task import DataError, read_error
from ship_ds.parsing import decode, other_than_utf8, refuse_pointer
from ship_ds.safetensors_header import refuse_pointer_file

FILE_SUFFIXES = (".json", ".jsonl", ".txt", ".parquet", ".arrow")
"""Of files that any reader takes."""
OTHER_SUFFIXES = (".csv", ".tsv", ".xlsx", ".zip", ".tar", ".tgz", ".zst", ".7z", ".rar")
"""Of files that may be data and that no reader takes."""
_OPENERS: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
"""What opens a compressed file, by how its name ends."""
_NAMES = {".ndjson": ".jsonl"}
_MOST_BYTES = 1 << 32
"""Of what a compressed file holds: a few kilobytes can stand for more than there is memory."""
_LONGEST_LINE = 1 << 28
_NOT_TASKS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What `datasets` writes beside its files."""


FIRST_BYTES = 1 << 20
"""Of a file that are looked at for its first row."""
KEY_BYTES = 1 << 26
"""Of one JSON object that are looked at for its keys."""


def kind_of(path: Path) -> str:
    """What a file is by its name, ".jsonl" for a.jsonl, A.JSONL, a.ndjson and a.jsonl.gz; "" for
    what a system or `datasets` has put there."""
    name = path.name.lower()
    if name.startswith(".") or name in _NOT_TASKS:
        return ""
    suffix = Path(name.removesuffix(compression_of(path))).suffix
    return _NAMES.get(suffix, suffix)


def compression_of(path: Path) -> str:
    """How the name of a compressed file ends, such as ".gz"; "" for any other."""
    suffix = path.suffix.lower()
    return suffix if suffix in _OPENERS else ""


def stem_of(path: Path) -> str:
    """The name without what says its kind: "a" of a.jsonl and of a.jsonl.gz."""
    return Path(path.name[: len(path.name) - len(compression_of(path))]).stem


def files_of(path: Path, kinds: Collection[str], *, below: bool = False) -> list[Path]:
    """The file itself, or the files of the folder, of these kinds, in the order of their names.

    Args:
        path: a file or folder.
        kinds: such as ".jsonl".
        below: those of its folders as well.

    Raises:
        DataError: one of them is a link to what is not there.
    """
    files = files_and_dead_links(path, kinds, below=below)
    for file in files:
        if not file.exists():
            raise DataError(
                f"{file}: a link to {os.readlink(file)}, which is not there; put the file there, "
                "or remove the link"
            )
    return files


def files_and_dead_links(path: Path, kinds: Collection[str], *, below: bool = False) -> list[Path]:
    """As `files_of`, for who only counts them: a link to what is not there is one, too.

    Args:
        path: a file or folder.
        kinds: such as ".jsonl".
        below: those of its folders as well.
    """
    paths = [path] if path.is_file() else sorted(path.rglob("*") if below else path.glob("*"))
    return [
        file
        for file in paths
        if kind_of(file) in kinds and (file.is_file() or (file.is_symlink() and not file.exists()))
    ]


def check_there(path: Path) -> None:
    """A file or a folder is there. Raises DataError."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if not (path.is_file() or path.is_dir()):
        raise DataError(
            f"{path}: is a pipe or a device, and data are read more than once; write them to a "
            "file, and name that"
        )


def opened(path: Path) -> IO[bytes]:
    """The file, open to read; what is compressed is read as what it holds.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        opener = _OPENERS.get(compression_of(path))
        file: IO[bytes] = path.open("rb") if opener is None else opener(path)
        return file
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; name a file that can be read"
        ) from None


def read_whole(path: Path) -> str:
    """The text of a file.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    with opened(path) as file:
        content = _read(file, _MOST_BYTES, path)
    if len(content) == _MOST_BYTES:
        raise DataError(f"{path}: holds more than {_MOST_BYTES >> 30} GiB; cut it into several")
    return decode(content, str(path))


def head(path: Path, num_bytes: int) -> str:
    """The beginning of a file, as far as it is text. Raises DataError where it cannot be read."""
    with opened(path) as file:
        return _read(file, num_bytes, path).decode("utf-8-sig", errors="replace")


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(3, its text) for each line that is not blank, numbered from 1; lines end as on any system.

    U+2028 and its like, which Python takes for ends of lines, may stand inside a JSON text.

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8.
    """
    number = 0
    with opened(path) as file:
        while part := _read(file, _LONGEST_LINE, path, line=True):
            if len(part) == _LONGEST_LINE:
                raise read_error(
                    path, f"line {number + 1}", f"longer than {_LONGEST_LINE >> 20} MiB"
                )
            # An old Mac's lines end with a carriage return alone; JSON has it nowhere else.
            for line in re.split(rb"\r(?!\n)", part.rstrip(b"\r\n")):
                number += 1
                text = line.removeprefix(BOM_UTF8) if number == 1 else line
                if text.strip():
                    yield number, _line(text, path, number)


def _line(line: bytes, path: Path, number: int) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise read_error(
            path,
            f"line {number}",
            f"not UTF-8 at its byte {error.start}; "
            + (other_than_utf8(line) if number == 1 else "save it as UTF-8"),
        ) from None
    if number == 1:
        refuse_pointer(text, str(path))
    return text


def _read(file: IO[bytes], num_bytes: int, path: Path, *, line: bool = False) -> bytes:
    try:
        return file.readline(num_bytes) if line else file.read(num_bytes)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if compression_of(path):
            refuse_pointer_file(path)
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}; save it again") from None
