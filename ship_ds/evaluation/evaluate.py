"""`ship-ds evaluate`: open the run, measure what is missing, write the report."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ship_ds.bundle import SHIP_WEIGHTS, bundle_folder
from ship_ds.console import Log
from ship_ds.data.task_files import FilesConfig
from ship_ds.evaluation import induced_page
from ship_ds.evaluation import report as reports
from ship_ds.evaluation.cells import PROTOCOLS, Cell, Measured
from ship_ds.evaluation.config import HarnessConfig
from ship_ds.evaluation.harness import Harness, Run
from ship_ds.evaluation.latent_map import latent_map
from ship_ds.evaluation.methods import METHODS
from ship_ds.evaluation.questions import PARTS
from ship_ds.files import sha256, write_json, write_text
from ship_ds.monitor.machine import versions
from ship_ds.parsing import read_json_object
from ship_ds.runtime import ranks


def evaluate(
    folder: Path,
    config: HarnessConfig,
    arguments: Sequence[str],
    log: Log,
    device: str = "auto",
    dtype: str | None = None,
    base: str | None = None,
    data: FilesConfig | None = None,
) -> dict[str, Any]:
    """Measure what is missing; the report, which rank 0 writes to `<run>/evaluation`, or to the
    folder of other data (`results_name`).

    Methods that were measured earlier under the same setting are in it as well.

    Args:
        folder: of the run.
        config: which methods, parts and directions, and how.
        arguments: of the command that asked for it; they stand in the report.
        log: takes a line a cell.
        device, dtype, base: see `Ship.from_run`.
        data: see `Run.open`.

    Raises:
        UserError: no bundle is there, the data are no longer those of the run, or of the other
            data no task is left.
    """
    run = Run.open(folder, log, device, dtype, base, data)
    return evaluate_run(run, config, arguments, log)[0]


def evaluate_run(
    run: Run, config: HarnessConfig, arguments: Sequence[str], log: Log
) -> tuple[dict[str, Any], dict[Cell, Measured]]:
    """As `evaluate`, of a run that is open already.

    Args:
        run: open.
        config: what is measured, and how.
        arguments: of the command; they stand in the report.
        log: takes a line a cell.

    Returns:
        The report, and the cells that it is made of.
    """
    harness = Harness(run, config, log)
    harness.measure_all()
    measured = valid_cells(harness)
    present = {cell.method for cell in measured}
    stated = run.ship.config.model.task_llm.instruction != "none"
    provenance = reports.Provenance(
        str(run.folder),
        shlex.join(["ship-ds", *arguments]),
        versions(),
        config.model_dump(mode="json"),
        {
            name: {
                "instruction_in_query": method.states_instruction
                or (method.answers_as_ship and stated),
                "sees_labels": method.sees_labels,
                "about": method.about,
            }
            for name, method in harness.methods.items()
            if name in present
        },
        config.num_shown[0],
    )
    report = reports.build(measured, provenance)
    if ranks.rank() == 0:
        reports.write(report, measured, harness.folder)
        _write_induced(measured, harness)
    # Whoever comes back from here finds the report written.
    ranks.barrier()
    return report, measured


def _write_induced(measured: Mapping[Cell, Measured], harness: Harness) -> None:
    """What SHIP induces of unseen tasks, as a page for people: `<run>/evaluation/induced.md`."""
    config = harness.config
    cell = Cell("ship", "induction", "unseen", config.num_shown[0])
    if cell in measured:
        page = induced_page.page(cell, measured[cell], config.seed)
        write_text(harness.folder / "induced.md", page)


def write_latent_map(
    folder: Path,
    log: Log,
    device: str = "auto",
    dtype: str | None = None,
    base: str | None = None,
) -> None:
    """Write `<run>/evaluation/latents.json`, unless it is there for this very bundle and by this
    version, or the run has no bundle yet.

    Args:
        folder: of the run.
        log: takes a line where it is written.
        device, dtype, base: see `Ship.from_run`.
    """
    path, bundle = folder / "evaluation" / "latents.json", bundle_folder(folder)
    if not (bundle / SHIP_WEIGHTS).is_file():
        return
    there = read_json_object(path) if path.is_file() else {}
    if "tasks" in there and there["bundle"] == sha256(bundle / SHIP_WEIGHTS):
        return
    log(f"{path}: latents by gradient descent, for the figures of latents; takes minutes, once")
    run = Run.open(folder, log, device, dtype, base)
    write_json(path, latent_map(run.ship, run.splits))


def valid_cells(harness: Harness) -> dict[Cell, Measured]:
    """Every stored cell that holds under the present setting, in the order of the tables."""
    cells = [cell for name in METHODS for cell in harness.stored(name)]
    stored = {cell: harness.valid(cell) for cell in cells}
    return {cell: measured for cell, measured in stored.items() if measured is not None}


def print_methods(report: dict[str, Any]) -> None:
    """Print the values alone; intervals, kinds and tasks are in report.md."""
    for direction in PROTOCOLS:
        header, *rows = reports.summary_rows(
            report, direction, PARTS, tuple(reports.TITLES), reports.value_alone
        )
        if rows:
            printed = Table(title=direction)
            for index, title in enumerate(header):
                printed.add_column(title, no_wrap=index == 0)
            for row in rows:
                printed.add_row(*row)
            Console(width=140).print(printed)
            for line in reports.warnings(report, direction):
                Console(width=140).print(line)
