"""The verbs of the panel "Use": a trained run at work."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ship_ds.cli import checks
from ship_ds.cli.verb import (
    BaseOption,
    DeviceOption,
    DtypeOption,
    FileOption,
    JsonOption,
    OutOption,
    PadToOption,
    ProbesOption,
    RunOption,
    SeedOption,
    print_row,
    verb,
)
from ship_ds.console import log
from ship_ds.errors import UserError
from ship_ds.placement import check_words

if TYPE_CHECKING:
    from ship_ds.api import Ship
    from ship_ds.evaluation.tuning import Tuned
    from ship_ds.export.requests import Request
    from ship_ds.inference.confidence import Confidence
    from ship_ds.inference.config import InductionConfig, InductionMethod, InductionPreset

_PANEL = "Use"
MethodOption = Annotated[
    Literal["union", "propose", "bank", "direct", "indirect"],
    typer.Option(help="where instructions are looked for"),
]
PresetOption = Annotated[
    Literal["ours", "published", "published-refined"],
    typer.Option(help="numbers of direct and indirect: ours, or those of the authors' code"),
]
SetSearchOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="of the search; `ship-ds config induce` lists them"
    ),
]


def open_run(run: Path, device: str, dtype: str, base: str | None = None) -> "Ship":
    """The run, without transformers' bars: standard error is for what a user can act on."""
    from ship_ds.api import Ship
    from ship_ds.runtime import ranks

    ranks.quiet_libraries()
    ranks.log_threads()
    return Ship.from_run(run, device, dtype, base)


@verb(_PANEL)
def deduce(
    run: RunOption,
    out: OutOption,
    instruction: Annotated[str | None, typer.Argument()] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="many: one instruction a line, or .jsonl with instruction and id; a folder each "
            "in --out"
        ),
    ] = None,
    latent: Annotated[
        Path | None, typer.Option(help="a latent.safetensors instead of instructions")
    ] = None,
    examples: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="JSON lines of input and target, read by the encoder in one pass; with or without "
            "an instruction",
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="as --examples, but inputs without targets: one a line, or JSON lines with input",
        ),
    ] = None,
    probe: ProbesOption = None,
    pad_to: PadToOption = None,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> int:
    """Instructions -> PEFT folders, each proved on the way out."""
    check_words(device, dtype)
    from ship_ds.export.requests import Request, read_instructions, read_latents
    from ship_ds.inference.lines import read_inputs, read_pairs

    shown = examples or inputs
    if (instruction or shown, file, latent).count(None) != 2 or (examples and inputs):
        raise UserError(
            "deduce: give one of an instruction, --file, --latent, --examples or --inputs (these "
            "two with an instruction or without)"
        )
    pairs = read_pairs(examples) if examples else []
    texts = read_inputs(inputs) if inputs else []
    requests = read_instructions(file) if file else [Request("adapter", instruction)]
    bundle = checks.check_run(run, base)
    if latent:
        checks.check_latents(latent, bundle)
    checks.check_new(out)
    checks.check_has_file_format("deduce", bundle)  # last: it asks the kind, which imports torch
    from ship_ds.export.deduce import export_many, export_one, own_probes, warn_of_far

    ship = open_run(run, device, dtype, base)
    is_answered = instruction is not None and not shown
    length = ship.config.evaluation.max_new_tokens if is_answered else 0
    probes = own_probes(ship, probe or (), length)
    if latent:
        requests = read_latents(latent, ship.digest, ship.config.model.latent_size)
    if file or len(requests) > 1:
        warn_of_far(ship, requests, log)
        batch = export_many(ship, requests, out, probes, pad_to, _counter(len(requests)))
        earlier = (
            f" ({batch.num_kept} were there from a run that was cut off)" if batch.num_kept else ""
        )
        print(
            f"{out}: {len(requests)} adapters{earlier}; peft = live within "
            f"{batch.worst.from_live:.1e} in each; "
            f"each differs from the bare base by {batch.worst.from_base:.2f} or more"
        )
        return 0
    if shown:
        requests = [_of_examples(ship, pairs, texts, instruction)]
    elif instruction is not None:
        confidence = ship.confidence(instruction, probes)
        requests = [Request("adapter", instruction, confidence=confidence.summary())]
    proof = export_one(ship, requests[0], out, probes, pad_to)
    print(
        f"{out}: peft = live within {proof.from_live:.1e}; differs from the bare base by "
        f"{proof.from_base:.2f}"
    )
    if shown:
        print(f"  made from {requests[0].made_from}")
    elif instruction is not None:
        _show_answers(ship, instruction, probes, confidence)
        _warn_of(ship, instruction, confidence)
    return 0


def _of_examples(
    ship: "Ship",
    pairs: Sequence[tuple[str, str]],
    inputs: Sequence[str],
    instruction: str | None,
) -> "Request":
    """What the encoder makes of examples, or of inputs, as an export wants it."""
    import torch

    from ship_ds.export.requests import Request

    read = ship.read(pairs, instruction, inputs)
    about = f"{len(inputs)} inputs without targets" if inputs else f"{len(pairs)} examples"
    if instruction is not None:
        about = f"{instruction!r} and {about}"
    elif read.instruction:
        about += f", of which the decoder reads {read.instruction!r}"
    return Request("adapter", instruction, torch.tensor(read.latent), about, read.reading)


def _warn_of(ship: "Ship", instruction: str, confidence: "Confidence | None" = None) -> None:
    for measure in (ship.familiarity(instruction), confidence):
        if measure is not None and measure.warning is not None:
            log(measure.warning)


def _show_answers(
    ship: "Ship", instruction: str, probes: Sequence[str], confidence: "Confidence"
) -> None:
    with_adapter, without = ship.answer(instruction, probes), ship.answer_bare(probes)
    for text, answer, bare in zip(probes, with_adapter, without, strict=True):
        print(f"  {text}\n    with the adapter:    {answer}\n    without the adapter: {bare}")
    print(
        f"  adapters around this one agree on {100 * confidence.agreement:.0f} % of these answers"
    )


def _counter(total: int) -> Callable[[int], None]:
    """Logs how far it is, every hundred."""

    def count(done: int) -> None:
        if done % 100 == 0:
            log(f"{done} of {total}")

    return count


@verb(_PANEL)
def compose(
    part: Annotated[
        list[str],
        typer.Option(metavar="WEIGHT INSTRUCTION", help="may be given several times"),
    ],
    run: RunOption,
    out: OutOption,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="compress to this rank by SVD; default: exact, the sum of the ranks"
        ),
    ] = None,
    probe: ProbesOption = None,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> int:
    """Weighted sum of several instructions' adapters -> one PEFT LoRA folder.

    It mixes what they do, and is no substitute for one instruction that says all of it:
    `ship-ds deduce "A and then B"`. Of 74 unseen rules "A and then B" of a quickstart run (671
    steps, 2026-11-26) the sum answered 0.200 of the inputs exactly, that instruction's own adapter
    0.511.
    """
    check_words(device, dtype)
    parts = checks.weighted_parts(part)
    bundle = checks.check_run(run, base)
    checks.check_new(out)
    checks.check_sums(bundle)
    from ship_ds.export.compose import compose, part_requests
    from ship_ds.export.deduce import own_probes, warn_of_far

    ship = open_run(run, device, dtype, base)
    probes = own_probes(ship, probe or ())
    warn_of_far(ship, part_requests(parts), log)
    made = compose(ship, parts, out, probes, rank)
    print(
        f"{out}: rank {made.rank}, {100 * made.error:.2f} % of the exact sum's norm lost; "
        f"peft = live within {made.proof.from_live:.1e}; differs from the bare base by "
        f"{made.proof.from_base:.2f}"
    )
    whole = " and then ".join(text for _, text in parts)
    log(
        "a sum mixes what its parts do, and is no substitute for one instruction (0.200 of answers "
        "right against 0.511 on a quickstart run: `ship-ds compose --help`); for one after the "
        "other: "
        f"ship-ds deduce {shlex.quote(whole)}"
    )
    return 0


@verb(_PANEL)
def tune(
    run: RunOption,
    out: OutOption,
    instruction: Annotated[
        str, typer.Option("--from", metavar="INSTRUCTION", help="whose adapter is the start")
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help='of one task: JSON lines, {"input": ..., "target": ...}; - for stdin',
        ),
    ],
    steps: Annotated[
        int, typer.Option(min=1, help="of 16 examples each, or as many as there are")
    ] = 100,
    lr: Annotated[float, typer.Option(help="of Adam, at its highest")] = 1e-3,
    eval_share: Annotated[float, typer.Option(help="of the examples, held out")] = 0.2,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="train one from peft's fresh start too, to compare")
    ] = False,
    probe: ProbesOption = None,
    pad_to: PadToOption = None,
    seed: SeedOption = 0,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> int:
    """An instruction's adapter, trained on by gradient -> PEFT folder."""
    check_words(device, dtype)
    checks.check_positive("--lr", lr)
    checks.check_share("--eval-share", eval_share)
    from ship_ds.inference.lines import read_pairs

    pairs = read_pairs(data)
    bundle = checks.check_run(run, base)
    checks.check_makes_lora(bundle)
    checks.check_new(out)
    checks.check_has_file_format("tune", bundle)
    from ship_ds.evaluation.tuning import Recipe, tune
    from ship_ds.export.deduce import own_probes
    from ship_ds.export.tuned import export_tuned

    ship = open_run(run, device, dtype, base)
    probes = own_probes(ship, probe or ())
    tuned = tune(ship, instruction, pairs, Recipe(steps, lr, eval_share, seed), fresh)
    proof = export_tuned(
        ship,
        tuned.adapter,
        instruction,
        tuned.summary(),
        tuned.rows(),
        out,
        probes,
        pad_to,
    )
    print("\n".join(_losses(tuned)))
    print(
        f"{out}: peft = live within {proof.from_live:.1e}; differs from the bare base by "
        f"{proof.from_base:.2f}"
    )
    _warn_of(ship, instruction)
    return 0


def _losses(tuned: "Tuned") -> list[str]:
    """What the held-out examples say of each start."""
    curves = [tuned.curve, *([tuned.fresh] if tuned.fresh else [])]
    steps = tuned.recipe.steps
    lines = [
        f"{curve.start} start: loss of {tuned.num_held_out} held-out examples {curve.first:.3f} "
        f"at step 0, {curve.last:.3f} at step {steps} (nats a token)"
        for curve in curves
    ]
    if tuned.fresh:
        reached = tuned.curve.steps_to(tuned.fresh.last)
        lines.append(
            "the generated start does not reach the fresh one's last loss"
            if reached is None
            else f"the generated start is at the fresh one's last loss by step {reached}: "
            f"{steps - reached} of {steps} steps saved"
        )
    return lines


@verb(_PANEL)
def answer(
    instruction: Annotated[str, typer.Argument()],
    run: RunOption,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[INPUT]...", help="default: those of --file, or of standard input"),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file", help='one input a line, or JSON lines, {"input": ...}; - for standard input'
        ),
    ] = None,
    beams: Annotated[int, typer.Option(min=1, max=1024, help="1: greedy decoding")] = 1,
    confidence: Annotated[
        bool,
        typer.Option(
            "--confidence",
            help="of each answer the share of eight adapters around this one that give it; takes "
            "as long as eight more answers",
        ),
    ] = False,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> int:
    """Inputs -> answers as an instruction says; JSON lines."""
    check_words(device, dtype)
    from ship_ds.inference.lines import STDIN, read_inputs

    if inputs and file:
        raise UserError("answer: give one of INPUT and --file")
    texts = inputs or read_inputs(file or STDIN)
    checks.check_run(run, base)
    ship = open_run(run, device, dtype, base)
    answers = ship.answer(instruction, texts, beams)
    if not confidence:
        for text, answered in zip(texts, answers, strict=True):
            print_row({"input": text, "answer": answered})
        _warn_of(ship, instruction)
        return 0
    ship.calibrate(log)
    measure = ship.confidence(instruction, texts)
    for text, answered, agreed in zip(texts, answers, measure.by_input, strict=True):
        print_row({"input": text, "answer": answered, "agreement": agreed})
    _warn_of(ship, instruction, measure)
    return 0


@verb(_PANEL)
def induce(
    run: RunOption,
    file: FileOption = None,
    candidates: Annotated[int, typer.Option(min=1, help="how many to show")] = 5,
    method: MethodOption = "union",
    preset: PresetOption = "ours",
    settings: SetSearchOption = None,
    seed: SeedOption = 0,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> int:
    """Examples -> instruction; JSON."""
    check_words(device, dtype)
    from ship_ds.inference.lines import STDIN, induction_row, read_pairs

    pairs = read_pairs(file or STDIN)
    search = _search(run, base, method, preset, settings)
    induced = open_run(run, device, dtype, base).induce(pairs, search, seed, log)
    print_row(induction_row(induced, candidates))
    return 0


@verb(_PANEL)
def explain(
    run: RunOption,
    adapter: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="a PEFT folder, by whomever")
    ] = None,
    merged: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="a model that an adapter was merged into, instead"),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", metavar="INPUT...", help="what it is asked; default: the run's own"
        ),
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", help='inputs as JSON lines, {"input": ...}; - for stdin')
    ] = None,
    as_json: JsonOption = False,
    settings: SetSearchOption = None,
    seed: SeedOption = 0,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> int:
    """An adapter -> what it does, in words, with the evidence."""
    check_words(device, dtype)
    from ship_ds.inference.lines import explanation_row, explanation_text, read_inputs

    if (adapter is None) == (merged is None):
        raise UserError("explain: give one of a PEFT folder and --merged")
    if inputs and file:
        raise UserError("explain: give one of --input and --file")
    folder = adapter or merged
    assert folder is not None
    texts = inputs or (read_inputs(file) if file else [])
    search = _search(run, base, "union", "ours", settings)
    checks.check_exists(folder)
    checks.check_explained(folder, is_merged=merged is not None)
    explanation = open_run(run, device, dtype, base).explain(
        folder, texts, merged=merged is not None, config=search, seed=seed, log=log
    )
    if as_json:
        print_row(explanation_row(explanation))
    else:
        print("\n".join(explanation_text(explanation, str(folder))))
    return 0


@verb(_PANEL)
def reason(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...")],
    run: RunOption,
    file: FileOption = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="of induction and encoding")] = 1,
    method: MethodOption = "union",
    preset: PresetOption = "ours",
    settings: SetSearchOption = None,
    seed: SeedOption = 0,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> int:
    """Examples and inputs -> answers; JSON lines."""
    check_words(device, dtype)
    from ship_ds.inference.lines import STDIN, read_pairs, reasoning_rows

    pairs = read_pairs(file or STDIN)
    search = _search(run, base, method, preset, settings)
    reasoning = open_run(run, device, dtype, base).reason(pairs, inputs, search, rounds, seed, log)
    for row in reasoning_rows(inputs, reasoning):
        print_row(row)
    return 0


def _search(
    run: Path,
    base: str | None,
    method: "InductionMethod",
    preset: "InductionPreset",
    settings: list[str] | None,
) -> "InductionConfig":
    """How this run's instructions are looked for; checks the run as well."""
    from ship_ds.inference.config import InductionConfig

    config = checks.read_run_config(checks.check_run(run, base))
    search = InductionConfig.of_preset(
        preset, method, max_new_tokens=config.evaluation.max_instruction_tokens
    )
    return search.with_overrides(settings or ())
