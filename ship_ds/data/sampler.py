"""Which tasks, examples and wordings make up a step: a pure function of (seed, step), the same on
any number of ranks.

An epoch is a fresh permutation of the seen tasks, those of small families several times where asked
for; step s takes the tasks at positions s*T to (s+1)*T of the endless row of epochs. The position
in the data is therefore the step number alone.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ship_ds.data.task import Example, SplitTask

_INSTRUCTION_SHARE = 0.5
"""How often a task is given in its own words; else in one of its paraphrases, each as often as the
others."""


@dataclass(frozen=True)
class TaskDraw:
    """One task of one step: a wording, the examples to answer, and the other examples shown to the
    decoder."""

    task_id: str
    wording: str
    answered: tuple[Example, ...]
    shown: tuple[Example, ...]
    shows_latent: bool


def balanced(tasks: Sequence[SplitTask], alpha: float) -> tuple[SplitTask, ...]:
    """What an epoch goes through: every task once where alpha is 1, else four times, and those of
    smaller families oftener.

    A family of n tasks is met about in proportion to n to the power of alpha, as languages are in
    mT5 (Xue et al. 2021); at 0 all families are met equally often. Tasks without a family are one
    family. A step that meets a task twice gives it the same noise twice.
    """
    if alpha == 1:
        return tuple(tasks)
    sizes = Counter(task.task.family for task in tasks)
    largest = max(sizes.values())
    return tuple(
        task
        for task in tasks
        for _ in range(round(4 * (largest / sizes[task.task.family]) ** (1 - alpha)))
    )


@dataclass(frozen=True)
class StepSampler:
    """Draws what makes up each step, as a pure function of the seed and the step."""

    tasks: Sequence[SplitTask]
    seed: int
    tasks_per_step: int
    examples_per_task: int
    max_shown: int
    drop_latent: float
    _newest: dict[int, list[TaskDraw]] = field(default_factory=dict, compare=False, repr=False)

    def draw_step(self, step: int) -> list[TaskDraw]:
        """The draws of global step `step`, sorted by length so that micro-batches pad little.

        All of them show the decoder equally many examples: drawn task by task, most of the
        decoder's work would be padding.
        """
        start = step * self.tasks_per_step
        num_shown = random.Random(f"{self.seed} shown {step}").randint(0, self.max_shown)
        positions = range(start, start + self.tasks_per_step)
        draws = [self._draw(self._task_at(position), position, num_shown) for position in positions]
        return sorted(draws, key=lambda draw: (sum(len(e.input) for e in draw.shown), draw.task_id))

    def draw_rank(self, step: int, part: int, num_parts: int) -> list[TaskDraw]:
        """Every `num_parts`-th draw of the step, from `part` on: each part gets short and long
        ones."""
        # The micro-batches of a step are drawn one after the other: the step is drawn once.
        if step not in self._newest:
            self._newest.clear()
            self._newest[step] = self.draw_step(step)
        return self._newest[step][part::num_parts]

    def _task_at(self, position: int) -> SplitTask:
        epoch, offset = divmod(position, len(self.tasks))
        return self.tasks[_permutation(self.seed, epoch, len(self.tasks))[offset]]

    def _draw(self, task: SplitTask, position: int, num_shown: int) -> TaskDraw:
        rng = random.Random(f"{self.seed} {position} {task.id}")
        num_answered = min(self.examples_per_task, len(task.train))
        num_shown = min(num_shown, len(task.train) - num_answered)
        drawn = rng.sample(task.train, num_answered + num_shown)
        if num_answered < self.examples_per_task:
            drawn = rng.choices(task.train, k=self.examples_per_task)
            num_answered = self.examples_per_task
        shows_latent = num_shown == 0 or rng.random() >= self.drop_latent
        others = task.task.paraphrases
        wording = (
            rng.choice(others)
            if others and rng.random() >= _INSTRUCTION_SHARE
            else task.task.instruction
        )
        return TaskDraw(
            task.id, wording, tuple(drawn[:num_answered]), tuple(drawn[num_answered:]), shows_latent
        )


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return tuple(order)
