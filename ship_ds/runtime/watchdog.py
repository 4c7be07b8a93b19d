"""The hang detector: a rank that takes no step for some minutes says where everybody is and ends
the job.

Each rank's watching thread writes where its process stands to RUN/ranks/rank-N.json every few
seconds, so that the others can tell a rank that waits in a collective from one that is somewhere
else, and both from one that is gone. Steps are expected while a run trains, and before all that the
ranks meet; between and after, when a large file may take hours, it is a sign of life from every
rank that has given one. A rank whose
own threads cannot run is named by the process beside it (sign_of_life.py).
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import ship_ds
from ship_ds.console import current_rank, log_from_any_rank
from ship_ds.errors import first_line
from ship_ds.exit_codes import HUNG
from ship_ds.files import write_json
from ship_ds.runtime.run_lock import RANKS_FOLDER, make_run_folder

_PACKAGE = str(Path(ship_ds.__file__).parent)
_COLLECTIVES = (
    "torch/distributed/distributed_c10d.py",
    "deepspeed/comm/comm.py",
    "deepspeed/runtime/zero/partition_parameters.py",
)
"""Files in whose functions a thread waits for other ranks; ZeRO-3 waits for its gathers in the
last."""


class _Expected(NamedTuple):
    """What has to happen within the limit: how its absence is called, and what to do about it."""

    absence: str
    advice: str = ""


_STEP = _Expected("no step")
_MEETING = _Expected(
    "the ranks have not met",
    "Where none is missing, or one gives no sign of life, the network may be another one than the "
    "nodes share: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the interface, NCCL_DEBUG=INFO "
    "says more. ",
)


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
    """Watches from `begin` to `close`; between `start` and `stop` it expects the steps that
    `record_step` tells of, and within `meeting` that this ends.

    Args:
        folder: of the run.
        minutes: after how many without a step, without a meeting, or without a sign of life of
            another rank, the job ends; None watches nothing.
    """

    def __init__(self, folder: Path, minutes: float | None) -> None:
        self.folder = folder / RANKS_FOLDER
        self.limit = None if minutes is None else 60 * minutes
        self.period = 0.0 if minutes is None else min(15.0, 60 * minutes / 10)
        self._step, self._num_records = 0, 0
        self._expected: _Expected | None = None
        # What the neighbour said before this start counts for nothing: it may come much later.
        self._initial_position = None if minutes is None else self._read_neighbour()
        self._last_position, self._num_same_reads = self._initial_position, 0
        self._done = threading.Event()

    def begin(self) -> None:
        """Start the thread; the run folder can be written."""
        if self.limit is None:
            return
        make_run_folder(self.folder.parent)
        self.folder.mkdir(exist_ok=True)
        threading.Thread(
            target=self._watch, args=(self.limit,), name="watchdog", daemon=True
        ).start()

    def start(self) -> None:
        """From here on there are steps."""
        self.record_step(self._step)
        self._expected = _STEP

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """Within it the ranks join one group. What keeps them from it, such as a network that does
        not carry or a rank that was never started, has no limit of its own: the group's is that of
        the slowest rank's data."""
        self.record_step(self._step)
        self._expected = _MEETING
        try:
            yield
        finally:
            self._expected = None

    def record_step(self, step: int) -> None:
        self._step = step
        self._num_records += 1

    def stop(self) -> None:
        """The last step is taken."""
        self._num_same_reads = 0
        self._expected = None

    def close(self) -> None:
        """End the thread."""
        self._done.set()

    def deregister(self) -> None:
        """This rank ends as it should, and the others are not to miss it."""
        self.close()
        with contextlib.suppress(OSError):
            self._path_of(current_rank(os.environ)).unlink(missing_ok=True)

    def _watch(self, limit: float) -> None:
        num_records, without_step, before = self._num_records, 0.0, time.monotonic()
        while not self._done.wait(self.period):
            now = time.monotonic()
            # No more, or the time in which this process was stopped would count.
            without_step += min(now - before, 2 * self.period)
            before = now
            # Before the number of records, or a `start` in between would end the run.
            expected = self._expected
            if expected is None or self._num_records != num_records:
                num_records, without_step = self._num_records, 0.0
            position, is_written = self._write_position()
            if expected is not None:
                if without_step > limit:
                    reason = f"{expected.absence} for {limit / 60:g} minutes"
                    self._report_and_exit(position, reason, expected.advice)
            # Where this rank cannot write, the others cannot either, and are silent for that.
            elif is_written and (text := self._describe_silence(limit)) is not None:
                self._report_and_exit(position, text)

    def _describe_silence(self, limit: float) -> str | None:
        """One more reading of the next rank, the last one's being the first: with each reading one
        file, a thousand ranks are no load on their disk.

        Readings are counted and no clock is read: those of two nodes may differ by hours, and one
        goes on while this process is stopped.
        """
        position = self._read_neighbour()
        if position is None or position == self._initial_position:
            return None
        self._num_same_reads = self._num_same_reads + 1 if position == self._last_position else 0
        self._last_position = position
        if self._num_same_reads * self.period <= limit:
            return None
        return f"no sign of life of rank {self._neighbour()} for {limit / 60:g} minutes"

    def _neighbour(self) -> int:
        return (current_rank(os.environ) + 1) % num_ranks(os.environ)

    def _read_neighbour(self) -> Position | None:
        """None: there is no neighbour, or it has not begun, has left, or cannot be understood."""
        if self._neighbour() == current_rank(os.environ):
            return None
        try:
            return _read_position(self._path_of(self._neighbour()))
        except (OSError, ValueError, TypeError):
            return None

    def _path_of(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _write_position(self) -> tuple[Position, bool]:
        """Where this process stands, and whether it could be written down."""
        position = Position(self._step, *_current_position(), time.time())
        # a full disk ends the run elsewhere, with its own line, but not the watching
        with contextlib.suppress(OSError):
            path = self._path_of(current_rank(os.environ))
            write_json(path, asdict(position), indent=None, durable=False)
            return position, True
        return position, False

    def _report_and_exit(self, position: Position, reason: str, advice: str = "") -> None:
        try:
            with contextlib.suppress(OSError, ValueError):
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
            log_from_any_rank(
                f"rank {current_rank(os.environ)}: {reason} (training.hang_minutes): waiting at "
                f"{position}. Missing: {self._describe_missing()}. {advice}The stacks are above; "
                f"leaving with code {HUNG}"
            )
        finally:
            os._exit(HUNG)

    def _describe_missing(self) -> str:
        size = num_ranks(os.environ)
        try:
            missing = missing_ranks(self.folder, size, 3 * self.period)
            return "; ".join(missing) or describe_deadlock(self.folder, size)
        except (OSError, ValueError, TypeError) as error:
            return f"not known, as {self.folder} cannot be read ({first_line(error)})"


def missing_ranks(folder: Path, world_size: int, stale_seconds: float) -> list[str]:
    """The ranks that are in no collective or give no sign of life, each with what it last said.

    When each last wrote is asked of the files, whose times are of one clock, that of the disk that
    holds them: the clocks of two nodes may differ by hours.

    Args:
        folder: where ranks say what they are at.
        world_size: how many there are.
        stale_seconds: between its last word and the newest of all, after which a rank counts as
            gone.

    Returns:
        A text for each, such as "rank 3 (never seen)".
    """
    paths = {rank: folder / f"rank-{rank}.json" for rank in range(world_size)}
    written = {rank: path.stat().st_mtime for rank, path in paths.items() if path.is_file()}
    newest = max(written.values(), default=0.0)
    rows = []
    for rank, path in paths.items():
        if rank not in written:
            rows.append(f"rank {rank} (never seen)")
            continue
        position = _read_position(path)
        age = newest - written[rank]
        if age > stale_seconds:
            rows.append(f"rank {rank} (no sign of life for {age:.0f} s; last at {position})")
        elif position.collective is None:
            rows.append(f"rank {rank} ({position})")
    return rows


def describe_deadlock(folder: Path, world_size: int) -> str:
    """No rank is missing: they wait for each other, and in different places where their programs
    went different ways."""
    positions = [_read_position(folder / f"rank-{rank}.json") for rank in range(world_size)]
    if len({(position.step, position.collective, position.line) for position in positions}) == 1:
        return "none: all wait in the same collective, so the network or a device hangs"
    return "none, but they wait in different places: " + "; ".join(
        f"rank {i} at {position}" for i, position in enumerate(positions)
    )


def _read_position(path: Path) -> Position:
    return Position(**json.loads(path.read_text(encoding="utf-8")))


def num_ranks(environment: Mapping[str, str]) -> int:
    """How many ranks the launcher has started, before the process group is there."""
    return int(environment.get("WORLD_SIZE") or environment.get("SLURM_STEP_NUM_TASKS") or 1)


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
