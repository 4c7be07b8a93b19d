"""What the verbs share: the program, its parser, options that several have, and rows of JSON."""

import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ship_ds import __version__
from ship_ds.console import log_from_any_rank
from ship_ds.errors import UserError, did_you_mean
from ship_ds.exit_codes import INTERRUPTED

EXIT_CODES = "\n\n".join(
    (
        "Exit codes:",
        "0: done.",
        "1: a crash, with its traceback; the reader of a pipe closed it; another rank has ended; "
        "or a part of `ship-ds compare` failed, which its last lines name.",
        "2: bad input, a full disk, steps that stay not finite, or a plan that does not fit: one "
        "line says what to change.",
        "75: preempted, after a checkpoint: start the same command again.",
        "76: hung: no step for training.hang_minutes, stacks are in the log.",
        "77: no checkpoint within training.grace_seconds of the signal: the one before holds.",
        "130: interrupted from the keyboard.",
        "137: killed, often for memory, or as a rank without a sign of life: read what is before.",
        "138: USR1 while the ranks were still starting: start the same command again.",
    )
)
PANELS = ("Train", "Use", "Inspect", "Convert")
"""Of the help, in its order."""
_SEVERAL = ("--input", "--probe", "--runs", "--part")
_LOOKS_LIKE_AN_OPTION = re.compile(r"--?[A-Za-z]\S*")


class Verb(TyperCommand):
    """A verb's parser, which takes two things that typer's own does not.

    Several values after one option:

        --probe "3 7" "1 2"     is     --probe "3 7" --probe "1 2"

    Texts that begin with a hyphen, as inputs do: `answer "negate it" "-3 4"`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what follows the verb."""
        options = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        # With unknown options ignored, a text that begins with a hyphen is an argument; what was
        # meant as an option is told apart here.
        ctx.ignore_unknown_options = True
        if not ctx.resilient_parsing:  # it is on while a shell completes half a word
            _refuse_unknown(args, options, ctx.command_path)
        return super().parse_args(ctx, list(_one_value_each(args, options)))

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; typer would end one that is interrupted without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            log_from_any_rank("interrupted")
            return INTERRUPTED


def _refuse_unknown(args: list[str], options: Collection[str], command: str) -> None:
    for text in args[: args.index("--")] if "--" in args else args:
        name = text.partition("=")[0]
        if _LOOKS_LIKE_AN_OPTION.fullmatch(text) and name not in options:
            raise UserError(
                f"{command.removeprefix('ship-ds ')}: no option {name}"
                + (did_you_mean(name, options) or f"; see `{command} --help`")
            )


def _one_value_each(args: list[str], options: Collection[str]) -> Iterator[str]:
    """The option again before each of its values; `--option=value` is the first of them."""
    several = None
    num_values = 0
    for text in args:
        name, has_value, _ = text.partition("=")
        if name in options or text == "--":
            several, num_values = (name if name in _SEVERAL else None), len(has_value)
        elif several is not None:
            num_values += 1
            if num_values > 1:
                yield several
        yield text


app = typer.Typer(
    name="ship-ds",
    help="Instructions to model parameters and back.",
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
)


def verb(panel: str) -> Callable[..., Any]:
    """The decorator of a verb: `@verb("Train")`; the function's docstring is its help."""
    return app.command(cls=Verb, rich_help_panel=panel)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"ship-ds {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def program(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="print the version"),
    ] = False,
) -> None:
    """Instructions to model parameters and back."""
    if context.invoked_subcommand is None:
        raise UserError("which verb? `ship-ds --help` lists them")


RunOption = Annotated[Path, typer.Option("--run", help="a run or bundle folder")]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", help="where the base model is now, if not where the run was trained"),
]
OutOption = Annotated[Path, typer.Option("--out", help="the folder to write")]
ConfigOption = Annotated[str, typer.Option("--config", help="a recipe's name or a YAML file")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="see `ship-ds config`")
]
ProbesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--probe", metavar="INPUT...", help="inputs to prove it on; default: the run's own"
    ),
]
PadToOption = Annotated[
    int | None,
    typer.Option(min=1, help="LoRA rank to reach with zero rows; the function stays the same"),
]
FileOption = Annotated[
    str | None,
    typer.Option(
        "--file", help='JSON lines, {"input": ..., "target": ...}; default: standard input'
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", help="cpu, cuda or cuda:N; auto: the GPU, where torch sees one"),
]
DtypeOption = Annotated[
    str,
    typer.Option("--dtype", help="bfloat16 or float32; auto: bfloat16 on a GPU, else float32"),
]
SeedOption = Annotated[int, typer.Option(min=0, max=10**12, help="of everything that is drawn")]
PartsOption = Annotated[str, typer.Option(help="of seen, dev, unseen, unseen_paraphrase")]
DirectionsOption = Annotated[
    str, typer.Option(help="of deduction, induction, reasoning, reconstruction; or all")
]
MethodsOption = Annotated[str, typer.Option(help="comma-separated names, or all")]
BudgetOption = Annotated[
    str, typer.Option(help="of each baseline's training: minutes, examples or until_dev_stops")
]
PatienceOption = Annotated[
    int, typer.Option(help="with --budget until_dev_stops: looks at dev without a gain")
]
NumLooksOption = Annotated[int, typer.Option(help="at dev while a baseline trains, for its curve")]
SetMethodOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="METHOD.key=value", help="a number of a method"),
]
NumTasksOption = Annotated[int, typer.Option(help="of each part at most, evenly spaced")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of text")]


def print_row(row: dict[str, Any]) -> None:
    """One line of JSON on standard output."""
    print(json.dumps(row, ensure_ascii=False), flush=True)
