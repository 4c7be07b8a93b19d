"""SHIP's deduction again, beside how much the samples of each instruction's posterior agree."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ship_ds.data.task import CutOff, SplitTask
from ship_ds.evaluation.methods.untrained import Untrained
from ship_ds.inference.confidence import NUM_SAMPLES, SPREAD, agreement
from ship_ds.inference.deduction import AnswersByTask, answer_read


class Doubting(Untrained):
    """What `Ship.confidence` says, of every task and input, so that it can be told what it is
    worth."""

    name: ClassVar[str] = "ship_confidence"
    about: ClassVar[str] = (
        "ship's deduction with the share of eight samples of the instruction's posterior that "
        "answer alike; how well that tells right answers from wrong ones stands in the report"
    )
    answers_as_ship: ClassVar[bool] = True

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """How many samples, and how far around the mean."""
        return {"num_samples": NUM_SAMPLES, "spread": SPREAD}

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        return answer_read(
            self.ship.model, wordings, wordings, inputs, self._length, keeps_cut_off=True
        )

    def agreement(
        self,
        wordings: Sequence[str],
        inputs: Sequence[Sequence[str]],
        answers: AnswersByTask,
    ) -> list[list[float]]:
        """Of each answer, the share of samples that give it too; where the answer did not end in
        time, of those that do not either.

        Args:
            wordings: the instruction as it is given, one a task.
            inputs: one row a task.
            answers: what `deduce` gave to these.

        Returns:
            One row a task, one number an answer, from 0 to 1.
        """
        posterior = self.ship.model.posterior(wordings)
        ended: AnswersByTask = [
            [None if isinstance(answer, CutOff) else answer for answer in row] for row in answers
        ]
        return agreement(self.ship.model, posterior, wordings, inputs, ended, self._length)

    @property
    def _length(self) -> int:
        return self.ship.config.evaluation.max_new_tokens
