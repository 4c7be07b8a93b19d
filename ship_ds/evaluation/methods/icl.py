"""In-context learning: the shown examples before every query (Brown et al. 2020, arXiv
2005.14165)."""

from collections.abc import Sequence
from typing import ClassVar

from ship_ds.data.task import Example
from ship_ds.evaluation.methods.untrained import Untrained
from ship_ds.inference.deduction import AnswersByTask, bare_answerer, prompt_with_room


class InContextLearning(Untrained):
    """n-shot with the bare base. Shots that its context has no room for are left out, the last ones
    first."""

    name: ClassVar[str] = "icl"
    about: ClassVar[str] = "the bare base with the shown examples in every prompt"
    asks_ship: ClassVar[bool] = False

    def reason(
        self, shown: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        prompts = [
            [self.prompt(text, shots) for text in row]
            for shots, row in zip(shown, inputs, strict=True)
        ]
        answering = bare_answerer(self.ship.model, keeps_cut_off=True)
        return answering.answers(prompts, self._max_new_tokens)

    def prompt(self, text: str, shots: Sequence[Example]) -> Sequence[int]:
        """Token ids of the shots and the query, with as many shots as the context has room for."""
        model = self.ship.model
        return prompt_with_room(
            lambda some: model.prompts.task_prompt(text, None, some),
            shots,
            model,
            self._max_new_tokens,
        )

    @property
    def _max_new_tokens(self) -> int:
        return self.ship.config.evaluation.max_new_tokens
