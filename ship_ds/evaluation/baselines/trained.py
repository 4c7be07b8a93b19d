"""What all trained baselines share: train once within the setting's time, keep the weights, load
them afterwards.

    FOLDER/weights/weights.safetensors    the trained tensors
    FOLDER/weights/manifest.json          what they were trained for, and what that took; the file's
                                          SHA-256
    FOLDER/curve.json                     its losses, and its scores on dev on the way
"""

import hashlib
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ship_ds.api import Ship
from ship_ds.console import log
from ship_ds.data.sampler import StepSampler, TaskDraw, balanced
from ship_ds.data.task import SplitTask, spread
from ship_ds.errors import UserError
from ship_ds.evaluation.baselines.fitting import DevCurve, fit
from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.evaluation.budgets import Budget, Spent, UntilDevStops
from ship_ds.evaluation.config import Direction
from ship_ds.evaluation.judges import RougeJudge
from ship_ds.evaluation.measure import measure
from ship_ds.evaluation.method import Deduces, Setting
from ship_ds.evaluation.metrics import score
from ship_ds.evaluation.questions import ask
from ship_ds.files import recover, sha256, whole_folder, write_json
from ship_ds.parsing import read_json_object
from ship_ds.runtime import ranks

_WEIGHTS, _MANIFEST = "weights.safetensors", "manifest.json"
DEV_CURVE = "curve.json"
_NUM_DEV_TASKS, _NUM_SHOWN = 24, 5
"""Of a look at dev; the second to a method that induces."""
TRAINING = 4
"""Of the way in which `fit` and `prepare` train; under another one weights are trained again."""
_DEV_SCORE = 2
"""Of the way in which a look at dev scores: it decides how long a training goes on that has no
other end."""


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
    budget: what training may spend; None for the setting's.
    """

    name: ClassVar[str]
    states_instruction: ClassVar[bool]
    answers_as_ship: ClassVar[bool] = False
    about: ClassVar[str]
    sees_labels: ClassVar[bool] = False
    asks_ship: ClassVar[bool] = False
    in_stages: ClassVar[bool] = False
    """Whether its training shares the budget out to several stages (`Budget.rest`)."""
    recipe: ClassVar[Any]

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """The recipe, and the version of the loop that trains by it."""
        return {"recipe": cls.numbers(), "training": TRAINING}

    @classmethod
    def numbers(cls) -> dict[str, Any]:
        """The recipe's, by which trained weights are found again."""
        # Before 0.2.0's end a later stage had its own share alone.
        stages = {"stages": "a later one has what the first leaves"} if cls.in_stages else {}
        return {**asdict(cls.recipe), **stages}

    @classmethod
    def cannot(cls, ship: Ship) -> tuple[Direction, ...]:
        """It trains all that it needs."""
        return ()

    @classmethod
    def applies(cls, task: SplitTask, ship: Ship) -> bool:
        """To every task of every run."""
        return True

    def __init__(self, setting: Setting, budget: Budget | None = None) -> None:
        self.setting = setting
        chosen = budget or setting.budget
        assert chosen is not None, "who makes a method that trains says what it may spend"
        self.budget: Budget = chosen
        self.base = FrozenBase.of_run(setting.ship)
        self.dev_curve, self.fitted = self._dev_curve(), Spent()
        with torch.random.fork_rng():
            torch.manual_seed(setting.seed)
            self.module = self.build().to(self.base.device)

    @abstractmethod
    def build(self) -> nn.Module:
        """The untrained weights, drawn under the setting's seed."""

    @abstractmethod
    def train(self) -> None:
        """Fit `self.module` within `self.budget`."""

    def fit(
        self,
        losses_at: Callable[[int], Iterable[Tensor]],
        budget: Budget,
        lr: float,
        title: str,
        num_examples: int | None = None,
    ) -> None:
        """Train the module for one stage; see `fitting.fit`.

        Args:
            losses_at: the pieces of a step's loss.
            budget: of the stage.
            lr: at its highest.
            title: of the stage.
            num_examples: that a step answers; None: as many as a step of SHIP.
        """
        a_step = self.sampler.tasks_per_step * self.sampler.examples_per_task
        started = time.perf_counter() - self._looked_seconds
        losses = fit(
            self.module.parameters(),
            losses_at,
            budget,
            lr,
            title,
            num_examples=a_step if num_examples is None else num_examples,
            dev_curve=self.dev_curve,
        )
        took = time.perf_counter() - self._looked_seconds - started
        self.fitted = self.fitted.after(len(losses), 0, self.fitted.seconds + took)

    @property
    def _looked_seconds(self) -> float:
        return 0.0 if self.dev_curve is None else self.dev_curve.seconds

    def _dev_curve(self) -> DevCurve | None:
        """At a few dev tasks; an open-ended training looks once a round over the seen tasks, or
        every ten steps."""
        num_looks = self.setting.num_looks
        if not num_looks or not [task for task in self.setting.splits.dev if task.test]:
            return None
        a_round = len(self.sampler.tasks) // self.sampler.tasks_per_step
        return DevCurve(self.dev_score, num_looks, max(10, a_round))

    def dev_score(self) -> float:
        """ROUGE-L on dev of the weights as they are: of answers, or of induced instructions where
        that is all the method does. An exact match has 1."""
        dev = [task for task in self.setting.splits.dev if task.test]
        num_asked = self.setting.ship.config.evaluation.examples_per_task
        questions = [
            ask(task, _NUM_SHOWN, self.setting.seed, num_asked, "dev")
            for task in spread(dev, _NUM_DEV_TASKS)
        ]
        direction: Direction = "deduction" if isinstance(self, Deduces) else "induction"
        outcome = measure(self, direction, questions, [RougeJudge()])
        return score(outcome.values("rouge_l")).value

    def prepare(self) -> None:
        """Rank 0 trains unless good weights for this very setting are there; every rank loads what
        is on the disk.

        Raises:
            RankError: on the other ranks, in one line what went wrong on rank 0.
            UserError: likewise, for what a user can mend.
        """
        ranks.gather_results(self._train_on_rank_0)
        self.module.load_state_dict(load_file(self._folder / _WEIGHTS))
        self.module.eval().requires_grad_(False)

    def _train_on_rank_0(self) -> None:
        if ranks.rank() or self._is_stored():
            return
        started = time.perf_counter()
        with torch.random.fork_rng(), _all_cores():
            torch.manual_seed(self.setting.seed)
            self.train()
        self._store(time.perf_counter() - started)
        path = self.setting.folder / DEV_CURVE
        if self.dev_curve is not None:
            write_json(path, self.dev_curve.as_json())
        else:
            path.unlink(missing_ok=True)  # of other weights

    @property
    def _folder(self) -> Path:
        return self.setting.folder / "weights"

    def _identity(self) -> dict[str, Any]:
        """All that decides the weights."""
        training = self.setting.ship.config.training
        return {
            "method": self.name,
            "training": TRAINING,
            "recipe": self.numbers(),
            "budget": repr(self.budget),
            "seed": self.setting.seed,
            "step": [training.tasks_per_step, training.examples_per_task, training.family_alpha],
            "seen": hashlib.sha256(repr(self.setting.splits.seen).encode()).hexdigest()[:16],
            "base": self.base.fingerprint(),
            **({"labels": "balanced where enough"} if training.balances_labels else {}),
            **({"dev score": _DEV_SCORE} if isinstance(self.budget, UntilDevStops) else {}),
        }

    def _is_stored(self) -> bool:
        """Whether the weights of this very setting are on the disk; where others are, a line on
        standard error says what differs."""
        recover(self._folder)
        if not (self._folder / _MANIFEST).is_file():
            return False
        reason = self._why_not_these()
        if reason is not None:
            log(f"{self._folder}: {reason}; training {self.name} again")
        return reason is None

    def _why_not_these(self) -> str | None:
        """Why the weights on the disk are not those of this setting; None: they are."""
        try:
            manifest = read_json_object(self._folder / _MANIFEST)
        except UserError:
            return f"{_MANIFEST} is damaged"
        identity = json.loads(json.dumps(self._identity()))
        if different := [key for key in identity if manifest.get(key) != identity[key]]:
            return f"other {', '.join(different)}"
        weights = self._folder / _WEIGHTS
        if not weights.is_file():
            return f"{_WEIGHTS} is missing"
        is_same = manifest.get("sha256") == sha256(weights)
        return None if is_same else "the file is not the one in its manifest"

    def _store(self, seconds: float) -> None:
        with whole_folder(self._folder) as part:
            save_file(
                {name: tensor.contiguous() for name, tensor in self.module.state_dict().items()},
                part / _WEIGHTS,
            )
            manifest = {
                **self._identity(),
                "train_seconds": round(seconds, 1),
                "costs": self._costs(seconds),
                "sha256": sha256(part / _WEIGHTS),
            }
            write_json(part / _MANIFEST, manifest, indent=2)

    def _costs(self, seconds: float) -> dict[str, Any]:
        """As `costs.training_costs` has them of a run; a step's seconds are the mean of those that
        train its own weights."""
        steps = self.fitted.steps
        a_step = {"seconds_a_step": round(self.fitted.seconds / steps, 4)} if steps else {}
        return {
            "steps": steps,
            "minutes": round((seconds - self._looked_seconds) / 60, 4),
            **a_step,
            "trained_parameters": sum(one.numel() for one in self.module.parameters()),
        }

    @cached_property
    def sampler(self) -> StepSampler:
        """The seen tasks in SHIP's own order and step size. Labels are balanced where its are, of
        tasks that have enough for these draws, which show nothing."""
        training = self.setting.ship.config.training
        tasks = balanced(self.setting.splits.seen, training.family_alpha)
        return StepSampler(
            tasks,
            self.setting.seed,
            training.tasks_per_step,
            training.examples_per_task,
            max_shown=0,
            drop_latent=0.0,
            balances_labels=training.balances_labels,
        )


def costs_of(method: type[TrainedMethod], folder: Path, budget: Budget) -> dict[str, Any]:
    """What the training of the method whose folder this is took; empty where it was trained by
    another recipe or for another budget, by a version that did not say, or not at all.

    Args:
        method: whose recipe the training must have had.
        folder: the method's own (`Setting.folder`).
        budget: that the training must have had.

    Returns:
        `steps`, `minutes` without those on dev, `trained_parameters` and, where there were steps,
        `seconds_a_step`.

    Raises:
        UserError: the manifest is damaged.
    """
    path = folder / "weights" / _MANIFEST
    manifest = read_json_object(path) if path.is_file() else {}
    expected = {"recipe": json.loads(json.dumps(method.numbers())), "budget": repr(budget)}
    is_same = expected.items() <= manifest.items()
    costs: dict[str, Any] = manifest.get("costs", {}) if is_same else {}
    return costs


def targets_of(draws: Sequence[TaskDraw]) -> list[list[str]]:
    """The right answers, one row a task."""
    return [[example.target for example in draw.answered] for draw in draws]
