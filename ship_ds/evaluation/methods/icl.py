"""In-context learning: the shown examples before every query (Brown et al. 2020, arXiv
2005.14165)."""

from collections.abc import Sequence
from typing import ClassVar

from ship_ds.data.task import Example
from ship_ds.evaluation.method import Setting
from ship_ds.evaluation.methods.untrained import Untrained
from ship_ds.inference.deduction import AnswersByTask, bare_answerer


class InContextLearning(Untrained):
    """n-shot with the bare base. Shots that its context has no room for are left out, the last ones
    first."""

    name: ClassVar[str] = "icl"
    about: ClassVar[str] = "the bare base with the shown examples in every prompt"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.model, self.max_new_tokens = (
            self.ship.model,
            self.ship.config.evaluation.max_new_tokens,
        )
        self.context = self.model.task_llm.language_model.context_length

    def reason(
        self, shown: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        prompts = [
            [self.prompt(text, shots) for text in row]
            for shots, row in zip(shown, inputs, strict=True)
        ]
        answering = bare_answerer(self.model, keeps_cut_off=True)
        return answering.answers(prompts, self.max_new_tokens)

    def prompt(self, text: str, shots: Sequence[Example]) -> tuple[int, ...]:
        """Token ids of the shots and the query, with as many shots as the context has room for."""
        ids = self.model.prompts.task_prompt(text, None, shots)
        fits = self.context is None or len(ids) + self.max_new_tokens <= self.context
        return ids if fits or not shots else self.prompt(text, shots[:-1])
