"""What all trained baselines share: train once within the setting's time, keep the weights, load
them afterwards.

    FOLDER/weights/weights.safetensors    the trained tensors
    FOLDER/weights/manifest.json          what they were trained for; the file's size, SHA-256
"""

import hashlib
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ship_ds.console import log
from ship_ds.data.sampler import StepSampler, balanced
from ship_ds.evaluation.baselines.fitting import Budget, Minutes
from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.evaluation.method import Setting
from ship_ds.files import recover, sha256, whole_folder
from ship_ds.runtime import ranks

_WEIGHTS, _MANIFEST = "weights.safetensors", "manifest.json"
TRAINING = 3
"""Of the way in which `fit` and `prepare` train; under another one weights are trained again."""


@contextmanager
def _all_cores() -> Iterator[None]:
    """All that this process may use: the other ranks wait meanwhile, and torchrun gives each
    process one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class TrainedMethod(ABC):
    """A baseline with weights of its own in `self.module`, over the frozen base, which is no part
    of the module.

    recipe: a frozen dataclass of its numbers; they are in the manifest, so weights trained by other
    ones are not reused.
    budget: what training may spend; None for the setting's minutes.
    """

    name: ClassVar[str]
    states_instruction: ClassVar[bool]
    answers_as_ship: ClassVar[bool] = False
    recipe: ClassVar[Any]

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """The recipe, and the version of the loop that trains by it."""
        return {"recipe": asdict(cls.recipe), "training": TRAINING}

    def __init__(self, setting: Setting, budget: Budget | None = None) -> None:
        self.setting = setting
        self.budget = budget or Minutes(setting.minutes)
        self.base = FrozenBase(setting.ship)
        with torch.random.fork_rng():
            torch.manual_seed(setting.seed)
            self.module = self.build().to(self.base.device)

    @abstractmethod
    def build(self) -> nn.Module:
        """The untrained weights, drawn under the setting's seed."""

    @abstractmethod
    def train(self) -> None:
        """Fit `self.module` within `self.budget`."""

    def prepare(self) -> None:
        """Rank 0 trains unless good weights for this very setting are there; every rank loads what
        is on the disk."""
        if ranks.rank() == 0 and not self._is_stored():
            started = time.perf_counter()
            with torch.random.fork_rng(), _all_cores():
                torch.manual_seed(self.setting.seed)
                self.train()
            self._store(time.perf_counter() - started)
        ranks.barrier()
        self.module.load_state_dict(load_file(self._folder / _WEIGHTS))
        self.module.eval().requires_grad_(False)

    @property
    def _folder(self) -> Path:
        return self.setting.folder / "weights"

    def _identity(self) -> dict[str, Any]:
        """All that decides the weights."""
        training = self.setting.ship.config.training
        return {
            "method": self.name,
            "training": TRAINING,
            "recipe": asdict(self.recipe),
            "budget": repr(self.budget),
            "seed": self.setting.seed,
            "step": [training.tasks_per_step, training.examples_per_task, training.family_alpha],
            "seen": hashlib.sha256(repr(self.setting.splits.seen).encode()).hexdigest()[:16],
            "base": self.base.fingerprint(),
        }

    def _is_stored(self) -> bool:
        """Whether the weights of this very setting are on the disk; where others are, a line on
        standard error says what differs."""
        recover(self._folder)
        if not (self._folder / _MANIFEST).is_file():
            return False
        manifest = json.loads((self._folder / _MANIFEST).read_text())
        identity = json.loads(json.dumps(self._identity()))
        different = [key for key in identity if manifest.get(key) != identity[key]]
        if not different and manifest["sha256"] == sha256(self._folder / _WEIGHTS):
            return True
        reason = (
            f"other {', '.join(different)}"
            if different
            else "the file is not the one in its manifest"
        )
        log(f"{self._folder}: {reason}; training {self.name} again")
        return False

    def _store(self, seconds: float) -> None:
        with whole_folder(self._folder) as part:
            save_file(
                {name: tensor.contiguous() for name, tensor in self.module.state_dict().items()},
                part / _WEIGHTS,
            )
            manifest = {
                **self._identity(),
                "train_seconds": round(seconds, 1),
                "sha256": sha256(part / _WEIGHTS),
            }
            (part / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    @cached_property
    def sampler(self) -> StepSampler:
        """The seen tasks in SHIP's own order and step size."""
        training = self.setting.ship.config.training
        tasks = balanced(self.setting.splits.seen, training.family_alpha)
        return StepSampler(
            tasks, self.setting.seed, training.tasks_per_step, training.examples_per_task, 0, 0.0
        )
