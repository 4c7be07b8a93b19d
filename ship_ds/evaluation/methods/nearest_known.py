"""The nearest known instruction: of all wordings seen in training, the one whose adapter explains the shown examples best."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ship_ds.data.task import Example
from ship_ds.evaluation.answering import answer_tasks, encode_all
from ship_ds.evaluation.deduction import _losses
from ship_ds.evaluation.method import Answers, Setting

_SHORTLIST = 48


class NearestKnown:
    """It invents nothing: on unseen rules it is right only where a seen rule answers alike."""

    name: ClassVar[str] = "nearest_known"
    states_instruction: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        self.ship = setting.ship
        self.known = [task.task.instruction for task in setting.splits.seen]

    def prepare(self) -> None:
        """Nothing is trained."""

    def induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        latent_CZ = encode_all(self.ship.model, self.known)
        return [self._nearest(latent_CZ, examples) for examples in shown]

    @torch.no_grad()
    def _nearest(self, latent_CZ: Tensor, examples: Sequence[Example]) -> str:
        losses_C = torch.cat([
            _losses(self.ship.model, latent_CZ[start : start + 64], self.known[start : start + 64], examples[:1])
            for start in range(0, len(self.known), 64)
        ]).sum(1)
        shortlist = losses_C.topk(min(_SHORTLIST, len(self.known)), largest=False).indices
        losses_C = _losses(self.ship.model, latent_CZ[shortlist], [self.known[c] for c in shortlist.tolist()], examples).sum(1)
        return self.known[int(shortlist[losses_C.argmin()])]

    def reason(self, shown: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]) -> Answers:
        texts, model = self.induce(shown), self.ship.model
        return answer_tasks(model, encode_all(model, texts), inputs, self.ship.config.evaluation.max_new_tokens, texts)
