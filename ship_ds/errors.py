"""The one kind of error a user can cause: it ends the program with its message on one line and exit
code 2."""


class UserError(ValueError):
    """Bad input: the message names the file, line or key, what was expected and what to do about
    it."""
