"""What can be known before anything is loaded, in seconds: `slurm/train.sh` asks it before it
starts the ranks.

    # prints the run folder, or one line
    python -m ship_ds.runtime.preflight --config RECIPE [section.key=value ...]

Imports no torch before all else has been checked: `check_models` needs it.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ship_ds.base_files import (
    ENCODER_DECODERS,
    check_base_files,
    check_settings,
    encoder_decoder,
)
from ship_ds.bundle import bundle_folder, verify
from ship_ds.config import ALL_LINEAR, Config, ModelConfig, base_folder, load_config, parts_of
from ship_ds.console import log, log_from_any_rank
from ship_ds.data.source import source_of
from ship_ds.errors import UserError
from ship_ds.exit_codes import BAD_INPUT, INTERRUPTED
from ship_ds.files import refused_paths
from ship_ds.parsing import read_json_object
from ship_ds.runtime.bad_input import say_bad_input
from ship_ds.runtime.deepspeed_config import offloads, read_deepspeed_config
from ship_ds.runtime.op_cache import compiled_cache, op_cache
from ship_ds.section import Section

MOST_HANG_MINUTES = 25


def check(config: Config, environment: Mapping[str, str]) -> None:
    """Look for what would stop the run later: files, folders, GPUs, time.

    Args:
        config: of the run.
        environment: its variables.

    Raises:
        UserError: something is wrong; with the setting or path.
    """
    _check_hang_minutes(config.training.hang_minutes)
    _check_offloads(read_deepspeed_config(config.training.deepspeed))
    bases = {getattr(config.model, role).base: role for role in ("decoder", "encoder", "task_llm")}
    for base, role in reversed(bases.items()):
        check_base(f"model.{role}.base", base)
    check_stacks(config.model)
    source_of(config.data).check()
    for objective in config.loss.objectives().values():
        objective.check(config.model)
    if config.run.init_from is not None:
        verify(bundle_folder(config.run.init_from), hashes=False)
    _check_writable(config.run.folder)
    op_cache(environment)
    # Before torch is imported, which makes the folder and has no line for one that it cannot make.
    compiled_cache(environment)
    _check_gpus(environment)


def _check_hang_minutes(minutes: float | None) -> None:
    """Here and not in the config's types: bundles and checkpoints of earlier versions say 30, and
    have to open."""
    if minutes is not None and minutes > MOST_HANG_MINUTES:
        raise UserError(
            f"training.hang_minutes: {minutes:g} is above {MOST_HANG_MINUTES}, and ZeRO's process "
            "groups fail by themselves "
            "after 30, naming nobody: set it lower, or null for never"
        )


def _check_offloads(settings: dict[str, Any]) -> None:
    """DeepSpeed would make the folder where it can, on whatever disk that is. What `ratio` leaves
    on the GPU has an optimiser of its own, which no checkpoint holds."""
    for part, offload in offloads(settings).items():
        if offload.get("ratio", 1) != 1:
            raise UserError(
                f"training.deepspeed: {part}.ratio: {offload['ratio']}: DeepSpeed saves no moments "
                "of the part that stays on the "
                "GPU, so a resume would lose them: take it out"
            )
        path = offload.get("nvme_path") or ""
        if offload.get("device") == "nvme" and not (
            Path(path).is_dir() and path and os.access(path, os.W_OK | os.X_OK)
        ):
            raise UserError(
                f"training.deepspeed: {part}.nvme_path: {path or '(none)'}: no folder that can be "
                "written; mount a local disk "
                "there, or give a copy of the file that names another folder"
            )


def check_division(tasks_per_step: int, num_ranks: int, accumulation: int) -> None:
    """Refuse tasks that ranks and accumulation do not divide.

    Args:
        tasks_per_step: of all ranks.
        num_ranks: that share them.
        accumulation: micro-batches of a rank a step.

    Raises:
        UserError: they do not divide.
    """
    if tasks_per_step % (num_ranks * accumulation):
        raise UserError(
            f"training.tasks_per_step ({tasks_per_step}) must be a multiple of ranks x "
            "training.accumulation "
            f"({num_ranks} x {accumulation}): change one of them"
        )


def check_base(key: str, base: str, *, shapes_alone: bool = False) -> None:
    """A base is "embedded", or a model folder whose files are whole.

    Args:
        key: of the setting that names it, for messages.
        base: its folder, or "embedded".
        shapes_alone: only its config.json is asked for.

    Raises:
        UserError: it is none, or a file of it cannot be used.
    """
    try:
        folder = base_folder(base)
        if shapes_alone:
            check_settings(folder)
        elif base != "embedded":
            check_base_files(folder)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def check_stacks(model: ModelConfig, one_stack: Collection[str] = ()) -> None:
    """Refuse what a base of two stacks, a T5, cannot be, and options that it cannot follow.

    Args:
        model: whose bases are there.
        one_stack: bases that are known to have one, and need not be there.

    Raises:
        UserError: the message names the setting.
    """
    base = model.task_llm.base
    kind = None if base in one_stack else encoder_decoder(base_folder(base))
    if kind is not None and model.backbone == "shared":
        raise UserError(
            f"model.backbone=shared: {base}: a {kind} can be the Task LLM alone, and not encoder "
            "and decoder too: set it to separate"
        )
    for role in ("encoder", "decoder"):
        role_base = getattr(model, role).base
        if role_base not in one_stack and (other := encoder_decoder(base_folder(role_base))):
            raise UserError(
                f"model.{role}.base: {role_base}: a {other} can be the Task LLM alone: set it to a "
                "decoder-only model, such as embedded"
            )
    if kind is None:
        return
    if model.attention in ("varlen", "flash"):
        raise UserError(
            f"model.attention={model.attention}: {base}: a {kind} adds a bias to its attention "
            "scores, which that kernel does not know: set it to auto or sdpa"
        )
    if model.system_message is not None and not _has_template(base_folder(base)):
        raise UserError(
            f"model.system_message: {base}: this {kind} has no chat template to put it in: leave "
            "it out"
        )
    _check_targets(base, kind, model.hypernetwork)


def _has_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        settings.is_file() and "chat_template" in read_json_object(settings)
    )


def _check_targets(base: str, kind: str, section: Section) -> None:
    """Here, since the default names are those of other models."""
    known = ENCODER_DECODERS[kind](base_folder(base))
    for one in parts_of(section):
        for target in getattr(one, "targets", ()):
            if target not in known | {ALL_LINEAR}:
                raise UserError(
                    f"model.hypernetwork.targets: {base}: a {kind} has no linear module "
                    f"{target!r}; its blocks have {', '.join(sorted(known))}: name of these, or "
                    f"{ALL_LINEAR} for all"
                )


def _check_models(model: ModelConfig) -> None:
    """Load the libraries for it, which takes seconds, where a base may be at fault: a chat template
    is a program, and only transformers' classes know what a config means."""
    if {getattr(model, role).base for role in ("decoder", "encoder", "task_llm")} != {"embedded"}:
        from ship_ds.model.loading import check_models
        from ship_ds.runtime.ranks import quiet_libraries

        quiet_libraries()
        check_models(model)


def _check_writable(folder: str) -> None:
    """The folder is not made: what is checked later may refuse the run."""
    if not folder:
        raise UserError("run.folder: expected a folder of the run's own, got an empty name")
    try:
        probe = _nearest(Path(folder)) / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"run.folder: {folder}: {error.strerror}; choose a folder that can be written"
        ) from None


def _nearest(folder: Path) -> Path:
    """The folder, or the first above it that there is; OSError where something else is wrong."""
    for one in (folder, *folder.parents):
        with contextlib.suppress(FileNotFoundError):
            one.lstat()
            return one
    return Path()


def _check_gpus(environment: Mapping[str, str]) -> None:
    """SLURM_TASKS_PER_NODE reads "8(x2),4"; a node without SLURM_GPUS_ON_NODE has none, and the run
    is one on CPUs."""
    gpus = int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_TASKS_PER_NODE", ""))
    tasks = max(map(int, counts), default=0)
    if 0 < gpus < tasks:
        raise UserError(
            f"{tasks} processes a node and {gpus} GPU(s): each process needs its own; "
            f"submit with --ntasks-per-node={gpus}, or ask for more with --gres=gpu:{tasks}"
        )


def parsed(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """What a program that trains, or checks what would be trained, is started with."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a recipe's name or a YAML file")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    # the deepspeed launcher appends it
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def exit_on_bad_input(description: str | None) -> Config:
    """End this process with one line about its arguments where `check` finds something wrong: for
    a program to call before it imports torch, which takes seconds.

    Returns:
        The config, checked.

    Raises:
        SystemExit: with BAD_INPUT, or INTERRUPTED from the keyboard.
    """
    args = parsed(None, description)
    try:
        with refused_paths():
            config = load_config(args.config, args.overrides)
            check(config, os.environ)
            return config
    except UserError as error:
        say_bad_input(str(error))
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        log("interrupted before anything was loaded: start the same command again")
        sys.exit(INTERRUPTED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the run folder and return 0, or print one line about the input and return 2."""
    args = parsed(arguments, "Check a run's input before it is started.")
    try:
        with refused_paths():
            config = load_config(args.config, args.overrides)
            check(config, os.environ)
            num_ranks = int(os.environ.get("SLURM_NTASKS", "1"))
            check_division(config.training.tasks_per_step, num_ranks, config.training.accumulation)
            _check_models(config.model)
    except UserError as error:
        log_from_any_rank(str(error))
        return BAD_INPUT
    print(config.run.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
