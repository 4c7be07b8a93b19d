"""One line of a sweep file as a run's overrides, for `slurm/train.sh`.

    python -m ship_ds.runtime.sweep sweep.txt 3      # prints the third line's overrides, one a line

Comments (#) and empty lines do not count, so that `--array=1-N` goes over N settings. Quotes are as
in a shell; a word that sets nothing belongs to the value before it: `targets=[q_proj, v_proj]`.
Imports no torch.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ship_ds.console import log_from_any_rank
from ship_ds.errors import UserError
from ship_ds.exit_codes import BAD_INPUT
from ship_ds.parsing import read_text, split_lines

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def overrides_of_line(path: Path, number: int) -> list[str]:
    """The overrides of a sweep's line.

    Args:
        path: the file.
        number: of the line, from 1; those without overrides do not count.

    Raises:
        UserError: there is no such line, or it is none of overrides.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a line of overrides for each array index")
    rows = [
        (place, words)
        for place, line in enumerate(split_lines(read_text(path)), 1)
        if (words := _words(path, place, line))
    ]
    if not 1 <= number <= len(rows):
        raise UserError(
            f"{path}: has {len(rows)} lines of overrides, and the array index is {number}: submit "
            f"with --array=1-{len(rows)}"
        )
    place, words = rows[number - 1]
    overrides: list[str] = []
    for word in words:
        if _OVERRIDE.match(word):
            overrides.append(word)
        elif overrides:
            overrides[-1] += f" {word}"
        else:
            raise UserError(f"{path}: line {place}: {word}: expected section.key=value")
    return overrides


def _words(path: Path, place: int, line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise UserError(f"{path}: line {place}: {str(error).lower()}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the overrides and return 0, or print one line about the input and return 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if len(words) != 2 or not re.fullmatch("[0-9]{1,9}", words[1]):
            raise UserError(f"sweep: {' '.join(words)}: expected a sweep file and a line's number")
        print("\n".join(overrides_of_line(Path(words[0]), int(words[1]))))
    except UserError as error:
        log_from_any_rank(str(error))
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
