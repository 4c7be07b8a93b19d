"""`ship-ds compare`: train every variant, measure each by the harness, put them into one table.

Each training is a process of its own, started as a user would; torch is imported here only when
all of them are done, so that they have the machine to themselves. What an earlier call finished is
not done again: a run with a bundle is not trained, one without goes on from its newest checkpoint,
and the harness keeps what it has measured.
"""

import fcntl
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import FrameType

from ship_ds.console import Log
from ship_ds.errors import UserError
from ship_ds.evaluation.config import HarnessConfig
from ship_ds.evaluation.variants import VariantRun, in_turn
from ship_ds.exit_codes import PREEMPTED

_STANDARD_ERROR = 2
_FAILED = 1


class Stopped(Exception):  # noqa: N818, it is no error
    """This process was asked to end, and so was the training that it had started."""


def check_changes(settings: HarnessConfig) -> None:
    """See `harness.check_changes`. In a process of its own, since the methods import torch.

    Raises:
        UserError: a method has no such number, or the value is none.
    """
    if settings.changes:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(_check_changes, settings).result()


def _check_changes(settings: HarnessConfig) -> None:
    from ship_ds.evaluation.harness import check_changes

    check_changes(settings)


def compare(
    trials: Sequence[VariantRun],
    settings: HarnessConfig,
    out: Path,
    num_ranks: int,
    arguments: Sequence[str],
    log: Log,
    device: str = "auto",
    dtype: str | None = None,
) -> int:
    """Train and measure what is missing, then write and print the table.

    Args:
        trials: in the order of the table.
        settings: of the harness; `ship` is one of its methods.
        out: gets compare.json and compare.md.
        num_ranks: of each training.
        arguments: of the command that asked for it; they stand in the table.
        log: takes a line a trial.
        device, dtype: of the measuring; see `Ship.from_run`.

    Returns:
        The exit code: 0, 1 where some trial failed, or 75 where this process was asked to stop.

    Raises:
        UserError: another comparison is at work in `out`, or a bundle there is damaged.
    """
    with _alone(out) as lock:
        try:
            failures = train_all(trials, num_ranks, lock, log)
        except Stopped:
            log("asked to stop: the same command goes on")
            return PREEMPTED
        trained = [trial for trial in trials if trial.name not in failures]
        failures |= _write_table(trained, failures, settings, out, arguments, log, device, dtype)
    for name, reason in failures.items():
        log(f"{name}: {reason}")
    return _FAILED if failures else 0


def _write_table(
    trials: Sequence[VariantRun],
    failures: Mapping[str, str],
    settings: HarnessConfig,
    out: Path,
    arguments: Sequence[str],
    log: Log,
    device: str,
    dtype: str | None,
) -> dict[str, str]:
    """Measure what was trained, then write and print the table of what could be measured.

    Arguments as in `compare`; failures are those of before.

    Returns:
        Why a trial, or a method beside it, could not be measured, by its name.
    """
    from ship_ds.evaluation import comparison
    from ship_ds.evaluation.harness import Run
    from ship_ds.runtime import ranks

    ranks.quiet_libraries()
    ranks.log_threads()
    entries: list[comparison.ComparedRun] = []
    unmeasured: dict[str, str] = {}

    def measured(trial: VariantRun) -> comparison.ComparedRun:
        """The run's models are let go as this returns."""
        run = Run.open(trial.folder, log, device, dtype)
        return comparison.measure_run(
            trial.label, trial.seed, run, settings, arguments, log, entries
        )

    for trial in trials:
        log(f"{trial.name}: measured, in {trial.folder / 'evaluation'}")
        try:
            entries.append(measured(trial))
        # Whatever it is, the table is then of the others, and the last lines name it.
        except Exception as error:
            unmeasured[trial.name] = comparison.why_unmeasured(
                error, trial.folder / "measuring_failure.txt"
            )
        else:
            unmeasured |= entries[-1].failures
    if entries:
        report = comparison.build(entries, {**failures, **unmeasured}, settings, arguments)
        comparison.write(report, out)
        comparison.print_comparison(report)
        print(out / comparison.COMPARISON_PAGE)
    return unmeasured


@contextmanager
def _alone(out: Path) -> Iterator[int]:
    """Hold the lock of the folder, whose descriptor the trainings inherit: one that has lost this
    process, by a kill, still holds it and so is not joined by a second one.

    Raises:
        UserError: somebody else holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{out}: another comparison, or a training that one started, is still at work "
                "here; wait for it or end it"
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)


def train_all(trials: Sequence[VariantRun], num_ranks: int, lock: int, log: Log) -> dict[str, str]:
    """Train what is not trained, one after the other.

    Args:
        trials: in the order of the table.
        num_ranks: of each training.
        lock: a descriptor that each of them inherits.
        log: takes a line a training.

    Returns:
        Why a trial failed, by its name.

    Raises:
        Stopped: when this process is asked to end.
        UserError: a bundle that is there is damaged.
    """
    missing = [trial for trial in in_turn(trials) if not trial.is_trained]
    if len(missing) < len(trials):
        log(f"{len(trials) - len(missing)} of {len(trials)} are trained already")
    failures = {}
    for number, trial in enumerate(missing, 1):
        log(f"{number} of {len(missing)}: {trial.name}, in {trial.folder}")
        command = trial.train_command(num_ranks)
        if code := _run(command, lock):
            failures[trial.name] = f"its training ended with code {code}: {shlex.join(command)}"
            log(f"{trial.name}: {failures[trial.name]}")
    return failures


def _run(command: Sequence[str], lock: int) -> int:
    """The exit code of a command, whose output goes to standard error: ours is the table.

    Raises:
        Stopped: TERM came, which the command got too, and it has ended.
    """
    asked: list[int] = []
    processes: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in processes:
            process.send_signal(number)

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        # Standard error by its number: a program that imports us may have put another in its place.
        with subprocess.Popen(command, stdout=_STANDARD_ERROR, pass_fds=[lock]) as process:
            processes.append(process)
            code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked or code == PREEMPTED:
        raise Stopped
    return code
