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
        # The first start makes the server, which imports by `sys.path`, "" in it.
        with contextlib.chdir(folder):
            process.start()
        try:
            process.join(timeout)
            late = process.is_alive()
            if late:
                _signal_group(process, signal.SIGABRT)
                time.sleep(2)  # a stack is written in much less
        finally:
            _signal_group(process, signal.SIGKILL)  # with what it started and left behind
            process.kill()  # it may not lead its group yet
            process.join()
        stdout, stderr = (
            file.read_text(errors="replace") if file.exists() else "" for file in files
        )
    if late:
        raise subprocess.TimeoutExpired(list(arguments), timeout, stdout, stderr)
    assert process.exitcode is not None
    return subprocess.CompletedProcess(list(arguments), process.exitcode, stdout, stderr)


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
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)
