"""One row a step to metrics.jsonl and TensorBoard, a progress bar on rank 0, and the picture of the losses at the end."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Monitor:
    """Lives on rank 0 alone."""

    def __init__(self, folder: Path, num_steps: int, first_step: int) -> None:
        self.folder = folder
        self._drop_rows_after(first_step)
        self.rows = (folder / "metrics.jsonl").open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self.bar = tqdm(total=num_steps, initial=first_step, unit="step", mininterval=5, dynamic_ncols=True)

    def _drop_rows_after(self, first_step: int) -> None:
        """A resumed run writes each step once: rows of steps that will be taken again go, and so does a half-written one."""
        for name, last in (("metrics.jsonl", first_step - 1), ("evaluations.jsonl", first_step)):
            path = self.folder / name
            if path.exists():
                whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
                part = path.with_suffix(".part")
                part.write_text("".join(line for line in whole if json.loads(line)["step"] <= last))
                part.replace(path)

    def step(self, step: int, scalars: Mapping[str, float]) -> None:
        """A value that is not finite is null in metrics.jsonl (JSON has no NaN) and NaN in TensorBoard."""
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self.rows.write(json.dumps({"step": step, **finite}) + "\n")
        self.rows.flush()
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)
        self.bar.update()
        speed = scalars["speed/tokens_per_second"]
        self.bar.set_postfix_str(f"loss {scalars['loss/total']:.3f}, {speed:.0f} tokens/s", refresh=False)

    def evaluation(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)
        with (self.folder / "evaluations.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        self.bar.write(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in scalars.items()))

    def texts(self, step: int, pairs: Sequence[tuple[str, str]]) -> None:
        table = "| instruction | reconstructed |\n|---|---|\n" + "\n".join(f"| {true} | {text} |" for true, text in pairs)
        self.board.add_text("reconstruction", table, step)

    def kl_per_dimension(self, step: int, kl_Z: torch.Tensor) -> None:
        self.board.add_histogram("latent/kl_per_dimension", kl_Z, step)

    def close(self) -> None:
        from ship_ds.monitor import figures  # matplotlib: a second that only the end of a run needs

        self.bar.close()
        self.rows.close()
        self.board.close()
        figures.save("loss", figures.losses, [self.folder], self.folder)


def memory_gigabytes() -> float:
    """What this process holds now: allocated on its GPU, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e9
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


class Stopwatch:
    """Seconds and tokens of the steps alone; evaluation and checkpoints are left out."""

    def __init__(self) -> None:
        self.seconds, self.tokens, self._started = 0.0, 0, 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self, tokens: int) -> float:
        elapsed = time.perf_counter() - self._started
        self.seconds += elapsed
        self.tokens += tokens
        return elapsed
