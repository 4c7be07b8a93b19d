"""What a supply has made so far, so that a kill costs one part of the work.

    OUT.journal     line 1: what was asked for; then a line a part, with counts and tasks
    OUT             the tasks, written whole once all parts are done; the journal then goes

A part is a function of the settings and of the parts before it, so work that was cut off ends in
the same bytes as work that was not.
"""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from ship_ds.errors import UserError
from ship_ds.files import write_text

_SUFFIX = ".journal"


class SupplyPart(NamedTuple):
    """What a part of the work came to: how many things met what end, tasks as lines of our format,
    and texts that later parts have to know of."""

    counts: dict[str, int]
    tasks: list[dict[str, Any]]
    tried: Sequence[str] = ()


_PARTS = TypeAdapter(list[SupplyPart])


class Journal:
    """See above; made by `opened`.

    Attributes:
        parts: that are done, in their order.
    """

    def __init__(self, out: Path, file: IO[bytes], parts: list[SupplyPart]) -> None:
        self._out, self._file, self.parts = out, file, parts

    @classmethod
    @contextmanager
    def opened(cls, out: Path, asked: Mapping[str, Any]) -> Iterator["Journal"]:
        """The journal of a file that is to be written; what an earlier process left is taken up.

        Args:
            out: the file.
            asked: everything that what is made depends on.

        Raises:
            UserError: another process writes it now, what was left was made by other settings, or
                the file cannot be written.
        """
        path = journal_of(out)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            # Opened without being emptied: it may be another process's, which only the lock tells.
            file = path.open("a+b")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: name a file that can be written") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{path}: another process writes it; name another file") from None
            # After the lock: this cuts half a line off, which its writer may be about to finish.
            rows = _whole_rows(file)
            # As it comes back from the file, where tuples are lists.
            line = json.loads(json.dumps(dict(asked)))
            # One line alone says what was asked for before anything was made of it.
            if len(rows) < 2:
                file.truncate(0)
                _append(file, line)
            elif rows[0] != line:
                key = next((k for k in line if rows[0].get(k) != line[k]), "setting")
                raise UserError(
                    f"{path}: was begun with another {key}; repeat that command, or remove the file"
                )
            try:
                parts = _PARTS.validate_python(rows[1:])
            except ValidationError:
                raise _damaged(file) from None
            journal = cls(out, file, parts)
            try:
                yield journal
            except Exception:
                # Of what was never begun nothing stays.
                if not parts:
                    journal.drop()
                raise

    @property
    def counts(self) -> Counter[str]:
        """Of all parts."""
        return sum((Counter(part.counts) for part in self.parts), Counter())

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """Of all parts."""
        return [task for part in self.parts for task in part.tasks]

    def add(self, part: SupplyPart) -> None:
        """Keep a part; it is on the disk when this returns."""
        _append(self._file, part._asdict())
        self.parts.append(part)

    def finish(self, tasks: list[dict[str, Any]] | None = None) -> None:
        """Write the file, whole, and drop the journal. tasks: other than those of the parts."""
        rows = self.tasks if tasks is None else tasks
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(self._out, "".join(lines))
        self.drop()

    def drop(self) -> None:
        """Remove what was kept."""
        Path(self._file.name).unlink(missing_ok=True)


def journal_of(out: Path) -> Path:
    """Where the journal of a file is."""
    return out.with_name(out.name + _SUFFIX)


def _whole_rows(file: IO[bytes]) -> list[dict[str, Any]]:
    """The lines that were written to their end; half a line is cut off."""
    file.seek(0)
    data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    file.truncate(len(whole))
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise _damaged(file) from None
    if not all(isinstance(row, dict) for row in rows):
        raise _damaged(file)
    return rows


def _damaged(file: IO[bytes]) -> UserError:
    return UserError(f"{file.name}: damaged; remove it and start again")


def _append(file: IO[bytes], row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
