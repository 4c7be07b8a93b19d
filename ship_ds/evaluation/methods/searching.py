"""What SHIP and its control, the nearest known instruction, share: a search for the text, and answers by its adapter."""

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

from ship_ds.data.task import Example
from ship_ds.evaluation.method import Answers, Setting
from ship_ds.evaluation.methods.untrained import Untrained
from ship_ds.inference.bank import Bank, encode_all
from ship_ds.inference.deduction import answer_latents
from ship_ds.inference.induction import InductionConfig, induce_many


class Searching(Untrained):
    """Induction by `search`. What was induced from the same examples before is not searched for again."""

    search: ClassVar[InductionConfig]

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.known = [task.task.instruction for task in setting.splits.seen]
        self.induced: dict[tuple[Example, ...], str] = {}

    @cached_property
    def bank(self) -> Bank:
        return Bank.build(self.ship.model, self.known)

    def induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        keys = [tuple(examples) for examples in shown]
        new = list(dict.fromkeys(key for key in keys if key not in self.induced))
        found = induce_many(self.ship.model, self.bank, new, self.search, self.seed)
        self.induced |= {key: induction.instruction for key, induction in zip(new, found, strict=True)}
        return [self.induced[key] for key in keys]

    def reason(self, shown: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]) -> Answers:
        """By the refined latent: the induced text, encoded again."""
        return self.answer(self.induce(shown), inputs)

    def answer(self, wordings: Sequence[str], inputs: Sequence[Sequence[str]]) -> Answers:
        model = self.ship.model
        return answer_latents(model, encode_all(model, wordings), wordings, inputs, self.ship.config.evaluation.max_new_tokens)
