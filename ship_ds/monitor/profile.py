"""Some steps of a run under torch.profiler: a trace that TensorBoard opens, and one page of where
the time goes.

    ship-ds train --config quickstart training.profile=5
        RUN/profile.md                              the page
        RUN/tensorboard/rank-0.*.pt.trace.json      the trace: `pip install torch-tb-profiler`,
                                                    chrome://tracing or ui.perfetto.dev
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from ship_ds.files import write_text
from ship_ds.monitor.machine import describe_machine

PROFILE_PAGE = "profile.md"
_LEFT_OUT = 2
"""Steps before: the first ones allocate, compile, and record ZeRO-3's order of gathers."""
_ROWS = 20
_KINDS = {
    "matrix products": ("mm", "matmul", "linear", "gemm", "einsum", "baddbmm"),
    "attention": ("attention", "attn"),
    "between ranks": ("gloo", "nccl", "c10d", "all_reduce", "all_gather", "reduce_scatter"),
    "copies between host and device": ("memcpy", "_to_copy", "copy_"),
    "optimiser": ("adam",),
}
"""Parts of an operation's name, by what it is counted as; the first kind that fits."""


class StepProfile:
    """Profiles the third step of a start and those after it; rank 0 has one."""

    def __init__(self, folder: Path, num_steps: int) -> None:
        """Begin.

        Args:
            folder: of the run.
            num_steps: that are recorded.
        """
        self.folder, self.num_steps = folder, num_steps
        self.is_done = False
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(
            activities=activities,
            schedule=schedule(wait=_LEFT_OUT - 1, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=self._write,
            acc_events=True,
        )
        self.profiler.start()

    def step(self) -> None:
        """Tell of the end of a step."""
        if not self.is_done:
            self.profiler.step()

    def close(self) -> None:
        """End the profile of a run that took fewer steps than were to be recorded."""
        if not self.is_done:
            self.is_done = True
            self.profiler.stop()

    def _write(self, profiler: Any) -> None:
        self.is_done = True
        tensorboard_trace_handler(str(self.folder / "tensorboard"), "rank-0")(profiler)
        # Of those that were to be recorded, a run that ends early took fewer.
        recorded = min(self.num_steps, profiler.step_num - _LEFT_OUT)
        if recorded > 0:
            write_text(self.folder / PROFILE_PAGE, page(profiler.key_averages(), recorded))


def page(events: Iterable[Any], num_steps: int) -> str:
    """The summary of a trace as Markdown.

    Args:
        events: of `profile.key_averages()`. Those of the CPU alone are read: torch puts a kernel's
            time down to the operation that launched it, and once more to the kernel.
        num_steps: that were recorded.
    """
    rows = sorted(
        (
            (self_seconds(event) / num_steps, event.key, event.count / num_steps)
            for event in events
            if event.device_type == DeviceType.CPU
        ),
        reverse=True,
    )
    whole = sum(seconds for seconds, _, _ in rows) or 1.0
    machine = ", ".join(f"{name} {value}" for name, value in describe_machine().items())
    waits = sum(count for _, name, count in rows if name in _waits())
    return "\n".join(
        [
            f"# Profile of {num_steps} steps",
            "",
            f"{machine}. {1000 * whole:.1f} ms of operations a step on rank 0; the host waits for "
            f"a value {waits:.0f} times a step.",
            "",
            "| what | ms a step | share |",
            "|---|---|---|",
            *_kind_rows(rows, whole),
            "",
            "| operation | ms a step | share | calls a step |",
            "|---|---|---|---|",
            *(
                f"| `{name.replace('|', ' ')[:80]}` | {1000 * seconds:.2f} | "
                f"{100 * seconds / whole:.1f} % | {count:.0f} |"
                for seconds, name, count in rows[:_ROWS]
            ),
            "",
        ]
    )


def self_seconds(event: Any) -> float:
    """Of an operation without those that it calls: on the device where there is one."""
    on_device = torch.cuda.is_available()
    return float(event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6


def _waits() -> tuple[str, ...]:
    """Where the host waits for a value: on a CPU, where it would wait for a GPU."""
    if torch.cuda.is_available():
        return ("cudaStreamSynchronize",)
    return ("aten::_local_scalar_dense", "aten::nonzero")


def _kind_rows(rows: Sequence[tuple[float, str, float]], whole: float) -> list[str]:
    totals = dict.fromkeys([*_KINDS, "everything else"], 0.0)
    for seconds, name, _ in rows:
        totals[operation_kind(name)] += seconds
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    return [
        f"| {kind} | {1000 * seconds:.2f} | {100 * seconds / whole:.1f} % |"
        for kind, seconds in ordered
    ]


def operation_kind(name: str) -> str:
    """What an operation is counted as."""
    lower = name.lower()
    return next(
        (kind for kind, parts in _KINDS.items() if any(part in lower for part in parts)),
        "everything else",
    )
