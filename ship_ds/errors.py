"""The one kind of error a user can cause: it ends the program with its message on one line and exit
code 2."""


class UserError(ValueError):
    """Bad input: the message names the file, line or key, what was expected and what to do about
    it."""


def first_line(error: BaseException) -> str:
    """`OutOfMemoryError: CUDA out of memory.`: an exception's class and first line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
