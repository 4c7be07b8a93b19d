"""Once a training is saved, what comes after it may fail without the run failing.

A job that exits with an error is requeued, and would fail in the same place again. So an exception
in the final report is one line and a file with its traceback, and every rank ends with code 0.
So does a run whose report was cut off several times: each start begins it from nothing, and one
that takes longer than a job may run would be requeued for ever.
"""

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ship_ds.console import log_from_any_rank
from ship_ds.errors import UserError, first_line
from ship_ds.files import write_json
from ship_ds.parsing import read_json_object
from ship_ds.runtime import ranks

_KEY = "ship_ds/failed_after_training"
_PERIOD_SECONDS = 2.0
_STARTS, _COUNT = "report_starts.json", "num_cut_off"
MOST_REPORT_STARTS = 3
"""Of a report that is cut off each time, by a signal or a crash of the machine."""


def begin_report(folder: Path) -> bool:
    """Whether the report is to be made: not where it was begun `MOST_REPORT_STARTS` times and did
    not end. Every rank calls it, and `end_report` once it has ended, well or not.

    Args:
        folder: of the run; rank 0 counts there.
    """

    def count() -> int:
        path = folder / _STARTS
        try:
            num_before = read_json_object(path).get(_COUNT)
        except (OSError, UserError):  # there is none, or a full disk has cut it short
            num_before = 0
        num_before = num_before if type(num_before) is int else 0
        # A disk that is full keeps nobody from the report.
        with contextlib.suppress(OSError):
            write_json(path, {_COUNT: num_before + 1})
        return num_before

    counts = ranks.gather_results(lambda: count() if ranks.rank() == 0 else 0, int)
    return max(counts) < MOST_REPORT_STARTS


def end_report(folder: Path) -> None:
    """The next start of this run may begin it as often again."""
    if ranks.rank() == 0:
        with contextlib.suppress(OSError):
            (folder / _STARTS).unlink(missing_ok=True)


@contextlib.contextmanager
def failures_are_one_line(trace: Path, describe: Callable[[str], str]) -> Iterator[None]:
    """Turn an exception inside into one line on standard error; the caller goes on.

    With several ranks the first one that fails prints it. The others may wait for that rank in a
    collective which it never enters: they see its key in the store of the process group, and end
    the process with code 0.

    Args:
        trace: file that takes the traceback of every rank that fails.
        describe: the line, from the exception's class and first line.
    """
    done = threading.Event()
    if ranks.world_size() > 1:
        threading.Thread(
            target=_exit_when_a_rank_failed, args=(done,), name="after training", daemon=True
        ).start()
    try:
        yield
    except Exception as error:
        if _is_first_to_fail():
            log_from_any_rank(describe(first_line(error)))
        # What failed may be a full disk. All ranks fail together where one of them tells the
        # others, so the file has the one that has the reason among them.
        with contextlib.suppress(OSError), trace.open("a", encoding="utf-8") as file:
            file.write(f"rank {ranks.rank()}\n{traceback.format_exc()}\n")
    finally:
        done.set()


def _is_first_to_fail() -> bool:
    """Tell the other ranks, and whether none did before."""
    if ranks.world_size() == 1:
        return True
    try:
        return int(_store().add(_KEY, 1)) == 1
    except RuntimeError:  # the process that holds the store has ended: it failed before
        return False


def _has_a_rank_failed() -> bool:
    """True as well where the store has gone: the process that holds it has ended."""
    try:
        return bool(_store().check([_KEY]))
    except RuntimeError:
        return True


def _store() -> Any:
    # Private in torch 2.13 (distributed_c10d.py); torch has no public name for the group's store.
    return dist.distributed_c10d._get_default_store()


def _exit_when_a_rank_failed(done: threading.Event) -> None:
    while not done.wait(_PERIOD_SECONDS):
        if _has_a_rank_failed() and not done.is_set():
            sys.stdout.flush()
            # Not sys.exit: this is no main thread, and the main one may wait for ever.
            os._exit(0)
