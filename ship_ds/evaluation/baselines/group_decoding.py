"""Group decoding (Sun et al. 2024, arXiv 2403.05789, section 3.2): one text grown under several
prompts at once.

Letters: T tasks, B beams, C prompts (conditions) of a task, V vocabulary, S padded length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ship_ds.evaluation.baselines.frozen_base import FrozenBase, Ids
from ship_ds.model.adapters import Adapter


@dataclass
class _Search:
    """One task's beams. `scores` are sums over tokens of the mean over prompts of the token's
    log-probability."""

    num_beams: int
    beams: list[list[int]] = field(default_factory=lambda: [[]])
    scores: list[float] = field(default_factory=lambda: [0.0])
    finished: list[tuple[float, list[int]]] = field(default_factory=list)

    def grow(self, mean_BV: Tensor, eos_id: int) -> list[int]:
        """Take the best continuations; the parent of each beam that is then alive (always
        `num_beams` of them)."""
        mean_BV = mean_BV[: len(self.beams)]
        total_BV = mean_BV + torch.tensor(self.scores, device=mean_BV.device)[:, None]
        values, picks = total_BV.flatten().topk(min(2 * self.num_beams, total_BV.numel()))
        grown = [
            (value, *divmod(pick, mean_BV.shape[1]))
            for value, pick in zip(values.tolist(), picks.tolist(), strict=True)
        ]
        self.finished += [
            (value, self.beams[b]) for value, b, token in grown[: self.num_beams] if token == eos_id
        ]
        self.finished = sorted(self.finished, key=lambda pair: -pair[0])[: self.num_beams]
        alive = [(value, b, token) for value, b, token in grown if token != eos_id][
            : self.num_beams
        ]
        self.beams = [[*self.beams[b], token] for _, b, token in alive]
        self.scores = [value for value, _, _ in alive]
        return [b for _, b, _ in alive]

    @property
    def is_over(self) -> bool:
        """Scores only fall: no beam that is alive can come in any more."""
        return len(self.finished) == self.num_beams and self.finished[-1][0] >= self.scores[0]

    def best(self) -> list[list[int]]:
        """Those that ended, best first; the ones alive where fewer ended."""
        return [*(tokens for _, tokens in self.finished), *self.beams][: self.num_beams]


@torch.no_grad()
def group_beams(
    base: FrozenBase,
    adapter: Adapter,
    prompts: Sequence[Sequence[Ids]],
    num_beams: int,
    max_new_tokens: int,
) -> list[list[str]]:
    """For each task the texts of a beam search scored by the mean over its prompts of log p(text |
    prompt), best first.

    Every task has equally many prompts. adapter: of one task, used in all rows.
    """
    num_prompts = len(prompts[0])
    searches = [_Search(num_beams) for _ in prompts]
    state, mask_ES = _start(base, adapter, [prompt for own in prompts for prompt in own])
    for length in range(max_new_tokens):
        logits_EV = state.logits[:, -1].float()
        mean_TBV = (
            logits_EV.log_softmax(-1)
            .view(len(prompts), -1, num_prompts, logits_EV.shape[-1])
            .mean(2)
        )
        parents = [
            search.grow(mean_BV, base.prompts.eos_id)
            for search, mean_BV in zip(searches, mean_TBV, strict=True)
        ]
        if length + 1 == max_new_tokens or all(search.is_over for search in searches):
            break
        width = mean_TBV.shape[1]
        rows = torch.tensor(
            [
                (t * width + b) * num_prompts + c
                for t, own in enumerate(parents)
                for b in own
                for c in range(num_prompts)
            ],
            device=base.device,
        )
        tokens = [
            beam[-1] for search in searches for beam in search.beams for _ in range(num_prompts)
        ]
        mask_ES = torch.nn.functional.pad(mask_ES[rows], (0, 1), value=1)
        state.past_key_values.batch_select_indices(rows)
        state = base.task_llm.lm(
            input_ids=torch.tensor(tokens, device=base.device)[:, None],
            attention_mask=mask_ES,
            logits_to_keep=1,
            use_cache=True,
            position_ids=mask_ES.sum(1, keepdim=True) - 1,
            past_key_values=state.past_key_values,
            ship_adapter=adapter,
        )
    return [[base.prompts.text(tokens) for tokens in search.best()] for search in searches]


def _start(base: FrozenBase, adapter: Adapter, prompts: Sequence[Ids]) -> tuple[Any, Tensor]:
    """Cache and logits of the prompts, left-padded so that the next token's place is the same in
    all rows, and their mask."""
    batch = base.batch(prompts, None)
    width = batch.ids_ES.shape[1]
    shift_E = width - batch.lengths_E
    columns_S = torch.arange(width, device=base.device)
    mask_ES = (columns_S >= shift_E[:, None]).long()
    ids_ES = batch.ids_ES.gather(1, (columns_S - shift_E[:, None]) % width)
    positions_ES = (mask_ES.cumsum(1) - 1).clamp(min=0)
    state = base.task_llm.lm(
        input_ids=ids_ES,
        attention_mask=mask_ES,
        position_ids=positions_ES,
        logits_to_keep=1,
        use_cache=True,
        ship_adapter=adapter,
    )
    return state, mask_ES
