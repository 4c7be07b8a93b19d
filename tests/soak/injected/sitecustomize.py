"""Makes one rank of a run fail once, from outside the package: every Python process whose
PYTHONPATH names this folder loads this file first.

    PYTHONPATH=tests/soak/injected:. FAULT='{"kind": "sigkill", "module": "ship_ds.runtime.engine",
        "name": "Engine.backward", "call": 2, "before": true, "rank": 1, "target": "rank",
        "fired": "/tmp/fired", "disk": "/mnt/small", "op": null}' torchrun -m ship_ds.train ...

The named function is wrapped as its module is imported. What happens then is real: the process
reads address 0, gets the signal, or finds its disk full. `fired` holds the time in seconds of the
epoch and the rank once it has happened, and nothing happens where that file is there.

`op` names a builder of DeepSpeed's that every rank then asks for. A run on CPUs needs none, so
that nothing would be compiled here; one on GPUs that offloads its optimiser does.
"""

import ctypes
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_SIGNALS = ("sigint", "sigkill", "sigterm", "sigstop")


class InjectedError(RuntimeError):
    """What is raised; no part of the package knows it."""


class Wrapper(MetaPathFinder):
    """Changes one module once it has run."""

    module: str

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The module's own, whose loader calls `wrap` once the module has run."""
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def run_and_wrap(module: ModuleType) -> None:
            run(module)
            self.wrap(module)

        spec.loader.exec_module = run_and_wrap  # type: ignore[method-assign]
        return spec

    @abstractmethod
    def wrap(self, module: ModuleType) -> None:
        """Change it."""


class Op(Wrapper):
    """A run's ops are the one that is named."""

    module = "ship_ds.runtime.compiled_ops"

    def __init__(self, builder: str) -> None:
        self.builder = builder

    def wrap(self, module: ModuleType) -> None:
        """Put this op in the place of those that the config needs."""
        module.needed = lambda deepspeed: [self.builder]  # type: ignore[attr-defined]


class Injector(Wrapper):
    """Wraps one function of one module."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self.fault, self.module = fault, fault["module"]
        self.num_calls = 0

    def wrap(self, module: ModuleType) -> None:
        """Put the function that fails in the place of the one that does not."""
        *owners, name = self.fault["name"].split(".")
        owner: Any = module
        for one in owners:
            owner = getattr(owner, one)
        function = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            if self.fault["kind"] == "time":
                return self.timed(function, *args, **options)
            self.num_calls += 1
            is_due = self.num_calls == self.fault["call"]
            if is_due and self.fault["before"]:
                self.fire()
            value = function(*args, **options)
            if is_due and not self.fault["before"]:
                self.fire()
            return value

        setattr(owner, name, call)

    def timed(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """No fault: the seconds that each call takes go to `fired`, one a line."""
        begun = time.perf_counter()
        value = function(*args, **options)
        with open(self.fault["fired"], "a", encoding="utf-8") as file:
            file.write(f"{time.perf_counter() - begun}\n")
        return value

    def fire(self) -> None:
        """Once in the life of a run."""
        try:
            file = os.open(self.fault["fired"], os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return
        os.write(file, f"{time.time()} {os.environ['RANK']}".encode())
        os.close(file)
        kind = self.fault["kind"]
        if kind in _SIGNALS:
            send(signal.Signals[kind.upper()], self.fault["target"])
        else:
            _KINDS[kind](self.fault)


def send(number: signal.Signals, target: str) -> None:
    """To this rank, to all ranks, as Slurm does, or to their launcher, as a keyboard does."""
    launcher = os.getppid()
    if target == "launcher":
        os.kill(launcher, number)
    elif target == "rank":
        os.kill(os.getpid(), number)
    else:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        for child in sorted(map(int, children), key=lambda one: one == os.getpid()):
            os.kill(child, number)


def fail(_: dict[str, Any]) -> None:
    """An exception that nobody expects."""
    raise InjectedError("injected\nsecond line")


def fail_in_thread(fault: dict[str, Any]) -> None:
    """In the package's own thread where this is one, else in one that is started for it."""
    if threading.current_thread() is not threading.main_thread():
        fail(fault)
    thread = threading.Thread(target=fail, args=(fault,), name="injected")
    thread.start()
    thread.join()


def abort(_: dict[str, Any]) -> None:
    """As a failed check in C++."""
    os.abort()


def read_address_zero(_: dict[str, Any]) -> None:
    """A segmentation fault."""
    ctypes.string_at(0)


def hold_gil(_: dict[str, Any]) -> None:
    """Wait for a mutex that this thread holds, in C, without letting go of the interpreter. Unlike
    sleep() it does not return when a signal comes."""
    mutex = ctypes.create_string_buffer(128)
    library = ctypes.PyDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def fill_disk(fault: dict[str, Any]) -> None:
    """Take every free byte of the file system that the run folder lies on."""
    with open(Path(fault["disk"], "balloon"), "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            piece = b"\0" * size
            try:
                while True:
                    file.write(piece)
            except OSError:
                continue


_KINDS = {
    "exception": fail,
    "thread": fail_in_thread,
    "abort": abort,
    "sigsegv": read_address_zero,
    "gil": hold_gil,
    "disk": fill_disk,
}

# The launcher has no rank, and is never hit from inside. Rank null: whichever comes there first.
if "FAULT" in os.environ and "RANK" in os.environ:
    _fault = json.loads(os.environ["FAULT"])
    if _fault["op"] is not None:
        sys.meta_path.insert(0, Op(_fault["op"]))
    if _fault["rank"] in (None, int(os.environ["RANK"])):
        sys.meta_path.insert(0, Injector(_fault))
