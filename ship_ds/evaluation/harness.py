"""The evaluation of a run: every method in every direction, on seen and on unseen rules, as one
report.

    ship-ds evaluate --run runs/quickstart --methods all
    # "--": --run is not torchrun's
    torchrun --nproc-per-node 2 -m -- ship_ds.cli evaluate --run runs/quickstart --methods all

All methods are shown the same examples and asked the same inputs. Each rank measures its share of
the tasks. A cell that is measured already, with the same bundle, data and settings, is not measured
again; `<run>/evaluation` holds everything.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from ship_ds.api import Ship
from ship_ds.bundle import Bundle
from ship_ds.config import Config, overridden
from ship_ds.console import Log
from ship_ds.data.source import source_of
from ship_ds.data.splits import without_rules_of
from ship_ds.data.task import Splits, SplitTask, Task
from ship_ds.data.task_files import FilesConfig, read_files
from ship_ds.errors import UserError
from ship_ds.evaluation.budgets import AnsweredExamples, Budget, Minutes, UntilDevStops
from ship_ds.evaluation.cells import Cell, CellStore, Measured, cells_of, changed
from ship_ds.evaluation.config import HarnessConfig
from ship_ds.evaluation.judges import build_judges, judges_of
from ship_ds.evaluation.measure import joined, measure_over_ranks
from ship_ds.evaluation.method import Method, Setting
from ship_ds.evaluation.methods import METHODS, TRAINED_NAMES
from ship_ds.evaluation.questions import PARTS, ask, tasks_of, warn_of_long_targets
from ship_ds.monitor.progress import ProgressLine
from ship_ds.parsing import read_json_lines, read_json_object
from ship_ds.prompt import check_tasks
from ship_ds.runtime import ranks
from ship_ds.section import first_error

_VERSION = 4
"""Of the way in which cells are measured; another one measures them again."""


@dataclass(frozen=True)
class Run:
    """A trained run as it is evaluated."""

    folder: Path
    ship: Ship
    splits: Splits
    results: str = "evaluation"
    """The folder in the run's that holds what is measured."""

    @classmethod
    def open(
        cls,
        folder: Path,
        log: Log,
        device: str = "auto",
        dtype: str | None = None,
        base: str | None = None,
        data: FilesConfig | None = None,
    ) -> "Run":
        """The run in this folder, with the data that it was trained on.

        Args:
            folder: of the run.
            log: takes a line about the data.
            device, dtype, base: see `Ship.from_run`.
            data: other tasks, to be tested in place of the run's own unseen ones; those among them
                that are a rule of its seen or dev tasks are left out.

        Raises:
            UserError: there is no bundle, the data are no longer those of the run, or of the other
                tasks none is left.
        """
        ship = Ship.from_run(folder, device, dtype, base)
        splits = source_of(ship.config.data).read(ship.model.prompts.tokenizer, log)
        if (folder / "splits.json").is_file():
            for part, ids in read_json_object(folder / "splits.json").items():
                if ids != [task.id for task in getattr(splits, part)]:
                    raise UserError(
                        f"{folder / 'splits.json'}: the data now give other {part} "
                        "tasks than the run was made with"
                    )
        if data is not None:
            splits = _with_others(splits, data, ship, log)
        check_tasks({*vars(ship.model.collator.prompts).values()}, splits)
        return cls(folder, ship, splits, results_name(data))

    @cached_property
    def num_answered(self) -> int:
        """Examples that the run was trained to answer: those of the steps that it took, which
        `training.max_minutes` may have made fewer than the config has."""
        training, log = self.ship.config.training, self.folder / "metrics.jsonl"
        if log.is_file():
            num_steps = len(read_json_lines(log))
        elif training.steps is not None:
            num_steps = training.steps
        else:
            raise UserError(
                f"--budget: {log} is missing, which says how many steps the run took; take minutes"
            )
        return max(1, num_steps * training.tasks_per_step * training.examples_per_task)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What every score of this run depends on."""
        parts = {
            "bundle": self.ship.digest,
            "data": source_of(self.ship.config.data).fingerprint(self.splits),
        }
        # Scores from before `--dtype` are of float32, and do not say so.
        if self.ship.dtype != torch.float32:
            parts["dtype"] = str(self.ship.dtype).removeprefix("torch.")
        return parts


def results_name(data: FilesConfig | None) -> str:
    """The folder in a run's that holds what is measured: of its own data, or of others, by their
    last name and a hash of path and settings."""
    if data is None:
        return Run.results
    # Not `keeps_together`, which `parse_benchmark` refuses: names are those of earlier versions.
    settings = data.model_dump_json(exclude={"split": {"keeps_together"}})
    digest = hashlib.sha256(settings.encode()).hexdigest()
    return f"{Run.results}-{Path(data.path).name}-{digest[:8]}"


def _with_others(splits: Splits, data: FilesConfig, ship: Ship, log: Log) -> Splits:
    """The run's splits with the tasks of these files as the unseen ones."""
    read = read_files(data, ship.model.prompts.tokenizer, log).tasks
    others = without_rules_of(read, (*splits.seen, *splits.dev, *_met_before(ship.config, log)))
    if num_known := len(read) - len(others):
        log(f"left out: tasks with the rule of one that was trained or chosen on: {num_known}")
    if not others:
        raise UserError(f"--data: {data.path}: no task is left to test; see the counts above")
    return replace(splits, unseen=others)


def _met_before(config: Config, log: Log) -> list[SplitTask]:
    """What the runs were trained on that this one started from, as their bundles know it: one
    wording a task, no example."""
    known: dict[str, None] = {}
    met: set[Path] = set()
    while (source := config.run.init_from) is not None:
        if (folder := Path(source).resolve()) in met:  # trained again, from what began with it
            break
        met.add(folder)
        try:
            bundle = Bundle.open(source)
        except UserError as error:
            log(f"run.init_from: what that run was trained on is not compared: {error}")
            break
        known |= dict.fromkeys(bundle.known_instructions)
        config = bundle.config
    return [SplitTask(Task(text, text, ()), (), ()) for text in known]


class Harness:
    """Measures the cells that a config asks for and keeps them in `<run>/evaluation/cells`, or in
    that of the other data.

    The same calls on every rank; rank 0 alone writes.
    """

    def __init__(self, run: Run, config: HarnessConfig, log: Log) -> None:
        self.run, self.config, self.log = run, config, log
        self.folder = run.folder / run.results
        self.store = CellStore(self.folder / "cells")
        self.methods = {name: _changed(name, config.changes_of(name)) for name in METHODS}
        self.judges = build_judges(config.judges, run.ship, config.endpoint, self.folder / "judged")
        self.looked_at: set[str] = set()

    @cached_property
    def budget(self) -> Budget:
        """What each baseline may spend on its training.

        Raises:
            UserError: it is to go by dev, and there are no dev tasks.
        """
        match self.config.budget:
            case "minutes":
                return Minutes(self.config.minutes)
            case "examples":
                return AnsweredExamples(self.run.num_answered)
            case "until_dev_stops":
                if not any(task.test for task in self.run.splits.dev):
                    raise UserError(
                        "--budget until_dev_stops: the run's data have no dev tasks; take minutes "
                        "or examples"
                    )
                return UntilDevStops(self.config.patience, self.run.num_answered)

    def measure_all(self) -> None:
        """Measure what is not stored, or was measured under another setting."""
        self.measure(self.config.methods)

    def measure(self, names: Sequence[str]) -> None:
        """As `measure_all`, of some of the methods."""
        missing: dict[str, list[Cell]] = {}
        for name in names:
            if not self.cells(name):
                self.log(
                    f"{name}: does none of the directions asked for on any task of these parts"
                )
            missing[name] = self._missing(name)
        self._warn_of_long_targets([cell for cells in missing.values() for cell in cells])
        for name, cells in missing.items():
            if cells:
                self._measure_method(name, cells)

    def _warn_of_long_targets(self, cells: Sequence[Cell]) -> None:
        answered = [cell for cell in cells if cell.direction in ("deduction", "reasoning")]
        tasks = {task.id: task for cell in answered for task in self._tasks(cell)}
        tasks = {id: task for id, task in tasks.items() if id not in self.looked_at}
        self.looked_at |= tasks.keys()
        ship = self.run.ship
        limit = ship.config.evaluation.max_new_tokens
        warn_of_long_targets(tasks.values(), ship.model.prompts, limit, self.log)

    def cells(self, name: str) -> list[Cell]:
        """What the config asks of a method, where there are tasks that it applies to."""
        cells = cells_of(self.methods[name], self.config.parts, self.config.num_shown)
        cannot = self.methods[name].cannot(self.run.ship)
        directions = [one for one in self.config.directions if one not in cannot]
        return [cell for cell in cells if cell.direction in directions and self._tasks(cell)]

    def _tasks(self, cell: Cell) -> list[SplitTask]:
        """Those that the cell is measured on."""
        tasks = tasks_of(self.run.splits, cell.part, self.config.num_tasks)
        return [task for task in tasks if self.methods[cell.method].applies(task, self.run.ship)]

    def stored(self, name: str) -> list[Cell]:
        """Cells of the method on disk, whatever was asked for this time, in the order of parts and
        numbers shown."""
        files = {path.name for path in self.store.folder.glob(f"{name}.*.json")}
        numbers = sorted(
            {int(file.split(".")[-2].removesuffix("_shown")) for file in files if "_shown" in file}
        )
        cells = cells_of(self.methods[name], PARTS, numbers)
        return [cell for cell in cells if self.store.path(cell).name in files]

    def fingerprint(self, cell: Cell) -> dict[str, Any]:
        """What the cell depends on, and no more, so that little is measured again."""
        config = self.config
        settings = {
            **self.run.fingerprint,
            "harness": _VERSION,
            "num_tasks": config.num_tasks,
            "seed": config.seed,
        }
        if cell.method in TRAINED_NAMES:
            settings["budget"] = repr(self.budget)
        settings |= self.methods[cell.method].settings()
        judges = judges_of(cell.direction, config.judges)
        if judges or cell.direction == "induction":
            settings["judges"] = sorted(judges)
        if "endpoint" in judges:
            endpoint = config.endpoint
            settings["endpoint"] = [endpoint.url, endpoint.model, endpoint.prompts]
        # tuples are lists once stored
        as_stored: dict[str, Any] = json.loads(json.dumps(settings))
        return as_stored

    def valid(self, cell: Cell) -> Measured | None:
        """The stored cell where it still holds."""
        measured = self.store.read(cell)
        return (
            measured
            if measured is not None and not changed(measured, self.fingerprint(cell))
            else None
        )

    def _missing(self, name: str) -> list[Cell]:
        """The cells to be measured, as rank 0 finds them: a shared disk may not yet show the others
        what it shows one of them, and all have to measure the same."""
        missing = []
        for cell in self.cells(name):
            measured = self.store.read(cell)
            keys = changed(measured, self.fingerprint(cell)) if measured is not None else []
            if keys:
                self.log(
                    f"{cell.name}: measured again, since it was measured with another "
                    f"{', '.join(keys)}"
                )
            if measured is None or keys:
                missing.append(cell)
        agreed: list[Cell] = ranks.gather_objects(missing, list[Cell])[0]
        return agreed

    def _measure_method(self, name: str, cells: Sequence[Cell]) -> None:
        setting = Setting(
            self.run.ship,
            self.run.splits,
            self.method_folder(name),
            self.budget if name in TRAINED_NAMES else None,
            self.config.seed,
            # Without looks nothing would end it.
            max(self.config.num_looks, self.config.budget == "until_dev_stops"),
        )
        started = time.perf_counter()
        method = self.methods[name](setting)
        method.prepare()
        prepare_seconds = time.perf_counter() - started
        for cell in cells:
            measured = self._measure(method, cell, prepare_seconds)
            if ranks.rank() == 0:
                self.store.write(cell, measured)
            self.log(f"{cell.name}: {len(measured.rows)} tasks, {measured.seconds:.1f} s")

    def method_folder(self, name: str) -> Path:
        """Of whatever is tested: what a baseline is trained on is the run's own."""
        return self.run.folder / Run.results / "methods" / name

    @property
    def _num_at_once(self) -> int:
        """Tasks between two steps of the progress bar. A GPU wants more work at a time."""
        a_rank = 16 if self.run.ship.model.device.type == "cpu" else 128
        return a_rank * ranks.world_size()

    def _measure(self, method: Method, cell: Cell, prepare_seconds: float) -> Measured:
        started = time.perf_counter()
        questions = [
            ask(task, cell.num_shown or 0, self.config.seed, part=cell.part)
            for task in self._tasks(cell)
        ]
        outcomes = []
        with ProgressLine(cell.name, len(questions)) as progress:
            for start in range(0, len(questions), self._num_at_once):
                some = questions[start : start + self._num_at_once]
                outcomes.append(measure_over_ranks(method, cell.direction, some, self.judges))
                progress.done(len(some))
        outcome = joined(outcomes)
        return Measured(
            self.fingerprint(cell),
            outcome.metrics,
            outcome.rows,
            round(time.perf_counter() - started, 2),
            round(prepare_seconds, 2),
            ranks.world_size(),
        )


def check_changes(config: HarnessConfig) -> None:
    """See that a harness takes these changes, before there is a run.

    Raises:
        UserError: `Harness` would refuse a change of a method.
    """
    for name in METHODS:
        _changed(name, config.changes_of(name))


def _changed(name: str, changes: Sequence[str]) -> type[Method]:
    """The method with other numbers in its recipe.

    Raises:
        UserError: it has none, none of that name, or the value is none.
    """
    method: Any = METHODS[name]
    if not changes:
        return METHODS[name]
    if not hasattr(method, "recipe"):
        raise UserError(f"--set {name}.{changes[0]}: this method has no numbers to set")
    kind = TypeAdapter(type(method.recipe))
    # What was not set stays so: a search of ours suits those numbers to the run.
    values = overridden(kind.dump_python(method.recipe, exclude_unset=True), changes)
    try:
        recipe = kind.validate_python(values, extra="forbid")
    except ValidationError as error:
        line = first_error(error).line_beside(kind.dump_python(method.recipe))
        raise UserError(f"--set {name}.{line}") from None
    changed: type[Method] = type(method.__name__, (method,), {"recipe": recipe})
    return changed
