"""The known instruction whose task's examples have the most words in common with the shown ones:
what an induction is worth that asks no model."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from ship_ds.data.task import Example, Reading
from ship_ds.evaluation.methods.untrained import Untrained
from ship_ds.inference.deduction import AnswersByTask, answer_read
from ship_ds.inference.example_index import COUNTED, ExampleIndex
from ship_ds.inference.gradient import NEUTRAL_INSTRUCTION
from ship_ds.inference.reasoning import with_examples
from ship_ds.section import Section


class RetrievalRecipe(Section):
    """How its answers are made."""

    reads_examples: bool = True
    """Whether the encoder, where it was trained to, reads the shown examples beside the text."""


class Retrieval(Untrained):
    """Induction by TF-IDF over examples (inference/example_index.py); reasoning by the adapter that
    SHIP makes of the instruction found, and of the shown examples where its encoder reads both.

    Of a seen task the shown examples are among those that are compared with, as they are among
    those that SHIP was trained on.
    """

    name: ClassVar[str] = "retrieval"
    about: ClassVar[str] = (
        "control: the seen instruction whose examples have the most words in common with the shown "
        "ones (TF-IDF), as text and by its adapter; no model is asked which"
    )
    answers_as_ship: ClassVar[bool] = True
    recipe: ClassVar[RetrievalRecipe] = RetrievalRecipe()

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Whether examples are read, and what is counted."""
        return {**cls.recipe.model_dump(), "index": COUNTED}

    @cached_property
    def index(self) -> ExampleIndex:
        return ExampleIndex.of_tasks(self.seen)

    def induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        """Where no word is shared, the neutral instruction."""
        texts = self.index.instructions
        return [
            texts[rows[0]] if rows else NEUTRAL_INSTRUCTION for rows in self.index.nearest(shown, 1)
        ]

    def reason(
        self, shown: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        length = self.ship.config.evaluation.max_new_tokens
        texts = self.induce(shown)
        read: Sequence[str | Reading] = texts
        if self.recipe.reads_examples:
            read = with_examples(self.ship.model, texts, shown)
        return answer_read(self.ship.model, read, texts, inputs, length, keeps_cut_off=True)
