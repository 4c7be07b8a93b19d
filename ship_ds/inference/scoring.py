"""How well a latent, or an instruction stated in the prompt, explains examples.

One teacher-forced forward gives both the loss of a target and whether greedy decoding would answer
exactly it: it would where the target's every token, the end of sequence included, is the most
likely one.

Letters: C candidates, M examples of each, Z latent, K target tokens, E = C*M.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ship_ds.data.task import Example
from ship_ds.model.batch import TokenBatch
from ship_ds.model.ship import ShipModel

Examples = Sequence[Example]
_ROWS = 256
"""Sequences a forward: more do not fit a CPU's caches."""


@dataclass(frozen=True)
class Fit:
    """loss_CM: nats of each target; right_CM: whether greedy decoding gives exactly it."""

    loss_CM: Tensor
    right_CM: Tensor

    def beside(self, other: "Fit") -> "Fit":
        """The same candidates on these and on other examples."""
        return Fit(
            torch.cat([self.loss_CM, other.loss_CM], 1),
            torch.cat([self.right_CM, other.right_CM], 1),
        )

    def rows(self, index: Tensor) -> "Fit":
        return Fit(self.loss_CM[index], self.right_CM[index])


def fit_of_latents(
    model: ShipModel, latent_CZ: Tensor, wordings: Sequence[str], examples: Sequence[Examples]
) -> Fit:
    """Each latent's adapter on its own examples, equally many for all; `wordings` matter to a Task
    LLM that reads them too."""
    pieces = []
    with torch.no_grad():
        for chunk in _chunks(len(latent_CZ), len(examples[0]) if examples else 1):
            batch = answers_batch(model, wordings[chunk], examples[chunk])
            logits, labels = model.task_llm(
                model.adapt(latent_CZ[chunk]), batch, len(latent_CZ[chunk])
            )
            pieces.append(_fit(logits, labels, batch, len(latent_CZ[chunk])))
    return _joined(pieces)


def fit_in_prompt(model: ShipModel, wordings: Sequence[str], examples: Sequence[Examples]) -> Fit:
    """The bare Task LLM on each candidate's own examples with the instruction stated in the
    prompt."""
    prompts, pieces = model.prompts, []
    with torch.no_grad():
        for chunk in _chunks(len(wordings), len(examples[0]) if examples else 1):
            pairs = [
                (text, e)
                for text, own in zip(wordings[chunk], examples[chunk], strict=True)
                for e in own
            ]
            batch = TokenBatch.build(
                [prompts.task_prompt(e.input, text) for text, e in pairs],
                [prompts.target(e.target) for _, e in pairs],
                prompts.pad_id,
                device=model.device,
            )
            logits, labels = model.task_llm(None, batch, len(wordings[chunk]))
            pieces.append(_fit(logits, labels, batch, len(wordings[chunk])))
    return _joined(pieces)


def answers_batch(
    model: ShipModel, wordings: Sequence[str], examples: Sequence[Examples]
) -> TokenBatch:
    """What the Task LLM reads under one adapter a candidate, with the targets."""
    return model.task_batch(
        [e.input for own in examples for e in own],
        [e.target for own in examples for e in own],
        [text for text, own in zip(wordings, examples, strict=True) for _ in own],
    )


def losses_by_example(
    logits_KV: Tensor, labels_K: Tensor, batch: TokenBatch, num_candidates: int
) -> Tensor:
    """Sums of token losses, (C, M), with their gradient."""
    token_losses = torch.nn.functional.cross_entropy(logits_KV.float(), labels_K, reduction="none")
    return sum_per_example(token_losses, batch, num_candidates)


def _fit(logits_KV: Tensor, labels_K: Tensor, batch: TokenBatch, num_candidates: int) -> Fit:
    wrong_K = (logits_KV.argmax(-1) != labels_K).float()
    return Fit(
        losses_by_example(logits_KV, labels_K, batch, num_candidates).cpu(),
        (sum_per_example(wrong_K, batch, num_candidates) == 0).cpu(),
    )


def sum_per_example(values_K: Tensor, batch: TokenBatch, num_candidates: int) -> Tensor:
    """Values of label positions summed over each example, (C, M)."""
    sums_E = values_K.new_zeros(len(batch.lengths)).index_add(0, batch.label_row_K, values_K)
    return sums_E.view(num_candidates, -1)


def _chunks(num_candidates: int, num_examples: int) -> list[slice]:
    step = max(1, _ROWS // max(num_examples, 1))
    return [slice(start, start + step) for start in range(0, num_candidates, step)]


def _joined(pieces: Sequence[Fit]) -> Fit:
    return Fit(
        torch.cat([piece.loss_CM for piece in pieces]),
        torch.cat([piece.right_CM for piece in pieces]),
    )
