"""`ship-ds oracles`: a LoRA for each seen task of a config, trained by gradient on that task's
training examples alone, into a bank (oracle_bank.py) that the objective `oracles` reads.

Groups of tasks are trained side by side, by the loop of the baselines (baselines/oracles.py). A
group is on the disk before the next begins, and starts from the seed alone, so that work that was
cut off ends in the same bytes as work that was not, where the same sums are rounded alike: on a CPU
with as much memory free.

Letters: T tasks, R LoRA rank, I inputs of a linear, O outputs of a linear, X other letters
flattened.
"""

import fcntl
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ship_ds.bundle import fingerprints
from ship_ds.config import Config, LoraHypernetworkConfig, lora_of, oracle_settings
from ship_ds.console import Log
from ship_ds.data.source import source_of
from ship_ds.data.task import SplitTask
from ship_ds.errors import UserError
from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.evaluation.baselines.oracles import (
    OracleRecipe,
    group_size,
    nats_a_token,
    train_group,
)
from ship_ds.evaluation.baselines.static_adapters import TaskLoras
from ship_ds.files import Manifest, disk_error, part_of, publish, whole_file, write_json
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.model.loading import load_tokenizer
from ship_ds.model.oracles import DTYPE, ROWS, SITE_SPREADS, RowLayout, made_for, mapped
from ship_ds.oracle_bank import (
    BANK,
    SPREADS,
    OracleBank,
    examples_digest,
    read_bank,
)
from ship_ds.prompt import check_tasks
from ship_ds.tensor_file import TensorFile

_BEFORE, _AFTER = "nats_before", "nats_after"
"""Of a group's file, beside its rows."""


@dataclass(frozen=True)
class BankRecipe:
    """Options of the verb. examples_per_step: of each task."""

    steps: int
    lr: float
    examples_per_step: int
    seed: int


@dataclass(frozen=True)
class Learnt:
    """Of one task: nats a token of its training examples under the bare base, and under its oracle
    as the bank holds it."""

    task_id: str
    before: float
    after: float


def make_bank(
    config: Config,
    out: Path,
    recipe: BankRecipe,
    device: torch.device,
    dtype: torch.dtype,
    log: Log,
) -> list[Learnt]:
    """Train the oracles of all seen tasks; the bank is then there.

    Args:
        config: of the run that will read them.
        out: the bank's folder.
        recipe: how long and how fast.
        device: where to train.
        dtype: of the base; the LoRAs are trained in fp32.
        log: takes lines of progress.

    Raises:
        UserError: the data or the base cannot be read, what a kill left is another command's, the
            disk is full, a loss is not finite, or the oracles do not differ.
    """
    splits = source_of(config.data).read(load_tokenizer(config.model.task_llm.base), log)
    lora = lora_of(config.model.hypernetwork)
    assert lora is not None, "the verb refuses it (why_no_oracles)"
    base = FrozenBase.of_config(config, lora, device, dtype)
    check_tasks([base.prompts], splits)
    if len(splits.seen) < 2:
        raise UserError("oracles: one seen task has no spread over tasks; give two or more")
    try:
        with _unfinished(out, _description(base, splits.seen, recipe, dtype)) as (part, bank):
            learnt = _train_groups(base, bank, part, splits.seen, recipe, log)
            _write_spreads(part, bank, lora)
            Manifest.of(part).write(part)
            publish(part, out)
    except OSError as error:
        raise disk_error(
            out, error, "the groups before are kept; make room and start the same command again"
        ) from None
    return learnt


def _description(
    base: FrozenBase, tasks: Sequence[SplitTask], recipe: BankRecipe, dtype: torch.dtype
) -> OracleBank:
    """All that decides the bank. The size of a group does by rounding, and follows from the memory
    that is free: a run that goes on takes that of the one before."""
    model = base.config.model
    prints = fingerprints("the base", model.task_llm.base)
    return OracleBank(
        made_for={**made_for(prints, base.prompts.describe()), **oracle_settings(model)},
        trained={**asdict(recipe), "dtype": str(dtype).removeprefix("torch.")},
        sites=dict(base.sites),
        tasks={task.id: examples_digest(task) for task in tasks},
        group_size=group_size(base, [task.train for task in tasks], recipe.examples_per_step),
    )


@contextmanager
def _unfinished(out: Path, description: OracleBank) -> Iterator[tuple[Path, OracleBank]]:
    """The folder that becomes the bank, which no other process has, and the bank's description;
    what an earlier process left there is taken up.

    Raises:
        UserError: another process has it, or another command began it.
    """
    part = part_of(out)
    part.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{part}: another process writes it; name another --out") from None
        if not any(part.glob("group-*.safetensors")):
            # What ended before its first group, by a rate that was too high, binds nobody.
            write_json(part / BANK, description.model_dump(mode="json"))
        begun = read_bank(part, "--out")
        if different := _different(begun, description):
            raise UserError(
                f"{part}: was begun with {different}; repeat that command, or remove the folder"
            )
        yield part, begun
    finally:
        os.close(descriptor)


def _different(begun: OracleBank, description: OracleBank) -> str | None:
    """The first thing that two commands have otherwise, but for the size of a group."""

    def flat(bank: OracleBank) -> dict[str, Any]:
        options = {f"--{name.replace('_', '-')}": value for name, value in bank.trained.items()}
        return {**bank.made_for, **options}

    then, now = flat(begun), flat(description)
    key = next((key for key in now if then.get(key) != now[key]), None)
    if key is not None:
        return f"{key}={then.get(key)}, which is {now[key]} now"
    if begun.sites != description.sites:
        return "other model.hypernetwork.targets"
    # Their order is that of the rows.
    if list(begun.tasks.items()) != list(description.tasks.items()):
        return "other seen tasks, or other examples of them"
    return None


def _train_groups(
    base: FrozenBase,
    bank: OracleBank,
    part: Path,
    tasks: Sequence[SplitTask],
    recipe: BankRecipe,
    log: Log,
) -> list[Learnt]:
    """What each task's oracle has learnt; every group's file is then there."""
    by_id, groups = {task.id: task for task in tasks}, list(bank.groups())
    learnt: list[Learnt] = []
    for number, (file, ids) in enumerate(groups, 1):
        if not (part / file).is_file():
            title = f"oracles, group {number} of {len(groups)}"
            rows_TX, group_learnt = _train_group(base, [by_id[one] for one in ids], recipe, title)
            _write_group(part / file, rows_TX, group_learnt)
        nats = zip(
            ids, *(mapped(part / file, name).tolist() for name in (_BEFORE, _AFTER)), strict=True
        )
        here = [Learnt(*row) for row in nats]
        log(f"group {number} of {len(groups)}: {in_words(here)}")
        learnt += here
    return learnt


def _train_group(
    base: FrozenBase, tasks: Sequence[SplitTask], recipe: BankRecipe, title: str
) -> tuple[Tensor, list[Learnt]]:
    """The rows of a group's oracles, and what they have learnt."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)  # every oracle of every group starts from the same weights
        first = TaskLoras(base.sites, base.lora)
    how = OracleRecipe(steps=recipe.steps, lr=recipe.lr)
    examples = {task.id: task.train for task in tasks}
    count = recipe.examples_per_step
    trained = train_group(base, first, examples, how, count, recipe.seed, title)
    layout = RowLayout.of(base.sites, base.lora.rank)
    rows_TX = layout.row(trained).to(DTYPE)
    bare, kept = first.to(base.device)(), lora_of_rows(layout, rows_TX, trained.scaling)
    rows = torch.arange(len(tasks), device=base.device)[:, None]
    learnt = [
        Learnt(
            task.id,
            nats_a_token(base, bare, task.train),
            nats_a_token(base, kept.rows(row), task.train),
        )
        for row, task in zip(rows, tasks, strict=True)
    ]
    return rows_TX.cpu(), learnt


def lora_of_rows(layout: RowLayout, rows_TX: Tensor, scaling: float) -> LoraAdapter:
    """The LoRAs of T tasks, in fp32, that a bank holds as rows.

    Args:
        layout: where A and B of each site lie in a row.
        rows_TX: one row a task, in whatever dtype.
        scaling: what B A is multiplied by, alpha / rank.
    """
    factors = {
        path: (a_TRI.float(), b_TOR.float())
        for paths, a_of_sites, b_of_sites in layout.factors(rows_TX)
        for path, a_TRI, b_TOR in zip(paths, a_of_sites, b_of_sites, strict=True)
    }
    return LoraAdapter(factors, scaling)


def _write_group(path: Path, rows_TX: Tensor, learnt: Sequence[Learnt]) -> None:
    with whole_file(path) as part, TensorFile(part, (ROWS, _BEFORE, _AFTER)) as file:
        file.add(ROWS, rows_TX)
        file.add(_BEFORE, torch.tensor([one.before for one in learnt], dtype=torch.float64))
        file.add(_AFTER, torch.tensor([one.after for one in learnt], dtype=torch.float64))


def _write_spreads(part: Path, bank: OracleBank, lora: LoraHypernetworkConfig) -> None:
    """The mean over tasks of |B A - mean of B A|^2 of each site, alpha / rank included.

    Raises:
        UserError: it is zero somewhere, where nothing was learnt, or not finite.
    """
    layout, scaling = RowLayout.of(bank.sites, lora.rank), lora.alpha / lora.rank
    rows = [mapped(part / file, ROWS) for file, _ in bank.groups()]
    spreads = scaling**2 * torch.tensor(list(_spreads(layout, rows)))
    for path, one in zip(layout.paths, spreads.tolist(), strict=True):
        if not math.isfinite(one):
            raise UserError(
                f"oracles: {path}: oracles there are not finite; remove {part} and lower --lr"
            )
        if one <= 0:
            raise UserError(
                f"oracles: {path}: the oracles of all tasks do the same there; remove {part} and "
                "give more --steps or a higher --lr"
            )
    with whole_file(part / SPREADS) as unfinished, TensorFile(unfinished, (SITE_SPREADS,)) as file:
        file.add(SITE_SPREADS, spreads)


def _spreads(layout: RowLayout, rows: Sequence[Tensor]) -> Iterator[float]:
    """Of each site, one at a time: the mean update is as large as the weight."""
    groups = [list(layout.factors(rows_TX)) for rows_TX in rows]
    for place, (paths, *_) in enumerate(groups[0]):
        for site in range(len(paths)):
            a_TRI = torch.cat([group[place][1][site] for group in groups]).float()
            b_TOR = torch.cat([group[place][2][site] for group in groups]).float()
            yield spread_of(a_TRI, b_TOR)


def spread_of(a_TRI: Tensor, b_TOR: Tensor) -> float:
    """The mean over tasks of |B A - mean of B A|^2."""
    mean_OI = b_TOR.transpose(0, 1).flatten(1) @ a_TRI.flatten(0, 1) / len(a_TRI)
    squares = (b_TOR.mT @ b_TOR) * (a_TRI @ a_TRI.mT)
    return float(squares.double().sum() / len(a_TRI) - mean_OI.double().square().sum())


def in_words(learnt: Sequence[Learnt]) -> str:
    """How good oracles are, over their tasks."""
    before, after = (fmean(getattr(one, name) for one in learnt) for name in ("before", "after"))
    return (
        f"{len(learnt)} tasks, loss of their training examples {before:.3f} without an oracle, "
        f"{after:.3f} with (nats a token, mean over tasks)"
    )
