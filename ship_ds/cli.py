"""`ship-ds <verb>`: thin layers over the library. Bad input is one line on standard error and exit
code 2."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ship_ds.errors import UserError

if TYPE_CHECKING:
    from ship_ds.bundle import Ship
    from ship_ds.inference.induction import InductionConfig


def _train(args: argparse.Namespace) -> int:
    from ship_ds import train

    return train.main(["--config", args.config, *args.overrides])


def _open(run: str) -> "Ship":
    """The run, without transformers' bars: standard error is for what a user can act on."""
    from ship_ds.bundle import Ship
    from ship_ds.runtime import ranks

    ranks.hush()
    return Ship.from_run(run)


def _deduce(args: argparse.Namespace) -> int:
    from ship_ds.export.deduce import export_many, export_one
    from ship_ds.export.requests import Request, read_instructions, read_latents

    if [args.instruction, args.file, args.latent].count(None) != 2:
        raise UserError("deduce: give one of an instruction, --file or --latent")
    requests = (
        read_instructions(Path(args.file)) if args.file else [Request("adapter", args.instruction)]
    )
    ship = _open(args.run)
    if args.latent:
        requests = read_latents(Path(args.latent), ship.digest, ship.config.model.latent_size)
    out = Path(args.out)
    if args.file or len(requests) > 1:
        batch = export_many(ship, requests, out, args.probe, args.pad_to, _counter(len(requests)))
        kept = (
            f" ({batch.num_kept} were there from a run that was cut off)" if batch.num_kept else ""
        )
        print(
            f"{out}: {len(requests)} adapters{kept}; peft = live within "
            f"{batch.worst.from_live:.1e} in each; "
            f"each differs from the bare base by {batch.worst.from_base:.2f} or more"
        )
        return 0
    proof = export_one(ship, requests[0], out, args.probe, args.pad_to)
    print(
        f"{out}: peft = live within {proof.from_live:.1e}; differs from the bare base by "
        f"{proof.from_base:.2f}"
    )
    if args.latent:
        return 0
    with_adapter, without = ship.answer(args.instruction, args.probe), ship.answer_bare(args.probe)
    for text, answer, bare in zip(args.probe, with_adapter, without, strict=True):
        print(f"  {text}\n    with the adapter:    {answer}\n    without the adapter: {bare}")
    return 0


def _counter(total: int) -> Callable[[int], None]:
    """Says on standard error how far it is, every hundred."""

    def count(done: int) -> None:
        if done % 100 == 0:
            print(f"ship-ds: {done} of {total}", file=sys.stderr, flush=True)

    return count


def _compose(args: argparse.Namespace) -> int:
    from ship_ds.export.compose import compose

    parts = [(_weight(weight), text) for weight, text in args.part]
    made = compose(_open(args.run), parts, Path(args.out), args.probe, args.rank)
    print(
        f"{args.out}: rank {made.rank}, {100 * made.error:.2f} % of the exact sum's norm lost; "
        f"peft = live within {made.proof.from_live:.1e}; differs from the bare base by "
        f"{made.proof.from_base:.2f}"
    )
    return 0


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(
            f'--part {text}: expected a weight and an instruction: --part 0.5 "reverse the list"'
        )
    return weight


def _merge(args: argparse.Namespace) -> int:
    from ship_ds.export import drift
    from ship_ds.export.merge import Merge

    adapter = Path(args.adapter)
    merge = Merge(adapter, args.target, args.base, args.dtype, args.shard_gigabytes)
    look = (
        (lambda part: {})
        if args.no_drift
        else (lambda part: drift.drift(part, adapter, merge.folder))
    )
    report = merge.run(Path(args.out), look)
    kept = (
        f", {report['num_shards_kept']} of them from a run that was cut off"
        if report["num_shards_kept"]
        else ""
    )
    print(f"{args.out}: {args.target}, {report['num_shards']} shard(s){kept}")
    if not args.no_drift:
        print(f"  {drift.show(report)}")
    return 0


def _answer(args: argparse.Namespace) -> int:
    from ship_ds.inference.lines import STDIN, read_inputs

    inputs = args.inputs or read_inputs(args.file or STDIN)
    ship = _open(args.run)
    for text, answer in zip(inputs, ship.answer(args.instruction, inputs, args.beams), strict=True):
        _print_row({"input": text, "answer": answer})
    return 0


def _induce(args: argparse.Namespace) -> int:
    from ship_ds.inference.lines import STDIN, induction_row, read_inputs, read_pairs

    if args.adapter:
        inputs = read_inputs(args.file) if args.file else []
        ship = _open(args.run)
        found = ship.induce_from_adapter(
            args.adapter, inputs, _induction(args, ship), args.seed, _say
        )
    else:
        pairs = read_pairs(args.file or STDIN)
        ship = _open(args.run)
        found = ship.induce(pairs, _induction(args, ship), args.seed, _say)
    _print_row(induction_row(found, args.candidates))
    return 0


def _reason(args: argparse.Namespace) -> int:
    from ship_ds.inference.lines import STDIN, read_pairs, reasoning_rows

    pairs = read_pairs(args.file or STDIN)
    ship = _open(args.run)
    reasoning = ship.reason(
        pairs, args.inputs, _induction(args, ship), args.rounds, args.seed, _say
    )
    for row in reasoning_rows(args.inputs, reasoning):
        _print_row(row)
    return 0


def _induction(args: argparse.Namespace, ship: "Ship") -> "InductionConfig":
    from ship_ds.inference.induction import InductionConfig

    return InductionConfig(
        method=args.method, max_new_tokens=ship.config.evaluation.max_instruction_tokens
    )


def _print_row(row: dict[str, object]) -> None:
    print(json.dumps(row, ensure_ascii=False), flush=True)


def _say(text: str) -> None:
    print(f"ship-ds: {text}", file=sys.stderr, flush=True)


def _bundle(args: argparse.Namespace) -> int:
    from ship_ds.bundle import bundle_from_checkpoint

    bundle_from_checkpoint(Path(args.checkpoint), Path(args.out))
    print(f"{args.out}: bundle of {args.checkpoint}")
    return 0


def _data(args: argparse.Namespace) -> int:
    from ship_ds.data.describe import describe, show
    from ship_ds.data.filters import FilterConfig

    filters = FilterConfig(
        max_input_words=args.max_input_words,
        max_instruction_words=args.max_instruction_words,
        max_examples_per_task=args.max_examples_per_task,
        min_examples_per_task=args.min_examples_per_task,
    )
    description = describe(Path(args.path), args.format, filters)
    print(json.dumps(description, indent=2) if args.json else show(description))
    return 0


def _plan(args: argparse.Namespace) -> int:
    from ship_ds.config import load_config
    from ship_ds.planner.plan import Machines, advise, make_plan
    from ship_ds.planner.shapes import with_shapes
    from ship_ds.planner.show import as_json, show

    config = load_config(args.config, args.overrides)
    if args.shapes is not None:
        config = with_shapes(config, args.shapes)
    machines = Machines(args.nodes, args.gpus, int(args.gpu_memory * 1e9))
    lengths = (args.instruction_tokens, args.input_tokens, args.target_tokens)
    plan = make_plan(config, machines, lengths)
    changes = advise(plan, lengths)
    print(json.dumps(as_json(plan, changes), indent=2) if args.json else show(plan, changes))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from ship_ds.evaluation.evaluate import evaluate, show
    from ship_ds.evaluation.harness import from_arguments
    from ship_ds.runtime import ranks
    from ship_ds.train import say

    config = from_arguments(args)
    ranks.hush()
    if ranks.is_launched():
        ranks.start(None)
    report = evaluate(Path(args.run), config, args.arguments, say)
    if ranks.rank() == 0:
        show(report)
        print(Path(args.run) / "evaluation" / "report.md")
    return 0


def _plot(args: argparse.Namespace) -> int:
    from ship_ds.evaluation.evaluate import write_latent_map
    from ship_ds.monitor import figures
    from ship_ds.runtime import ranks
    from ship_ds.train import say

    ranks.hush()
    run, others = Path(args.run), [Path(other) for other in args.runs]
    for folder in (run, *others):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such run folder")
    write_latent_map(run, say)
    for path in figures.plot([run, *others], Path(args.out) if args.out else run / "figures", say):
        print(path)
    return 0


def _recipes(args: argparse.Namespace) -> int:
    from importlib import resources

    from ship_ds.config import recipe_names

    for name in recipe_names():
        first = (
            (resources.files("ship_ds") / "recipes" / f"{name}.yaml").read_text().splitlines()[0]
        )
        print(f"{name:<20} {first.removeprefix('# ')}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from ship_ds import doctor

    print("\n".join(doctor.lines()))
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number above zero")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ship-ds", description="Instructions to model parameters and back."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser(
        "train", help="train in one process; for several, start ship_ds/train.py with deepspeed"
    )
    train.add_argument("--config", required=True)
    train.add_argument("overrides", nargs="*", help="section.key=value")
    train.set_defaults(run_verb=_train)
    deduce = verbs.add_parser(
        "deduce", help="instructions -> PEFT folders, each proved on the way out"
    )
    deduce.add_argument("instruction", nargs="?")
    deduce.add_argument(
        "--file",
        help="many: one instruction a line, or .jsonl with instruction "
        "and id; a folder each in --out",
    )
    deduce.add_argument("--latent", help="a latent.safetensors instead of instructions")
    deduce.add_argument(
        "--pad-to", type=int, help="LoRA rank to reach with zero rows; the function stays the same"
    )
    deduce.set_defaults(run_verb=_deduce)
    compose = verbs.add_parser(
        "compose", help="weighted sum of several instructions' adapters -> one PEFT LoRA folder"
    )
    compose.add_argument(
        "--part", nargs=2, action="append", required=True, metavar=("WEIGHT", "INSTRUCTION")
    )
    compose.add_argument(
        "--rank", type=int, help="compress to this rank by SVD; default: exact, the ranks' sum"
    )
    compose.set_defaults(run_verb=_compose)
    for verb in (deduce, compose):
        verb.add_argument("--run", required=True, help="a run or bundle folder")
        verb.add_argument("--out", required=True)
        verb.add_argument(
            "--probe", nargs="+", default=["3 7 3 5", "1 3 9 3 0"], help="inputs to prove it on"
        )
    merge = verbs.add_parser(
        "merge", help="base + adapter -> a model folder, one tensor in memory at a time"
    )
    merge.add_argument("adapter", help="a folder that deduce or compose wrote")
    merge.add_argument("--out", required=True)
    merge.add_argument("--base", help="where the base is now, if not where the adapter says")
    merge.add_argument("--target", choices=["original", "dequantised", "nf4"], default="original")
    merge.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="auto: the base's own",
    )
    merge.add_argument("--shard-gigabytes", type=float, default=2.0)
    merge.add_argument(
        "--no-drift",
        action="store_true",
        help="do not load base and result to measure how far logits drift",
    )
    merge.set_defaults(run_verb=_merge)
    _add_inference(verbs)
    bundle = verbs.add_parser(
        "bundle", help="a training checkpoint -> a bundle, without the run that wrote it"
    )
    bundle.add_argument("checkpoint", help="RUN/checkpoints/step-N")
    bundle.add_argument("--out", required=True)
    bundle.set_defaults(run_verb=_bundle)
    data = verbs.add_parser(
        "data", help="what a file or folder of tasks holds and what the filters leave out"
    )
    data.add_argument("path")
    data.add_argument("--format", default="auto")
    data.add_argument("--json", action="store_true")
    for name in ("input-words", "instruction-words", "examples-per-task"):
        data.add_argument(f"--max-{name}", type=int)
    data.add_argument("--min-examples-per-task", type=int, default=2)
    data.set_defaults(run_verb=_data)
    plan = verbs.add_parser(
        "plan", help="what a recipe needs of each GPU and sends in a step, from its shapes alone"
    )
    plan.add_argument("--config", required=True)
    plan.add_argument("overrides", nargs="*", help="section.key=value")
    plan.add_argument("--gpus", type=_positive, default=8, help="on each node")
    plan.add_argument("--nodes", type=_positive, default=1)
    plan.add_argument("--gpu-memory", type=float, default=80, help="GB of one GPU")
    plan.add_argument(
        "--shapes",
        help="a published model's shapes in place of the base: llama-2-7b, llama-3-70b, ...",
    )
    for name in ("instruction", "input", "target"):
        plan.add_argument(f"--{name}-tokens", type=_positive, help="instead of the recipe's limit")
    plan.add_argument("--json", action="store_true")
    plan.set_defaults(run_verb=_plan)
    _add_evaluate(
        verbs.add_parser(
            "evaluate",
            help="SHIP beside the baselines in every direction; goes on where it stopped",
        )
    )
    plot = verbs.add_parser(
        "plot", help="figures of a run, and of several runs against each other, as PNG"
    )
    plot.add_argument("--run", required=True)
    plot.add_argument("--runs", nargs="+", default=[], help="others, for the figures over runs")
    plot.add_argument("--out", help="folder; default RUN/figures")
    plot.set_defaults(run_verb=_plot)
    verbs.add_parser("recipes", help="the shipped configs").set_defaults(run_verb=_recipes)
    verbs.add_parser("doctor", help="what of the stack is here").set_defaults(run_verb=_doctor)
    return parser


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True)
    parser.add_argument("--methods", default="all", help="comma-separated names, or all")
    parser.add_argument("--parts", default="seen,unseen", help="of seen, dev, unseen")
    parser.add_argument(
        "--num-tasks", type=int, default=120, help="of each part at most, evenly spaced"
    )
    parser.add_argument(
        "--num-shown",
        default="5",
        help="examples shown; of several (5,1,2,3) the first is the report's own",
    )
    parser.add_argument("--minutes", type=float, default=5, help="training time of each baseline")
    parser.add_argument(
        "--judge", default="execution,rouge", help="of execution, rouge, endpoint; or none"
    )
    parser.add_argument(
        "--endpoint",
        default="http://localhost:8000/v1",
        help="of the judge; OPENAI_API_KEY holds its key",
    )
    parser.add_argument("--endpoint-model", default="default")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run_verb=_evaluate)


def _add_inference(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    answer = verbs.add_parser("answer", help="inputs -> answers as an instruction says; JSON lines")
    answer.add_argument("instruction")
    answer.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="default: those of --file, or standard input, one a line",
    )
    answer.add_argument("--beams", type=int, default=1)
    answer.set_defaults(run_verb=_answer)
    induce = verbs.add_parser("induce", help="examples, or an adapter -> instruction; JSON")
    induce.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="a PEFT LoRA in place of examples; --file then gives inputs, if any",
    )
    induce.add_argument("--candidates", type=int, default=5, help="how many to show")
    induce.set_defaults(run_verb=_induce)
    reason = verbs.add_parser("reason", help="examples and inputs -> answers; JSON lines")
    reason.add_argument("inputs", nargs="+", metavar="INPUT")
    reason.add_argument("--rounds", type=int, default=1)
    reason.set_defaults(run_verb=_reason)
    for verb in (answer, induce, reason):
        verb.add_argument("--run", required=True, help="a run or bundle folder")
        verb.add_argument(
            "--file", help='JSON lines, {"input": ..., "target": ...}; default: standard input'
        )
    for verb in (induce, reason):
        verb.add_argument(
            "--method", choices=("union", "propose", "bank", "direct", "indirect"), default="union"
        )
        verb.add_argument("--seed", type=int, default=0)


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    args.arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code: int = args.run_verb(args)
    except UserError as error:
        print(f"ship-ds: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def run() -> NoReturn:
    """The console script."""
    code = main()
    if "torch" not in sys.modules:
        sys.exit(code)
    from ship_ds.runtime import ranks

    ranks.leave(code)


if __name__ == "__main__":
    run()
