"""The loop that every baseline is trained by: Adam, clipping, a learning rate over what may be
spent, and evaluates on dev on the way.

A step's loss comes in pieces, each as large as the memory allows; the backward pass of one is made
before the next is computed.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ship_ds.errors import UserError
from ship_ds.evaluation.budgets import Budget, Spent, UntilDevStops

_MOST_POINTS = 200
"""Of a stage's curve on disk, beside the evaluations on dev."""


@dataclass(frozen=True)
class Point:
    """A step of a curve. loss: in nats. dev: the dev score after it, where there was one."""

    step: int
    minutes: float
    examples: int
    loss: float
    dev: float | None = None


@dataclass
class DevCurve:
    """Evaluations on dev while a baseline trains, and the curve that is kept of every stage.

    score: of the weights as they are. num_looks: evaluations of a bounded budget, evenly spaced
    over it, the last one at its end; 0: none. every: steps between two of an open-ended one.
    seconds: that they took. in_words: the best of them, for the progress bar.
    """

    score: Callable[[], float]
    num_looks: int
    every: int
    curves: dict[str, list[Point]] = field(default_factory=dict)
    seconds: float = 0.0
    in_words: Callable[[float], str] = "best on dev {:.3f}".format

    def is_due(self, budget: Budget, before: Spent, now: Spent) -> bool:
        """Whether the step between these two moments is followed by an evaluation.

        Args:
            budget: of the training; an open-ended one goes by `every`, a bounded one by
                `num_looks`.
            before: what the training had used before the step.
            now: what it has used after it.
        """
        if isinstance(budget, UntilDevStops):
            return now.steps % self.every == 0
        # By what the step crosses: in a budget of minutes no step ends exactly on a mark.
        first, second = (math.floor(budget.spent(one) * self.num_looks) for one in (before, now))
        return second > first

    def as_json(self) -> list[dict[str, object]]:
        """Each stage's title and points: all that have a dev score, and of the others at most 200,
        evenly spaced."""
        return [
            {"stage": title, "points": [asdict(point) for point in _thinned(points)]}
            for title, points in self.curves.items()
        ]


def _thinned(points: Sequence[Point]) -> list[Point]:
    stride = -(-len(points) // _MOST_POINTS)
    return [p for i, p in enumerate(points) if i % max(1, stride) == 0 or p.dev is not None]


def fit(
    parameters: Iterable[nn.Parameter],
    losses_at: Callable[[int], Iterable[Tensor]],
    budget: Budget,
    lr: float,
    title: str,
    *,
    num_examples: int = 0,
    clip: float = 1.0,
    dev_curve: DevCurve | None = None,
) -> list[float]:
    """Minimise the sum of `losses_at(step)` until the budget is spent.

    Args:
        parameters: that are trained.
        losses_at: the pieces of a step's loss, each made when the one before is done with.
        budget: what may be spent; `UntilDevStops` needs `dev_curve`.
        lr: of Adam, at its highest.
        title: of the progress bar on standard error, and of the curve.
        num_examples: that a step answers.
        clip: the largest gradient norm; infinity keeps weights of tasks that are trained beside
            each other independent.
        dev_curve: takes the scores on dev; None: there are none.

    Returns:
        The losses of all steps, in nats.

    Raises:
        UserError: a step's loss is not finite: a baseline that diverged is no baseline.
    """
    trained = list(parameters)
    optimiser = torch.optim.Adam(trained, lr=lr, betas=(0.9, 0.98))
    course = _Course(trained, budget, title, dev_curve)
    with tqdm(desc=title, unit="step", mininterval=5, dynamic_ncols=True) as bar:
        while not course.is_over:
            for group in optimiser.param_groups:
                group["lr"] = lr * budget.rate(course.used)
            optimiser.zero_grad()
            loss = 0.0
            # One graph at a time: the next piece is made once this one's is gone.
            for piece in losses_at(course.used.steps):
                loss += piece.item()
                piece.backward()
            if not math.isfinite(loss):
                raise UserError(
                    f"{title}: the loss of step {course.used.steps} is not finite; "
                    f"lower its lr ({lr})"
                )
            nn.utils.clip_grad_norm_(trained, clip)
            optimiser.step()
            course.record(loss, num_examples)
            bar.update()
            bar.set_postfix_str(course.in_words(), refresh=False)
    course.end()
    return [point.loss for point in course.points]


class _Course:
    """How far a training is: what it has spent, its curve, and its best weights on dev."""

    def __init__(
        self,
        trained: Sequence[nn.Parameter],
        budget: Budget,
        title: str,
        dev_curve: DevCurve | None,
    ) -> None:
        assert dev_curve is not None or not isinstance(budget, UntilDevStops), (
            "nothing would end it"
        )
        self.trained, self.budget, self.dev_curve = trained, budget, dev_curve
        self.points: list[Point] = []
        if dev_curve is not None:
            dev_curve.curves[title] = self.points
        self.used = Spent()
        self.started, self.dev_seconds = time.perf_counter(), 0.0
        self.best: tuple[float, list[Tensor]] | None = None
        self.num_without_gain = 0

    @property
    def is_over(self) -> bool:
        if isinstance(self.budget, UntilDevStops):
            return self.num_without_gain >= self.budget.patience
        # As recorded: a clock that is read anew may pass the end after the last step's look at dev
        # was found to be not due.
        return self.budget.spent(self.used) >= 1

    def _now(self) -> Spent:
        seconds = time.perf_counter() - self.started - self.dev_seconds
        return self.used.after(0, 0, seconds)

    def record(self, loss: float, num_examples: int) -> None:
        """After a step: the clock, the curve, and an evaluation on dev where one is due."""
        before = self.used
        self.used = before.after(1, num_examples, self._now().seconds)
        dev = None
        if self.dev_curve is not None and self.dev_curve.is_due(self.budget, before, self.used):
            dev = self._evaluate(self.dev_curve)
        minutes, examples = round(self.used.seconds / 60, 4), self.used.examples
        self.points.append(Point(self.used.steps, minutes, examples, loss, dev))

    def _evaluate(self, dev_curve: DevCurve) -> float:
        started = time.perf_counter()
        dev = dev_curve.score()
        self.num_without_gain += 1
        # An equal score is no gain, or a plateau would never use up the patience.
        if self.best is None or dev > self.best[0]:
            # A bounded training ends with its last weights, so none are copied for it.
            keeps = isinstance(self.budget, UntilDevStops)
            self.best = dev, [p.detach().clone() for p in self.trained] if keeps else []
            self.num_without_gain = 0
        took = time.perf_counter() - started
        self.dev_seconds += took
        dev_curve.seconds += took
        return dev

    def in_words(self) -> str:
        """For the progress bar."""
        words = [f"loss {self.points[-1].loss:.3f}"]
        if self.best is not None and self.dev_curve is not None:
            words.append(self.dev_curve.in_words(self.best[0]))
        if not isinstance(self.budget, UntilDevStops):
            words.append(f"{self.budget.spent(self.used):.0%} of the budget")
        return ", ".join(words)

    @torch.no_grad()
    def end(self) -> None:
        """Put the best weights back where the training went on until dev stopped."""
        if self.best is not None:
            for parameter, best in zip(self.trained, self.best[1], strict=False):
                parameter.copy_(best)
