"""Python commands in processes that have the libraries in memory already, forked from one that
loaded them: importing torch, transformers and DeepSpeed takes five seconds and more of each fresh
one, of which `make test` starts dozens.

What has to be fresh in a process of its own (memory, allocator, signals, the hashes of strings,
what is imported when) is tested by real ones: `conftest.start`.
"""

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from ship_ds.allocator import KEEP

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["ship_ds.train", "tests.warm_server"])  # in this order


def run(
    arguments: Sequence[str], timeout: float, environment: Mapping[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS`, of which the first is -m or a file, to its end.

    Args:
        arguments: what follows `python`.
        timeout: seconds after which the command, and all that it started, is ended.
        environment: of the command, whole.
        folder: where it runs.

    Raises:
        subprocess.TimeoutExpired: it took too long; with what it said and where it was.
    """
    with tempfile.TemporaryDirectory() as said:
        files = [Path(said) / name for name in ("stdout", "stderr")]
        # An allocator of its own would start the program again, cold.
        process = _SERVER.Process(
            target=_become, args=(arguments, {**environment, KEEP: "1"}, folder, *files)
        )
        _start(process, timeout, folder)
        try:
            process.join(timeout)
            late = process.is_alive()
            if late:
                _signal_group(process, signal.SIGABRT)
                time.sleep(2)  # a stack is written in much less
            left = [] if late else _left_behind(process)
        finally:
            _signal_group(process, signal.SIGKILL)
            process.kill()  # it may not lead its group yet
            process.join()
        files_were_made = all(file.exists() for file in files)
        stdout, stderr = (
            file.read_text(errors="replace") if file.exists() else "" for file in files
        )
    if late:
        raise subprocess.TimeoutExpired(list(arguments), timeout, stdout, stderr)
    assert process.exitcode is not None
    assert not left, f"{arguments}: ended without {left}, which it had started"
    assert files_were_made, f"{arguments}: did not begin: see what pytest's own process was told"
    return subprocess.CompletedProcess(list(arguments), process.exitcode, stdout, stderr)


def _start(process: BaseProcess, timeout: float, folder: Path) -> None:
    """Start it within so many seconds; the first start makes the server."""
    starting = threading.Thread(target=process.start, daemon=True)
    # The server imports by `sys.path`, "" in it.
    with contextlib.chdir(folder):
        starting.start()
        starting.join(timeout)
    assert not starting.is_alive(), f"no process was forked within {timeout} s"
    assert process.pid is not None, "no process was forked: see pytest's own standard error"


def _left_behind(process: BaseProcess) -> list[str]:
    """What is still at work of the processes that it started, five seconds after its end."""
    assert process.pid
    found: list[str] = []
    deadline = time.monotonic() + 5
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                name, state = path.read_text().rsplit(") ", 1)
                # The third field is the state, the fifth the group; a zombie is at no work.
                if int(state.split()[2]) == process.pid and state[0] != "Z":
                    found.append(name.partition("(")[2])
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _signal_group(process: BaseProcess, number: int) -> None:
    assert process.pid
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _become(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    stdout: Path,
    stderr: Path,
) -> None:
    """Be the process of that command, and end with its code."""
    os.setsid()
    for file, number in ((stdout, 1), (stderr, 2)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    faulthandler.enable()
    # That a module to be run has been imported already is the point.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    code: object = 0
    try:
        if arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            sys.path.insert(0, str(folder))
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            sys.path.insert(0, str(Path(arguments[0]).parent.resolve()))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as an interpreter that ends does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
