"""Which tasks, examples and wordings make up a step: a pure function of (seed, step), the same on
any number of ranks.

An epoch is a fresh permutation of the seen tasks, those of small families several times where asked
for; step s takes the tasks at positions s*T to (s+1)*T of the endless row of epochs. The position
in the data is therefore the step number alone. A task of weight w comes w times an epoch: of weight
2 twice in each, of weight 0.1 once in every ten (`Epochs`).
"""

import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ship_ds.data.labels import label_forms, num_by_label, sample_by_label
from ship_ds.data.task import Example, Reading, SplitTask

_INSTRUCTION_SHARE = 0.5
"""How often a task is given in its own words; else in one of its paraphrases, each as often as the
others."""


@dataclass(frozen=True)
class TaskDraw:
    """One task of one step: a wording, the examples to answer, the other examples shown to the
    decoder, and what the encoder reads; None: the wording alone.

    other_wording: another one of the task, for who compares two; None: it has none.
    """

    task_id: str
    wording: str
    answered: tuple[Example, ...]
    shown: tuple[Example, ...]
    shows_latent: bool
    other_wording: str | None = None
    read: Reading | None = None

    @property
    def reading(self) -> Reading:
        """What the encoder reads."""
        return self.read or Reading(self.wording)


@dataclass(frozen=True)
class ReadingDraw:
    """What of a task the encoder reads.

    max_examples: at most, of those that are not answered; each step draws how many.
    drop_instruction: how often the wording is left out where there are examples. drop_targets:
    likewise the examples' targets. drop_words: how often a word of the wording is, one by one.
    """

    max_examples: int = 0
    drop_instruction: float = 0.0
    drop_targets: float = 0.0
    drop_words: float = 0.0

    def draw(
        self,
        task: SplitTask,
        wording: str,
        answered: Sequence[Example],
        seed: int,
        place: str,
        forms: Mapping[str, str] | None = None,
    ) -> Reading | None:
        """The reading of a task, a function of the arguments alone; None: its wording as it is.

        Args:
            task: its training examples are drawn from.
            wording: as the step draws it.
            answered: whose inputs are not shown: their targets would be.
            seed: of the run.
            place: "step position", of which the step draws the number of examples.
            forms: of the labels that are to be equally frequent (`labels.label_forms`); None: as
                they come.
        """
        kept = self._some_words(wording, random.Random(f"{seed} words {place} {task.id}"))
        alone = None if kept == wording else Reading(kept)
        if not self.max_examples:
            return alone
        step, _, position = place.partition(" ")
        count = random.Random(f"{seed} read {step}").randint(0, self.max_examples)
        rng = random.Random(f"{seed} read {position} {task.id}")
        known = {example.input for example in answered}
        others = [example for example in task.train if example.input not in known]
        examples = tuple(rng.sample(others, min(count, len(others))))
        if forms:
            of_labels = random.Random(f"{seed} read labels {position} {task.id}")
            examples = tuple(sample_by_label(others, len(examples), forms, of_labels))
        if not examples:
            return alone
        drops_instruction = rng.random() < self.drop_instruction
        drops_targets = rng.random() < self.drop_targets
        return Reading(None if drops_instruction else kept, examples, not drops_targets)

    def _some_words(self, wording: str, rng: random.Random) -> str:
        """The wording without some of its words; one stays at least. Between two that stay is the
        white space that was there, with its line breaks."""
        if not self.drop_words:
            return wording
        words = wording.split()
        kept = [i for i in range(len(words)) if rng.random() >= self.drop_words]
        if len(kept) == len(words):
            return wording
        kept = kept or rng.sample(range(len(words)), 1)
        gaps = re.findall(r"\s+", wording.strip())
        between = [max(gaps[i:j], key=lambda gap: gap.count("\n")) for i, j in pairwise(kept)]
        return words[kept[0]] + "".join(
            gap + words[i] for gap, i in zip(between, kept[1:], strict=True)
        )


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


class Epochs:
    """The endless row of epochs: which task stands at a position.

    After e epochs a task of weight w has come floor(w e + u) times, u being drawn once for each
    task from [0, 1): never more than one from w e, and evenly spread. With weights of 1 every epoch
    has every task once. So epochs may differ in length by a few tasks, and where one begins is a
    formula and no memory.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        rng = random.Random(f"weights {seed}")
        # In steps of 2^-20, which adding to whole numbers keeps exact: weight 1 has to stay even.
        self._first = np.array([rng.randrange(_PHASES) for _ in weights]) / _PHASES
        self._weights, self.seed = np.array(weights, float), seed
        # The epoch that was asked for last; replaced as a whole, since two threads may ask.
        self._last = _Epoch(0, 0, np.zeros(0, np.int64))

    def task_at(self, position: int) -> int:
        """The number of the task at this position."""
        epoch = self._last
        if not epoch.begin <= position < epoch.begin + len(epoch.tasks):
            epoch = self._last = self._epoch_at(position)
        order = _permutation(self.seed, epoch.number, len(epoch.tasks))
        return int(epoch.tasks[order[position - epoch.begin]])

    def _epoch_at(self, position: int) -> "_Epoch":
        """The epoch that holds this position."""
        high = 1
        while self._begin(high) <= position:
            high *= 2
        number = bisect_right(range(high), position, key=self._begin) - 1
        times = self._met_before(number + 1) - self._met_before(number)
        return _Epoch(number, self._begin(number), np.repeat(np.arange(len(times)), times))

    def _begin(self, epoch: int) -> int:
        """The first position of an epoch."""
        return int(self._met_before(epoch).sum())

    def _met_before(self, epoch: int) -> "_Whole":
        """How often each task has come before an epoch."""
        return np.floor(self._weights * epoch + self._first).astype(np.int64)


_PHASES = 1 << 20
_Whole = np.ndarray[tuple[int], np.dtype[np.int64]]


class _Epoch(NamedTuple):
    """Its number, its first position, and its tasks before they are shuffled."""

    number: int
    begin: int
    tasks: _Whole


@dataclass(frozen=True)
class StepSampler:
    """Draws what makes up each step, as a pure function of the seed and the step."""

    tasks: Sequence[SplitTask]
    seed: int
    tasks_per_step: int
    examples_per_task: int
    max_shown: int
    drop_latent: float
    reading: ReadingDraw = ReadingDraw()
    balances_labels: bool = False

    def draw_step(self, step: int) -> list[TaskDraw]:
        """The draws of global step `step`, sorted by length so that micro-batches pad little.

        All of them show the decoder equally many examples: drawn task by task, most of the
        decoder's work would be padding.
        """
        start = step * self.tasks_per_step
        num_shown = random.Random(f"{self.seed} shown {step}").randint(0, self.max_shown)
        positions = range(start, start + self.tasks_per_step)
        draws = [
            self._draw(self._task_at(position), step, position, num_shown) for position in positions
        ]
        return sorted(draws, key=lambda draw: (sum(len(e.input) for e in draw.shown), draw.task_id))

    def draw_rank(
        self, step: int, rank: int, num_ranks: int, accumulation: int = 1
    ) -> list[list[TaskDraw]]:
        """The draws of each of a rank's micro-batches, short and long ones in every one of them.

        The step is drawn once for all of them: that takes 0.16 s at 4,096 tasks of 60 examples, and
        0.24 s where a third of them have labels that are balanced.

        Args:
            step: the global step.
            rank: whose micro-batches these are, from 0.
            num_ranks: that share the step's tasks.
            accumulation: micro-batches of a rank a step.
        """
        draws = self.draw_step(step)
        num_parts = num_ranks * accumulation
        first = rank * accumulation
        return [draws[part::num_parts] for part in range(first, first + accumulation)]

    @cached_property
    def balanced_labels(self) -> dict[str, dict[str, str]]:
        """By id the tasks whose labels are drawn equally often, with the forms of their labels.

        Those of which every label has enough examples for all that a step may answer and show, and
        for all that it may read beside what it answers: were one to run out there, what is read
        would tell what is asked, the label that is missing. Inputs that repeat would let one run
        out too, since none that is answered is read.
        """
        if not self.balances_labels:
            return {}
        answered, read = self.examples_per_task, self.reading.max_examples
        forms_by_id: dict[str, dict[str, str]] = {}
        for task in {task.id: task for task in self.tasks}.values():
            repeats = len({example.input for example in task.train}) < len(task.train)
            if not (read and repeats) and (forms := label_forms(task.train)):
                times = num_by_label(task.train, forms)
                in_draw = -(-(answered + self.max_shown) // len(times))
                in_reading = -(-answered // len(times)) - (-read // len(times))
                if min(times.values()) >= max(in_draw, in_reading):
                    forms_by_id[task.id] = forms
        return forms_by_id

    @cached_property
    def _epochs(self) -> Epochs:
        return Epochs([task.weight for task in self.tasks], self.seed)

    def _task_at(self, position: int) -> SplitTask:
        return self.tasks[self._epochs.task_at(position)]

    def _draw(self, task: SplitTask, step: int, position: int, num_shown: int) -> TaskDraw:
        rng = random.Random(f"{self.seed} {position} {task.id}")
        num_answered = min(self.examples_per_task, len(task.train))
        num_shown = min(num_shown, len(task.train) - num_answered)
        drawn = rng.sample(task.train, num_answered + num_shown)
        forms = self.balanced_labels.get(task.id)
        if forms:
            # By a generator of its own: what is drawn below stays what it is without.
            of_labels = random.Random(f"{self.seed} labels {position} {task.id}")
            drawn = sample_by_label(task.train, len(drawn), forms, of_labels)
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
        answered, shown = tuple(drawn[:num_answered]), tuple(drawn[num_answered:])
        read = self.reading.draw(task, wording, answered, self.seed, f"{step} {position}", forms)
        # Last, so that nothing above depends on it.
        rest = [text for text in (task.task.instruction, *others) if text != wording]
        other = rng.choice(rest) if rest else None
        return TaskDraw(task.id, wording, answered, shown, shows_latent, other, read)


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return tuple(order)
