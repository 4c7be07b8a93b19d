"""How far an answer can be relied on: whether adapters of other latents that the posterior holds
for possible answer alike.

    z_s = mean + SPREAD * deviation * noise_s        s = 1 .. S samples of q(z | k)
    agreement of an input                            share of the S answers that are the mean's own

No label is needed. An instruction that lies where the hypernetwork knows what to make of it has one
answer all around; one that it has no place for has as many as samples. On dev tasks, whose labels
are known, it is measured from which agreement on most answers are right (`calibrate`).

Letters: T tasks, Z latent size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ship_ds.data.matching import exact_match
from ship_ds.data.task import SplitTask, spread
from ship_ds.inference.deduction import AnswersByTask, answer_latents
from ship_ds.model.drawing import keyed_generator
from ship_ds.model.encoder import Posterior
from ship_ds.model.ship import AnyReading, ShipModel

NUM_SAMPLES = 8
SPREAD = 2.0
"""Of the samples, in deviations. On 55 dev tasks of the quickstart 2 told right from wrong better
than 1 (docs/results.md)."""
_NUM_TASKS, _NUM_INPUTS = 64, 5
_FEWEST_TASKS = 4
"""With most answers right, and with most wrong, that a threshold is chosen between."""
_RIGHT = 0.5
"""A task is done from this share of right answers on."""


@dataclass(frozen=True)
class Calibration:
    """What agreement says of a run's dev tasks.

    Args:
        threshold: the agreement that best parts tasks of which half or more is answered rightly
            from the others (the largest difference of the two shares that are above it); None
            where too few tasks are of one sort to tell.
        auc: how often a task that is done has more agreement than one that is not; 0.5 is chance;
            None likewise.
        num_tasks: how many there were.
    """

    threshold: float | None
    auc: float | None
    num_tasks: int


@dataclass(frozen=True)
class Confidence:
    """Of the answers to an instruction.

    Args:
        by_input: agreement of each input's samples, from 0 to 1.
        calibration: of the run; None where that was not measured yet, or has no dev tasks to tell
            by.
    """

    by_input: tuple[float, ...]
    calibration: Calibration | None

    @property
    def agreement(self) -> float:
        """The mean over the inputs."""
        return sum(self.by_input) / len(self.by_input)

    def summary(self) -> dict[str, float | None]:
        """For ship.json: the agreement, and the threshold and area of dev tasks."""
        known = self.calibration
        return {
            "agreement": self.agreement,
            "threshold": known.threshold if known else None,
            "auc": known.auc if known else None,
        }

    @property
    def is_low(self) -> bool:
        """Whether tasks of dev with so little agreement were mostly answered wrongly."""
        threshold = self.calibration.threshold if self.calibration else None
        return threshold is not None and self.agreement < threshold

    @property
    def warning(self) -> str | None:
        """One line about answers that the samples of the posterior do not agree on; else None."""
        known = self.calibration
        if not self.is_low or known is None or known.threshold is None:
            return None
        return (
            f"confidence: adapters around this one agree on {100 * self.agreement:.0f} % of the "
            f"answers; where it was below {100 * known.threshold:.0f} %, most answers to dev "
            "tasks were wrong"
        )


def agreement(
    model: ShipModel,
    posterior: Posterior,
    wordings: Sequence[str],
    inputs: Sequence[Sequence[str]],
    answers: AnswersByTask,
    max_new_tokens: int,
    num_samples: int = NUM_SAMPLES,
    readings: Sequence[AnyReading] | None = None,
) -> list[list[float]]:
    """Of each task's inputs the share of samples that answer as the mean does, from 0 to 1.

    An answer that did not end in time is an answer too: where all samples run on as the mean does,
    they agree.

    Args:
        model: the run.
        posterior: of the T instructions.
        wordings: these instructions, which the draws depend on alone.
        inputs: of each task.
        answers: the mean's, to these inputs.
        max_new_tokens: cuts an answer off.
        num_samples: of each posterior.
        readings: the wordings as they were `read_where_fused`; None: they are read again.
    """
    hits = [[0] * len(row) for row in inputs]
    # Fused, the samples differ in z alone.
    read = readings or model.read_where_fused(wordings)
    for latent_TZ in _samples(posterior, wordings, num_samples):
        others = answer_latents(model, latent_TZ, wordings, inputs, max_new_tokens, readings=read)
        for hit, row, other in zip(hits, answers, others, strict=True):
            for place, (answer, again) in enumerate(zip(row, other, strict=True)):
                hit[place] += answer == again
    return [[hit / num_samples for hit in row] for row in hits]


def _samples(posterior: Posterior, keys: Sequence[str], count: int) -> list[Tensor]:
    """`count` times a latent of each task, (T, Z)."""
    size = posterior.mean_TZ.shape[1]
    drawn = [
        torch.randn(count, size, generator=keyed_generator(f"confidence {key}")) for key in keys
    ]
    noise = torch.stack(drawn, 1).to(posterior.mean_TZ.device)
    return [posterior.sample(SPREAD * noise_TZ) for noise_TZ in noise]


@torch.no_grad()
def calibrate_confidence(
    model: ShipModel, dev: Sequence[SplitTask], max_new_tokens: int
) -> Calibration:
    """What agreement says of dev tasks.

    Args:
        model: the run.
        dev: tasks, of which up to 64 with test examples are taken, evenly spaced.
        max_new_tokens: cuts an answer off.
    """
    tested = [task for task in dev if task.test]
    tasks = spread(tested, _NUM_TASKS)
    if len(tasks) < 2 * _FEWEST_TASKS:
        return Calibration(None, None, len(tasks))
    texts = [task.task.instruction for task in tasks]
    inputs = [[example.input for example in task.test[:_NUM_INPUTS]] for task in tasks]
    posterior, read = model.posterior(texts), model.read_where_fused(texts)
    answers = answer_latents(model, posterior.mean_TZ, texts, inputs, max_new_tokens, readings=read)
    done = [share_is_done(share_right(row, task)) for row, task in zip(answers, tasks, strict=True)]
    agreed = agreement(model, posterior, texts, inputs, answers, max_new_tokens, readings=read)
    return confidence_threshold([sum(row) / len(row) for row in agreed], done)


def share_right(answers: Sequence[str | None], task: SplitTask) -> float:
    """Of the answers to a task's first test inputs, those that are exactly a right one."""
    pairs = list(zip(answers, task.test, strict=False))
    return sum(exact_match(answer, example.answers) for answer, example in pairs) / len(pairs)


def share_is_done(share: float) -> bool:
    """Whether a task is done, by the share of its inputs that are answered rightly."""
    return share >= _RIGHT


def confidence_threshold(agreed: Sequence[float], done: Sequence[bool]) -> Calibration:
    """The threshold between tasks that are done and tasks that are not.

    Args:
        agreed: agreement of each task.
        done: whether most of its answers are right.
    """
    right = [value for value, is_done in zip(agreed, done, strict=True) if is_done]
    wrong = [value for value, is_done in zip(agreed, done, strict=True) if not is_done]
    if min(len(right), len(wrong)) < _FEWEST_TASKS:
        return Calibration(None, None, len(done))
    return Calibration(best_parting(right, wrong)[0], auc(agreed, done), len(done))


def best_parting(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """The value at or above which most of `above` and fewest of `below` lie, and the difference of
    the two shares. Of several that part alike the lowest, which warns and refuses least."""

    def parting(value: float) -> float:
        shares = [sum(one >= value for one in sort) / len(sort) for sort in (above, below)]
        return shares[0] - shares[1]

    best = max(sorted({*above, *below}), key=parting)
    return best, parting(best)


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """How often a score whose label is true is above one whose label is false; equal ones count
    half. NaN where all labels are one."""
    right = [score for score, label in zip(scores, labels, strict=True) if label]
    wrong = [score for score, label in zip(scores, labels, strict=True) if not label]
    if not right or not wrong:
        return float("nan")
    wins = sum((high > low) + (high == low) / 2 for high in right for low in wrong)
    return wins / len(right) / len(wrong)
