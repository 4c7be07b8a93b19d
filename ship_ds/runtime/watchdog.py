"""The hang detector: a rank that takes no step for some minutes says where everybody is and ends
the job.

Each rank's watching thread writes where its process stands to RUN/ranks/rank-N.json every few
seconds, so that the others can tell a rank that waits in a collective from one that is somewhere
else, and both from one that is gone.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import ship_ds
from ship_ds.console import log_from_any_rank
from ship_ds.files import write_json
from ship_ds.runtime import ranks
from ship_ds.runtime.stopping import HUNG

_PACKAGE = str(Path(ship_ds.__file__).parent)
_COLLECTIVES = (
    "torch/distributed/distributed_c10d.py",
    "deepspeed/comm/comm.py",
    "deepspeed/runtime/zero/partition_parameters.py",
)
"""Files in whose functions a thread waits for other ranks; ZeRO-3 waits for its gathers in the
last."""


@dataclass(frozen=True)
class Position:
    """Where a rank is: `collective` it waits in, or None; `line` of ship_ds that led there; `time`
    in seconds of the epoch."""

    step: int
    collective: str | None
    line: str
    time: float

    def __str__(self) -> str:
        return f"step {self.step}, {self.collective or 'in no collective'}, {self.line}"


class Watchdog:
    """Watches from `start` to `stop`; `record_step` tells of each step.

    Args:
        folder: of the run.
        minutes: after how many without a step the job ends; None watches nothing.
    """

    def __init__(self, folder: Path, minutes: float | None) -> None:
        self.folder = folder / "ranks"
        self.limit = None if minutes is None else 60 * minutes
        self.period = 0.0 if minutes is None else min(15.0, 60 * minutes / 10)
        self._step, self._last_step_time = 0, time.monotonic()
        self._done = threading.Event()

    def start(self) -> None:
        if self.limit is None:
            return
        self.record_step(self._step)
        self.folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(
            target=self._watch, args=(self.limit,), name="watchdog", daemon=True
        ).start()

    def record_step(self, step: int) -> None:
        self._step, self._last_step_time = step, time.monotonic()

    def stop(self) -> None:
        self._done.set()

    def _watch(self, limit: float) -> None:
        while not self._done.wait(self.period):
            position = self._write_position()
            if time.monotonic() - self._last_step_time > limit:
                self._report_and_exit(position, limit)

    def _write_position(self) -> Position:
        position = Position(self._step, *_current_position(), time.time())
        path = self.folder / f"rank-{ranks.rank()}.json"
        # a full disk ends the run elsewhere, with its own line, but not the watching
        with contextlib.suppress(OSError):
            write_json(path, asdict(position), indent=None, durable=False)
        return position

    def _report_and_exit(self, position: Position, limit: float) -> None:
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        missing = "; ".join(
            missing_ranks(self.folder, ranks.world_size(), 3 * self.period)
        ) or describe_deadlock(self.folder, ranks.world_size())
        log_from_any_rank(
            f"rank {ranks.rank()}: no step for {limit / 60:g} minutes "
            f"(training.hang_minutes): waiting at {position}. "
            f"Missing: {missing}. The stacks are above; leaving with code "
            f"{HUNG}"
        )
        os._exit(HUNG)


def missing_ranks(folder: Path, world_size: int, stale_seconds: float) -> list[str]:
    """The ranks that are in no collective or give no sign of life, each with what it last said."""
    rows = []
    for rank in range(world_size):
        path = folder / f"rank-{rank}.json"
        if not path.is_file():
            rows.append(f"rank {rank} (never seen)")
            continue
        position = Position(**json.loads(path.read_text(encoding="utf-8")))
        age = time.time() - position.time
        if age > stale_seconds:
            rows.append(f"rank {rank} (no sign of life for {age:.0f} s; last at {position})")
        elif position.collective is None:
            rows.append(f"rank {rank} ({position})")
    return rows


def describe_deadlock(folder: Path, world_size: int) -> str:
    """No rank is missing: they wait for each other, and in different places where their programs
    went different ways."""
    positions = [
        Position(**json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")))
        for rank in range(world_size)
    ]
    if len({(position.step, position.collective, position.line) for position in positions}) == 1:
        return "none: all wait in the same collective, so the network or a device hangs"
    return "none, but they wait in different places: " + "; ".join(
        f"rank {i} at {position}" for i, position in enumerate(positions)
    )


def _current_position() -> tuple[str | None, str]:
    """The collective that a thread of this process is in, and the innermost line of ship_ds above
    it."""
    here = threading.get_ident()
    stacks = [_stack(frame) for thread, frame in sys._current_frames().items() if thread != here]
    line = next((text for text in map(_line_of_package, stacks) if text), "outside ship_ds")
    for stack in stacks:
        for frame in stack:
            if frame.f_code.co_filename.endswith(_COLLECTIVES):
                return frame.f_code.co_name, _line_of_package(stack) or line
    return None, line


def _stack(frame: FrameType | None) -> list[FrameType]:
    """Innermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _line_of_package(stack: list[FrameType]) -> str | None:
    for frame in stack:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE) and not path.endswith(("stopping.py", "watchdog.py")):
            return f"{path.removeprefix(_PACKAGE + '/')}:{frame.f_lineno} {frame.f_code.co_name}"
    return None
