"""SHIP itself: the run that is evaluated."""

from collections.abc import Sequence
from typing import ClassVar

from ship_ds.data.task import Example, SplitTask
from ship_ds.evaluation.methods.searching import Searching
from ship_ds.evaluation.questions import another_instruction
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import AnswersByTask
from ship_ds.inference.scoring import losses_of_texts, losses_under_adapters


class ShipMethod(Searching):
    """Deduction by the instruction's adapter; induction by the default search; reconstruction by
    the decoder."""

    name: ClassVar[str] = "ship"
    about: ClassVar[str] = (
        "deduction by the instruction's adapter; induction by a search of SHIP's own: what "
        "the decoder proposes from the examples and known instructions, tested on the "
        "examples, those of like tasks first where people wrote them; not the published one"
    )
    reads_examples: ClassVar[bool] = True
    recipe: ClassVar[InductionConfig] = InductionConfig()

    def deduce(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str], inputs: Sequence[Sequence[str]]
    ) -> AnswersByTask:
        return self.answer(wordings, inputs)

    def answer_losses(
        self,
        tasks: Sequence[SplitTask],
        wordings: Sequence[str],
        asked: Sequence[Sequence[Example]],
    ) -> list[list[float]]:
        """See `Predicts`."""
        return losses_under_adapters(self.ship.model, wordings, asked)

    def reconstruct(self, wordings: Sequence[str]) -> list[str]:
        """What the decoder makes of each instruction's posterior mean, without examples."""
        model = self.ship.model
        return model.decode(model.encode(wordings), self.search.max_new_tokens)

    def text_losses(
        self, tasks: Sequence[SplitTask], wordings: Sequence[str]
    ) -> tuple[list[float], list[float]]:
        """See `ReadsLatents`; the other task is a seen one."""
        others = [another_instruction(task, self.seen, self.seed) for task in tasks]
        model = self.ship.model
        losses, other_losses = (
            losses_of_texts(model, model.encode(read), wordings) for read in (wordings, others)
        )
        return losses, other_losses


class SearchWithoutDecoder(Searching):
    """SHIP's search with everything left out that the decoder writes or likes: what the known
    instructions and their words do by themselves."""

    name: ClassVar[str] = "search_without_decoder"
    about: ClassVar[str] = (
        "ablation: SHIP's search without its decoder: known instructions, what is derived from "
        "their words, and what the bare Task LLM says where people wrote them"
    )
    reads_examples: ClassVar[bool] = True
    recipe: ClassVar[InductionConfig] = InductionConfig(asks_decoder=False)
