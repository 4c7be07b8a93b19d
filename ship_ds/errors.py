"""The one kind of error a user can cause: it ends the program with its message on one line and exit
code 2."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input: the message names the file, line or key, what was expected and what to do about
    it."""

    def __init__(self, message: str = "") -> None:
        """
        Args:
            message: what a user typed in it, and names of their files, may hold ends of lines.
        """
        super().__init__(" ".join(filter(None, message.splitlines())))


LFS_POINTER = "version https://git-lfs.github.com/spec/"
"""What a file begins with that git-lfs has put in another one's place."""


def lfs_pointer(place: object) -> UserError:
    """The error of such a file."""
    return UserError(
        f"{place}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`, or "
        "download it again"
    )


def first_line(error: BaseException) -> str:
    """`OutOfMemoryError: CUDA out of memory.`: an exception's class and first line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean max_steps?`: the nearest name that there is; "" where none is near."""
    close = get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""
