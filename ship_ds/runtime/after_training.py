"""Once a training is saved, what comes after it may fail without the run failing.

A job that exits with an error is requeued, and would fail in the same place again. So an exception
in the final report is one line and a file with its traceback, and every rank ends with code 0.
"""

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ship_ds.runtime import ranks

_KEY = "ship_ds/failed_after_training"
_PERIOD_SECONDS = 2.0


def first_line(error: BaseException) -> str:
    """`OutOfMemoryError: CUDA out of memory.`: an exception's class and first line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


@contextlib.contextmanager
def failures_are_one_line(trace: Path, line: str) -> Iterator[None]:
    """Turn an exception inside into one line on standard error; the caller goes on.

    With several ranks the first one that fails prints it. The others may wait for that rank in a
    collective which it never enters: they see its key in the store of the process group, and end
    the process with code 0.

    Args:
        trace: file for the traceback.
        line: with `{error}` and `{trace}` where they belong.
    """
    done = threading.Event()
    if ranks.world_size() > 1:
        threading.Thread(
            target=_exit_when_a_rank_failed, args=(done,), name="after training", daemon=True
        ).start()
    try:
        yield
    except Exception as error:
        if not _has_a_rank_failed():
            _announce_failure()
            trace.write_text(traceback.format_exc())
            _print(line.format(error=first_line(error), trace=trace))
    finally:
        done.set()


def _announce_failure() -> None:
    if ranks.world_size() > 1:
        _store().set(_KEY, str(ranks.rank()))


def _has_a_rank_failed() -> bool:
    """True as well where the store has gone: the process that holds it has ended."""
    if ranks.world_size() == 1:
        return False
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


def _print(text: str) -> None:
    """From whichever rank it happens on, and not from rank 0 alone."""
    print(f"ship-ds: {text}", file=sys.stderr, flush=True)
