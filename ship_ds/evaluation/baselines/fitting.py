"""The loop that every baseline is trained by: Adam, clipping, a warm-up and a cosine over what may
be spent."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

_WARMUP = 0.1
"""Of the budget: a fixed number of steps would be all that a short training has."""


class Budget(Protocol):
    """What a training may spend."""

    def spent(self, step: int, seconds: float) -> float:
        """The share spent after `step` steps and so many seconds; at 1 it is over."""

    def share(self, part: float) -> "Budget":
        """That part of it, for one stage."""


@dataclass(frozen=True)
class Minutes:
    """Wall-clock time. How many steps that makes depends on the machine, so two trainings
    differ."""

    minutes: float

    def spent(self, step: int, seconds: float) -> float:
        return seconds / 60 / self.minutes

    def share(self, part: float) -> "Minutes":
        return Minutes(self.minutes * part)


@dataclass(frozen=True)
class Steps:
    """A number of steps: the same training every time."""

    steps: int

    def spent(self, step: int, seconds: float) -> float:
        return step / self.steps

    def share(self, part: float) -> "Steps":
        return Steps(max(1, round(self.steps * part)))


def fit(
    parameters: Iterable[nn.Parameter],
    loss_at: Callable[[int], Tensor],
    budget: Budget,
    lr: float,
    title: str,
    clip: float = 1.0,
) -> list[float]:
    """Minimise `loss_at(step)` until the budget is spent; the losses of all steps, in nats.

    clip: the largest gradient norm; infinity keeps weights of tasks that are trained beside each
    other independent. Progress goes to stderr. A step whose loss is not finite raises ValueError: a
    baseline that diverged is no baseline.
    """
    trained = list(parameters)
    optimiser = torch.optim.Adam(trained, lr=lr, betas=(0.9, 0.98))
    losses: list[float] = []
    started = time.perf_counter()
    with tqdm(desc=title, unit="step", mininterval=5, dynamic_ncols=True) as bar:
        while (spent := budget.spent(len(losses), time.perf_counter() - started)) < 1:
            factor = min(1.0, 0.05 + spent / _WARMUP) * (1 + math.cos(math.pi * spent)) / 2
            for group in optimiser.param_groups:
                group["lr"] = lr * factor
            optimiser.zero_grad()
            loss = loss_at(len(losses))
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ValueError(
                    f"{title}: the loss of step {len(losses) - 1} is not finite; "
                    f"lower its lr ({lr})"
                )
            loss.backward()
            nn.utils.clip_grad_norm_(trained, clip)
            optimiser.step()
            bar.update()
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {spent:.0%} of the budget", refresh=False)
    return losses
