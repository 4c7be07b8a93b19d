"""What SHIP's encoder makes of examples in one pass, without a search: of runs whose encoder reads
examples (`model.encoder.max_examples`).

Letters: T tasks, Z latent size.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from ship_ds.api import Ship
from ship_ds.data.task import Example, Reading, SplitTask
from ship_ds.errors import UserError
from ship_ds.evaluation.config import Direction
from ship_ds.evaluation.method import Setting
from ship_ds.evaluation.methods.untrained import Untrained
from ship_ds.evaluation.questions import READ_DRAW, examples_to_read
from ship_ds.inference.deduction import AnswersByTask, answer_latents, answer_read
from ship_ds.inference.reasoning import examples_alone
from ship_ds.inference.scoring import losses_under_adapters
from ship_ds.model.encoder import means_of
from ship_ds.section import Section


class OnePassRecipe(Section):
    """What is read."""

    num_examples: int | None = Field(None, ge=0, le=32)
    """Training examples beside the instruction in deduction; None: as many as the encoder was shown
    at most (`model.encoder.max_examples`), and no larger number is taken."""


class OnePass(Untrained):
    """Deduction from the instruction with the shown examples beside it; induction and reasoning
    from the examples alone. No candidate is tested, no gradient taken."""

    name: ClassVar[str] = "ship_one_pass"
    about: ClassVar[str] = (
        "the encoder reads the shown examples: the adapter, and the text that the decoder makes of "
        "the same latent, in one pass and without a search"
    )
    answers_as_ship: ClassVar[bool] = True
    sees_labels: ClassVar[bool] = True
    recipe: ClassVar[OnePassRecipe] = OnePassRecipe()

    def __init_subclass__(cls, **named: Any) -> None:
        """The harness makes one where the number is set."""
        super().__init_subclass__(**named)
        if cls.recipe.num_examples is not None:
            cls.about = f"{cls.about}; in deduction beside {cls.recipe.num_examples} of them"

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """How many examples, where that was set, and how they are drawn."""
        return {"draw": READ_DRAW, **cls.recipe.model_dump(exclude_none=True)}

    @classmethod
    def cannot(cls, ship: Ship) -> tuple[Direction, ...]:
        """From examples alone, of an encoder that always read an instruction beside them; texts,
        of a run without decoder.

        Raises:
            UserError: the recipe has more examples than the encoder was trained on. Here, since all
                methods are asked this before any is measured.
        """
        most, count = ship.config.model.encoder.max_examples, cls.recipe.num_examples
        if count is not None and count > most:
            what = f"was trained on at most {most}" if most else "reads instructions alone"
            advice = "set that or fewer" if most else "leave the method out"
            raise UserError(
                f"--set {cls.name}.num_examples={count}: this run's encoder {what} "
                f"(model.encoder.max_examples={most}): {advice}"
            )
        if not ship.config.model.encoder.reads_examples_alone:
            return ("induction", "reasoning")
        return () if ship.model.decodes else ("induction",)

    @classmethod
    def applies(cls, task: SplitTask, ship: Ship) -> bool:
        """To every task of a run whose encoder was trained on examples."""
        return ship.config.model.encoder.max_examples > 0

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.most = self.ship.config.model.encoder.max_examples

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        """By the instruction and some of the task's training examples.

        Args:
            tasks: whose training examples the encoder reads.
            wordings: the instruction as it is given beside them, one a task.
            inputs: one row a task.

        Returns:
            One row a task, one answer an input; a `CutOff` where it did not end in time.
        """
        model, length = self.ship.model, self.ship.config.evaluation.max_new_tokens
        readings = self._with_examples(tasks, wordings)
        return answer_read(model, readings, wordings, inputs, length, keeps_cut_off=True)

    def answer_losses(
        self,
        tasks: Sequence[SplitTask],
        wordings: Sequence[str],
        asked: Sequence[Sequence[Example]],
    ) -> list[list[float]]:
        """See `Predicts`; under the adapters that `deduce` answers by.

        Args:
            tasks: whose training examples the encoder reads.
            wordings: the instruction as it is given beside them, one a task.
            asked: examples, one row a task.

        Returns:
            One row a task, one number an example.
        """
        readings = self._with_examples(tasks, wordings)
        return losses_under_adapters(self.ship.model, wordings, asked, readings)

    def induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        return self._texts(self.ship.model.encode(examples_alone(self.ship.model, shown)))

    def reason(
        self, shown: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        if not shown:
            return []
        model, length = self.ship.model, self.ship.config.evaluation.max_new_tokens
        read = model.read_once(examples_alone(model, shown))
        states_text = self.ship.config.model.task_llm.instruction != "none"
        texts = self._texts(means_of(read)) if states_text else [""] * len(shown)
        return answer_latents(
            model, means_of(read), texts, inputs, length, readings=read, keeps_cut_off=True
        )

    def _with_examples(self, tasks: Sequence[SplitTask], wordings: Sequence[str]) -> list[Reading]:
        count = self.most if self.recipe.num_examples is None else self.recipe.num_examples
        return [
            Reading(wording, examples_to_read(task, count, self.seed))
            for task, wording in zip(tasks, wordings, strict=True)
        ]

    def _texts(self, latent_TZ: Tensor) -> list[str]:
        length = self.ship.config.evaluation.max_instruction_tokens
        return self.ship.model.decode(latent_TZ, length)
