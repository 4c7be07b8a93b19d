"""Checkpoints: a training run's whole state, written so that it is either there and good or not
there at all.

    RUN/checkpoints/step-00000400/
        state/                DeepSpeed's own shards, trainable parameters and optimiser alone
        rank-0.safetensors    the random generators of each rank (torch's of the CPU and of this
                              rank's own GPU), with Python's and numpy's as metadata
        progress.json         step, seconds, tokens, config, data fingerprint, git revision,
                              dev score
        manifest.json         size and SHA-256 of every file above
        evaluation.json       of the evaluation at this step, which comes after the checkpoint:
                              how often it was begun, whether it is owed still, the score on
                              dev, and which score that is
    RUN/checkpoints/latest    the newest one's name, moved last; for people and scripts, a
                              resume looks for itself

It is written as step-N.part, synced, hashed (the files are shared out over the ranks), and renamed.
Loading verifies the manifest before DeepSpeed opens a file, and goes back to the newest good
checkpoint, with a line about each that it passes over.
"""

import contextlib
import errno
import io
import json
import math
import random
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ship_ds.bundle import PROGRESS, moved
from ship_ds.config import CheckpointConfig, flat, parse_config
from ship_ds.console import Log
from ship_ds.errors import UserError
from ship_ds.files import (
    MANIFEST,
    Manifest,
    part_of,
    recover,
    refused_paths,
    replace_folder,
    sha256,
    sync,
    write_json,
    write_text,
)
from ship_ds.model.parameter_names import by_current_name
from ship_ds.parsing import as_dataclass, read_json_object
from ship_ds.runtime import ranks, repartition
from ship_ds.runtime.engine import Engine
from ship_ds.runtime.pickles import load_shard, shard_problem

STATE, LATEST, EVALUATION = "state", "latest", "evaluation.json"
_FREE_TO_CHANGE = {
    "run.folder",
    "run.init_from",
    # Was 2 where it is null now; the fingerprint of the data says whether it changed anything.
    "data.filters.min_examples_per_task",
    # Its fingerprint says whether it is another one; see `check_outside`.
    "loss.oracles.bank",
    "training.max_minutes",
    "training.max_bad_steps",
    "training.deepspeed",
    "checkpoint",
    "evaluation",
    "model.attention",
    "model.backbone",
    "model.encoder.checkpointing",
    "model.decoder.checkpointing",
    "model.task_llm.checkpointing",
    "training.accumulation",
    "training.profile",
    "training.threads",
    "training.hang_minutes",
    "training.grace_seconds",
}
"""What a resumed run may set otherwise than the run that wrote the checkpoint."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` steps.

    dev_score: of the evaluation at this very step, once there is one.
    """

    step: int
    seconds: float
    tokens: int
    num_bad_steps: int
    world_size: int
    config: dict[str, Any]
    data_fingerprint: str
    dev_score: float | None = None
    best_by: str = "exact_match"
    """What dev_score is; a version that did not say so had this one."""
    owes_evaluation: bool = False
    """The evaluation that is due at this step has not ended yet."""
    num_evaluation_starts: int = 0
    """How often the evaluation that is owed was begun, and not cut short by a signal."""
    known_instructions: list[str] = field(default_factory=list)
    """Of the seen tasks: what a bundle made from this checkpoint alone has to carry."""
    bases: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the frozen models; see `bundle.frozen_bases`."""
    probes: list[str] = field(default_factory=list)
    """Inputs of the seen tasks, for the bundle; see `bundle.probe_inputs`."""
    outside: dict[str, str] = field(default_factory=dict)
    """Fingerprints of what objectives read from disk, by their names; see `Objective.begin`."""
    git_revision: str = field(default_factory=lambda: git_revision())


def git_revision() -> str:
    """The checkout's commit, or "" outside one."""
    done = (
        subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        if shutil.which("git")
        else None
    )
    return done.stdout.strip() if done and not done.returncode else ""


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint after that many steps is, or will be."""
    return root / f"step-{step:08d}"


def save(engine: Engine[Any], root: Path, progress: Progress, config: CheckpointConfig) -> Path:
    """Write a checkpoint; its folder. Every rank calls it at a step boundary.

    Args:
        engine: whose shards and generators are written.
        root: of the checkpoints.
        progress: where the training is.
        config: how many are kept.

    Raises:
        UserError: the disk is full; older checkpoints are untouched.
    """
    folder = folder_of(root, progress.step)
    part = part_of(folder)
    try:
        if ranks.rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        ranks.barrier()
        _check_room(engine, part)
        engine.save_shards(part, STATE)
        _save_generators(part / f"rank-{ranks.rank()}.safetensors")
        if ranks.rank() == 0:
            write_json(part / PROGRESS, asdict(progress), indent=2)
        ranks.barrier()
        names = _names(part)
        _check_can_be_read(part, names)
        manifest = _hash_shared_out(part, names)
        if ranks.rank() == 0:
            manifest.write(part)
            sync(part)
            replace_folder(part, folder)
            write_text(root / LATEST, folder.name + "\n")
            sync(root)
            _prune(root, config, progress.best_by)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        reason = _write_error(error)
        if reason is None:
            raise
        raise UserError(
            f"{part}: {reason}: the checkpoint of step {progress.step} was not written; "
            "the ones before are intact. Make room and start the same command again"
        ) from None
    ranks.barrier()
    return folder


def _check_room(engine: Engine[Any], part: Path) -> None:
    """Raises OSError on every rank where the disk has not even room for Adam's fp32 weights and two
    moments: one rank that fails within DeepSpeed's own writing leaves the others waiting for it. A
    quota is not seen here."""
    least = 12 * sum(
        getattr(parameter, "ds_numel", parameter.numel())
        for parameter in engine.trainable().values()
    )
    free = ranks.gather_objects(shutil.disk_usage(part).free if ranks.rank() == 0 else None)[0]
    if free < least:
        raise OSError(
            errno.ENOSPC, f"{free / 1e9:.3f} GB are free, at least {least / 1e9:.3f} GB are needed"
        )


def _write_error(error: Exception) -> str | None:
    """Why a file could not be written, or None for any other error.

    Of a full disk torch.save says that its zip writer is at an unexpected position; safetensors
    gives the system's words.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if (
        isinstance(error, SafetensorError)
        or "PytorchStreamWriter" in str(error)
        or "unexpected pos" in str(error)
    ):
        return "the disk is full or a file cannot be written"
    return None


def _save_generators(path: Path) -> None:
    """This rank's own: the GPUs of other processes may be visible here, and their states are
    theirs."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    save_file(
        tensors, path, {"python": json.dumps(random.getstate()), "numpy": json.dumps([name, *rest])}
    )


def _load_generators(path: Path, log: Log) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        # Version 0.1.0 saved the generators of all visible GPUs, by their numbers.
        state = tensors.get("cuda", tensors.get(f"cuda{torch.cuda.current_device()}"))
        if state is None:
            log(f"{path.parent}: written without a GPU: dropout differs from here on")
        else:
            torch.cuda.set_rng_state(state)
    name, *rest = json.loads(metadata["numpy"])
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))
    version, values, gauss = json.loads(metadata["python"])
    random.setstate((version, tuple(values), gauss))


def _names(part: Path) -> list[str]:
    """Of all files that the ranks have written there, in one order on every rank.

    NFS may list a folder as it was a minute ago, but for what this very node has written: no rank
    is sure to see all, and together they do.
    """
    seen = ranks.gather_results(
        lambda: [str(path.relative_to(part)) for path in part.rglob("*") if path.is_file()]
    )
    return sorted({name for names in seen for name in names})


def _check_can_be_read(part: Path, names: Sequence[str]) -> None:
    """What `problem` would refuse later fails now, while the ones before are there to go back
    to."""
    shards = [part / name for name in names if name.endswith(".pt")]
    for path in shards[ranks.rank() :: ranks.world_size()]:
        if reason := shard_problem(path):
            raise RuntimeError(
                f"{path} {reason}: for another version of DeepSpeed add it to "
                "ship_ds/runtime/pickles.py"
            )


def _hash_shared_out(folder: Path, names: Sequence[str]) -> Manifest:
    """Sync and hash these files, each rank its share; the whole manifest on every rank."""
    names_of_rank = names[ranks.rank() :: ranks.world_size()]
    for name in names_of_rank:
        sync(folder / name)
    shares = ranks.gather_objects(Manifest.of(folder, names_of_rank), Manifest)
    return Manifest({name: row for share in shares for name, row in share.files.items()})


_DAMAGED = ".damaged"


def _recover(root: Path) -> None:
    """Finish what a kill within `replace_folder` left half done."""
    for replaced in root.glob("step-*.replaced"):
        recover(replaced.with_suffix(""))
        shutil.rmtree(replaced, ignore_errors=True)


def checkpoints(root: Path) -> list[Path]:
    """Written checkpoints, oldest first; not verified."""
    return sorted(path for path in root.glob("step-*") if not path.suffix)


def read_progress(folder: Path) -> Progress:
    """Where the run was when this checkpoint was written, and what has become of its evaluation.

    Raises:
        UserError: one of the two files is missing, or not of this form.
    """
    path = folder / PROGRESS
    values = read_json_object(path)
    progress = as_dataclass(Progress, values, path, "name another checkpoint of the run")
    path = folder / EVALUATION
    if not path.is_file():
        return progress
    way_out = "remove this file, and the step is evaluated anew"
    return as_dataclass(Progress, values | read_json_object(path), path, way_out)


def record_evaluation(
    folder: Path,
    num_starts: int,
    dev_score: float | None = None,
    is_owed: bool = True,
    best_by: str = "exact_match",
) -> None:
    """Write beside a checkpoint how far the evaluation of its step has come. Rank 0 calls it.

    Args:
        folder: of the checkpoint.
        num_starts: how often the evaluation was begun.
        dev_score: of dev, once it has ended.
        is_owed: whether it has not.
        best_by: the metric that dev_score is.

    It is no part of the manifest: the state of the run is complete without it.
    """
    values = {
        "num_evaluation_starts": num_starts,
        "dev_score": dev_score,
        "best_by": best_by,
        "owes_evaluation": is_owed,
    }
    write_json(folder / EVALUATION, values)


def _prune(root: Path, config: CheckpointConfig, best_by: str) -> None:
    """Keep the last K, the best on dev by this metric, and the newest that was not written within
    bad steps; then, under the disk cap, drop the oldest that is none of the last two nor newest."""
    whole = checkpoints(root)
    readable = _readable(whole)
    best = _best(readable, best_by)
    # A run that is asked to stop within bad steps saves where it stands, each time it is asked.
    before_bad = max(
        (path for path, one in readable.items() if not one.num_bad_steps), default=None
    )
    keep = [path for path in whole if path in (*whole[-config.keep_last :], best, before_bad)]
    cap = config.max_gigabytes
    while cap is not None and sum(_bytes(path) for path in keep) > cap * 1e9:
        droppable = [path for path in keep[:-1] if path not in (best, before_bad)]
        if not droppable:
            break
        keep.remove(droppable[0])
    for path in set(whole) - set(keep):
        shutil.rmtree(path)


def best_on_dev(root: Path) -> tuple[Path, Progress]:
    """The checkpoint with the best score on dev of those that are there, and where the run was
    then. Which score that is, the newest of them says.

    Args:
        root: the folder of a run's checkpoints.

    Raises:
        UserError: none of them was scored.
    """
    whole = checkpoints(root)
    readable = _readable(whole)
    by = [one.best_by for _, one in sorted(readable.items()) if one.dev_score is not None]
    best = _best(readable, by[-1]) if by else None
    if best is None:
        newest = f": {whole[-1]} is the newest" if whole else ""
        raise UserError(
            f"{root}: no checkpoint there was scored on dev; name the one that is meant{newest}"
        )
    return best, readable[best]


def _best(readable: Mapping[Path, Progress], best_by: str) -> Path | None:
    """Of equally good ones the newest."""
    scores = {
        path: score
        for path, one in readable.items()
        if (score := _dev_score(one, best_by)) is not None
    }
    return max(scores, key=lambda path: (scores[path], path), default=None)


def _readable(folders: Sequence[Path]) -> dict[Path, Progress]:
    """Without those that have been damaged since."""
    progress = {}
    for folder in folders:
        with contextlib.suppress(UserError):
            progress[folder] = read_progress(folder)
    return progress


def _dev_score(progress: Progress, best_by: str) -> float | None:
    """None as well where it is by another metric or no number, which none is better than."""
    score = progress.dev_score
    is_known = score is not None and math.isfinite(score) and progress.best_by == best_by
    return score if is_known else None


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def problem(folder: Path) -> str | None:
    """Why this checkpoint cannot be used, or None; every rank calls it and checks its share of the
    files.

    Whether a file is there, and how long it is, rank 0 alone says: NFS may show another rank what
    was there a minute ago.

    Raises:
        OSError: a rank cannot read a file here and now, which says nothing about the checkpoint.
        RankError: on the other ranks.
        UserError: it may not be read, on every rank.
    """
    listed = ranks.gather_results(
        lambda: _listed(folder) if ranks.rank() == 0 else None, Manifest | str | None
    )[0]
    if isinstance(listed, str):
        return listed
    reasons = ranks.gather_results(lambda: _problem_of_share(folder, listed))
    return next((reason for reason in reasons if reason), None)


def _listed(folder: Path) -> Manifest | str:
    """The manifest, whose files are all there; or why it cannot be used."""
    with refused_paths():
        try:
            manifest = Manifest.read(folder)
        except ValueError as error:
            return str(error)
        return manifest.problem(folder, hashes=False) or manifest


def _problem_of_share(folder: Path, manifest: Manifest) -> str | None:
    # A pickle that nobody has hashed would be opened all the same: DeepSpeed lists folders.
    for path in sorted(folder.rglob("*.pt")):
        if (name := str(path.relative_to(folder))) not in manifest.files:
            return f"{name} is not in {MANIFEST}"
    with refused_paths():
        for name in sorted(manifest.files)[ranks.rank() :: ranks.world_size()]:
            # A file that is missing here is there for rank 0, and an error.
            if sha256(folder / name) != manifest.files[name].sha256:
                return f"{name} is not the file that was written"
            if name.endswith(".pt") and (reason := shard_problem(folder / name)):
                return f"{name} {reason}"
    return None


def newest_good(root: Path, log: Log) -> Path | None:
    """The newest checkpoint whose files are all as written; each one passed over is logged with its
    reason. One that a killed save has set aside is put back first. Raises as `problem` does, and
    UserError where none is good."""
    if ranks.rank() == 0:
        _recover(root)
    ranks.barrier()
    names = ranks.gather_objects([path.name for path in checkpoints(root)])[0]
    damaged_ones: dict[str, str] = {}
    for name in reversed(names):
        reason = problem(root / name)
        if reason is None:
            for damaged, text in damaged_ones.items():
                log(f"{root / damaged}: {text}; going on from {name}")
            return root / name
        damaged_ones[name] = reason
    if damaged_ones:
        damaged, text = next(iter(damaged_ones.items()))
        raise UserError(
            f"{root / damaged}: {text}; no good checkpoint is left: remove {root} to "
            "start from the beginning"
        )
    return None


def newest_good_to_resume(root: Path, log: Log) -> Path | None:
    """As `newest_good`, for the run that will write here: later ones, all damaged, are set aside as
    step-N.damaged, or they would count as newer than what it saves."""
    good = newest_good(root, log)
    if ranks.rank() == 0 and good is not None:
        for path in checkpoints(root):
            if path > good:
                aside = path.with_name(path.name + _DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
    ranks.barrier()
    return good


def load(
    engine: Engine[Any],
    folder: Path,
    config: Mapping[str, Any],
    data_fingerprint: str,
    log: Log,
    bases: Mapping[str, str] | None = None,
) -> Progress:
    """Put the engine and this rank's generators where `save` found them.

    On another number of ranks or under another ZeRO stage the generators start anew: dropout
    differs, and nothing else does. From fp32 to bf16 or back the steps are rounded otherwise from
    here on, and the optimiser's state is what it was.

    Args:
        engine: takes weights and state.
        folder: of the checkpoint.
        config: of the run that goes on.
        data_fingerprint: of its data.
        log: takes a line of what is not as it was.
        bases: fingerprints of its base models, which may lie elsewhere now; None: they may not.

    Raises:
        UserError: the run is another one.
    """
    progress = read_progress(folder)
    check_same_run(folder, progress, config, data_fingerprint, bases or {})
    if (folder / STATE / "offloaded_tensors").exists():
        raise UserError(
            f"{folder}: an earlier version kept Adam's moments beside it on NVMe: "
            "start anew in another run.folder"
        )
    _check_same_parameters(engine.trainable(), folder)
    stage, num_ranks = repartition.layout(folder / STATE)
    is_same_layout = (stage, num_ranks) == (engine.zero_stage(), ranks.world_size())
    was_bf16 = repartition.was_bf16(folder / STATE)
    if was_bf16 != engine.is_bf16():
        now = "bf16" if engine.is_bf16() else "fp32"
        log(f"{folder}: written in {'bf16' if was_bf16 else 'fp32'}: goes on in {now}")
    # DeepSpeed's own loading goes by the names of the files and those in them.
    is_named_alike = (
        was_bf16 == engine.is_bf16() and _saved_shapes(folder).keys() == engine.trainable().keys()
    )
    if is_same_layout and stage < 3 and is_named_alike:
        engine.load_shards(folder, STATE)
    else:
        repartition.load(engine, folder / STATE)
    if is_same_layout:
        _load_generators(folder / f"rank-{ranks.rank()}.safetensors", log)
    else:
        log(
            f"{folder}: written by {num_ranks} rank(s) under ZeRO-{stage}: shared out anew over "
            f"{ranks.world_size()} "
            f"under ZeRO-{engine.zero_stage()}; dropout differs from here on"
        )
        # No rank's saved generators fit another number of ranks: each starts anew by
        # step and rank.
        torch.manual_seed(
            int(progress.config["run"]["seed"]) + progress.step * ranks.world_size() + ranks.rank()
        )
    return progress


def _settings(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Every setting by its whole key, those of an objective that is written as its weight alone
    too."""
    config = parse_config(dict(values), str(folder))
    objectives = {name: dict(section) for name, section in config.loss.objectives().items()}
    return flat({**config.model_dump(mode="json"), "loss": objectives})


def check_same_run(
    folder: Path,
    progress: Progress,
    config: Mapping[str, Any],
    data_fingerprint: str,
    bases: Mapping[str, str],
) -> None:
    """See that a checkpoint was trained with these settings and data. A key that did not exist then
    stands at its default, and a base of the same fingerprint may lie elsewhere.

    Args:
        folder: of the checkpoint, for messages.
        progress: that was read there.
        config: of the run that would go on.
        data_fingerprint: of its data.
        bases: fingerprints of its base models by name.

    Raises:
        UserError: names the first setting, or the data, that is another one.
    """
    elsewhere = moved(progress.bases, bases)
    then, now = (_settings(one, folder) for one in (progress.config, config))
    for key in sorted(then.keys() | now.keys()):
        free = any(key == name or key.startswith(name + ".") for name in _FREE_TO_CHANGE)
        if key.startswith("model.") and key.endswith(".base"):
            free = (then.get(key), now.get(key)) in elsewhere
        if not free and then.get(key) != now.get(key):
            raise UserError(
                f"{folder}: {key} was {then.get(key)} and is {now.get(key)} now; set it back, or "
                "choose another run.folder"
            )
    if progress.data_fingerprint != data_fingerprint:
        raise UserError(
            f"{folder}: the data are not the ones this run was trained on, or a version of ship_ds "
            "trained it that splits them otherwise; restore the data, or choose another run.folder"
        )


def check_outside(folder: Path, outside: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compare what the objectives read from disk with what they read then.

    Args:
        folder: of the checkpoint, for the message.
        outside: fingerprints as they are now, by the objectives' names.
        expected: as they were.

    Raises:
        UserError: it is another one now.
    """
    for name, then in expected.items():
        if name in outside and outside[name] != then:
            raise UserError(
                f"{folder}: what loss.{name} reads had the fingerprint {then[:12]} and has "
                f"{outside[name][:12]} now; put it back, or choose another run.folder"
            )


def _check_same_parameters(trainable: Mapping[str, torch.nn.Parameter], folder: Path) -> None:
    """DeepSpeed loads without strictness, since the frozen base is not saved; so names and shapes
    are compared here."""
    saved = set(by_current_name(_saved_shapes(folder)).items())
    current = {
        (name, tuple(getattr(parameter, "ds_shape", parameter.shape)))
        for name, parameter in trainable.items()
    }
    if different := sorted({name for name, _ in saved ^ current}):
        raise UserError(
            f"{folder}: {different[0]} and {len(different) - 1} more trainable "
            "parameters differ from this model's"
        )


def _saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The trainable parameters of a checkpoint, by their names in its files."""
    groups = load_shard(sorted((folder / STATE).glob("*model_states.pt"))[0])["param_shapes"]
    return {name: tuple(shape) for group in groups for name, shape in group.items()}


class ShardedState(Mapping[str, torch.Tensor]):
    """Trainable parameters by name, in fp32; each is put together from the ranks' mapped shards
    when it is asked for."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> torch.Tensor:
        whole: torch.Tensor = self._parts[name].contiguous()
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def trainable_state(folder: Path) -> ShardedState:
    """From a checkpoint of any world size. Under ZeRO-3 no more than one parameter is ever in
    memory; ZeRO-1 and 2 cut their one flat vector without regard to parameters, and DeepSpeed
    joins it.

    Raises:
        UserError: the checkpoint is damaged.
    """
    from deepspeed.utils import zero_to_fp32

    reason = problem(folder)
    if reason is not None:
        raise UserError(f"{folder}: {reason}")
    # its notices and bars
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        parts = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
            str(folder), tag=STATE, exclude_frozen_parameters=True, lazy_mode=True
        )
    return ShardedState(by_current_name(parts))
