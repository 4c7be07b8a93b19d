"""`ship-ds VERB`: thin layers over the library, one file a panel of its help.

    ship-ds --help                      the verbs
    ship-ds deduce --help               what one takes
    ship-ds --install-completion        the shell completes verbs and options

Bad input is one line on standard error and exit code 2. It is found before torch is imported where
it can be: what a verb needs for that is in checks.py, and whatever loads a model is imported inside
the verbs, so that a mistyped name costs a fraction of a second.
"""

import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from ship_ds.allocator import use_scalable_malloc
from ship_ds.cli import converting, inspecting, serving, supplying, training, using
from ship_ds.cli.verb import PANELS, app
from ship_ds.console import log_from_any_rank
from ship_ds.errors import UserError
from ship_ds.exit_codes import BAD_INPUT, INTERRUPTED
from ship_ds.files import refuse_other_writers, refused_paths
from ship_ds.parsing import unicode_text

__all__ = [
    "app",
    "converting",
    "inspecting",
    "main",
    "run",
    "serving",
    "supplying",
    "training",
    "using",
]

# Each file registers its verbs as it is imported, and imports are sorted by name.
app.registered_commands.sort(key=lambda verb: PANELS.index(str(verb.rich_help_panel)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: as a user types them, the verb first; None: those of this process.

    Returns:
        The exit code.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    try:
        for text in typed:
            unicode_text(text, "arguments")
        # obj: what `evaluate` writes into its report as the command to repeat.
        with refused_paths():
            return app(args=typed, prog_name="ship-ds", standalone_mode=False, obj=typed) or 0
    except UserError as error:
        log_from_any_rank(str(error))
    except TyperException as error:
        log_from_any_rank(_usage(error))
    except BrokenPipeError:
        # The reader of a pipe, such as head, has enough. Python would flush to it once more as it
        # exits, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except typer.Abort:
        return INTERRUPTED
    return BAD_INPUT


def _usage(error: TyperException) -> str:
    """Typer's message on one line, such as "train: missing option '--config'; see ..."."""
    message = " ".join(error.format_message().split()).removesuffix(".")
    message = message.replace(": Value error, ", ": ")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "ship-ds"
    verb = command.removeprefix("ship-ds").strip()
    place = f"{verb}: " if verb else ""
    return f"{place}{message[:1].lower()}{message[1:]}; see `{command} --help`"


def run() -> NoReturn:
    """The console script."""
    # Here and not in the verb: who calls `main` has a process of his own, which is not started
    # again.
    if sys.argv[1:2] == ["train"]:
        use_scalable_malloc()
    refuse_other_writers()
    # A terminal whose locale lacks a letter gets its escape, not a traceback.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
    except Exception:
        # Not raised, since the ranks of a process group end by `exit_process` below.
        sys.excepthook(*sys.exc_info())
        code = 1
    if "torch" not in sys.modules:
        sys.exit(code)
    from ship_ds.runtime import ranks

    ranks.exit_process(code)
