"""One row a step to metrics.jsonl and TensorBoard, a progress bar on rank 0, and the picture of the
losses at the end.

Letters: Z latent size.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ship_ds.console import log
from ship_ds.files import write_text


class Monitor:
    """Lives on rank 0 alone."""

    def __init__(self, folder: Path, num_steps: int, first_step: int) -> None:
        self.folder = folder
        for name, last in (
            ("metrics.jsonl", first_step - 1),
            ("bad_steps.jsonl", first_step - 1),
            ("evaluations.jsonl", first_step),
        ):
            _drop_rows_after(folder / name, last)
        self.rows = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._last_row: dict[str, float | None] = {}
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self.bar = tqdm(
            total=num_steps, initial=first_step, unit="step", mininterval=5, dynamic_ncols=True
        )

    def step(self, step: int, scalars: Mapping[str, float]) -> None:
        """A value that is not finite is null in metrics.jsonl (JSON has no NaN) and NaN in
        TensorBoard."""
        self._last_row = {"step": step, **_finite(scalars)}
        self._offset_of_last_row = self.rows.tell()
        self._write_row()
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)
        self.bar.update()
        speed = scalars["speed/tokens_per_second"]
        self.bar.set_postfix_str(
            f"loss {scalars['loss/total']:.3f}, {speed:.0f} tokens/s", refresh=False
        )

    def _write_row(self) -> None:
        self.rows.write(json.dumps(self._last_row) + "\n")
        self.rows.flush()

    def evaluation(self, step: int, scalars: Mapping[str, float]) -> None:
        """After `step` steps: joins the row of the last of them, whose number is one less, in
        metrics.jsonl and TensorBoard. A run that has resumed has no such row; evaluations.jsonl has
        every evaluation. A value that is not finite is written as in `step`."""
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step - 1)
        if self._last_row.get("step") == step - 1:
            self.rows.truncate(self._offset_of_last_row)
            self._last_row |= _finite(scalars)
            self._write_row()
        with (self.folder / "evaluations.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **_finite(scalars)}) + "\n")
        self.bar.write(
            f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in scalars.items())
        )

    def texts(self, step: int, pairs: Sequence[tuple[str, str]]) -> None:
        rows = [f"| {_cell(true)} | {_cell(text)} |" for true, text in pairs]
        table = "\n".join(["| instruction | reconstructed |", "|---|---|", *rows])
        self.board.add_text("reconstruction", table, step - 1)

    def kl_per_dimension(self, step: int, kl_Z: torch.Tensor) -> None:
        self.board.add_histogram("latent/kl_per_dimension", kl_Z, step)

    def close(self) -> None:
        # Here, for matplotlib: a second that only the end of a run needs.
        from ship_ds.evaluation import figures

        self.bar.close()
        self.rows.close()
        self.board.close()
        figures.save("loss", figures.losses, [self.folder], self.folder)


def _drop_rows_after(path: Path, last: int) -> None:
    """A resumed run writes each step once: rows of steps that will be taken again go, and so do
    damaged ones, of which a line is logged, and a half-written one at the end.

    Args:
        path: of the rows; it may not be there.
        last: step whose rows stay.
    """
    if not path.exists():
        return
    # By hand: a block that a power cut has left unwritten is no text, and may look like more ends
    # of lines than there are.
    *lines, _ = path.read_bytes().split(b"\n")
    steps = [_step_of(line) for line in lines]
    if num_damaged := steps.count(None):
        log(f"{path}: {num_damaged} damaged rows, as after a power cut: left out")
    rows = (
        line for line, step in zip(lines, steps, strict=True) if step is not None and step <= last
    )
    write_text(path, "".join(row.decode() + "\n" for row in rows))


def _step_of(line: bytes) -> int | None:
    """The step of a row; None: it is damaged."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None


def _finite(scalars: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in scalars.items()}


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def memory_gigabytes() -> float:
    """The most that this process has had allocated on its GPU since `reset_peak_memory`; without
    one, what it has resident now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def reset_peak_memory() -> None:
    """Forget the peak of an evaluation, which would else stand beside every later step."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


class Stopwatch:
    """Seconds and tokens of the steps alone; evaluation and checkpoints are left out."""

    def __init__(self) -> None:
        self.seconds, self.tokens, self._started = 0.0, 0, 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def seconds_so_far(self) -> float:
        """Of the steps before and of the one that runs."""
        return self.seconds + time.perf_counter() - self._started

    def stop(self, tokens: int) -> float:
        elapsed = time.perf_counter() - self._started
        self.seconds += elapsed
        self.tokens += tokens
        return elapsed
