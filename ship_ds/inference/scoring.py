"""How well latents, or instructions in the prompt, explain examples.

One teacher-forced forward gives both the loss of a target and whether greedy decoding would answer
exactly it: it would where the target's every token, the end of sequence included, is the most
likely one.

Letters: C candidates, E sequences, K labelled positions, M examples of a task, V vocabulary,
Z latent size. The sequences of a batch are the examples of all its candidates.
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
    """How candidates explain examples.

    Args:
        loss_CM: of each target, in nats.
        right_CM: whether greedy decoding gives exactly it.
    """

    loss_CM: Tensor
    right_CM: Tensor

    def beside(self, other: "Fit") -> "Fit":
        """The same candidates on these and on other examples."""
        return Fit(
            torch.cat([self.loss_CM, other.loss_CM], 1),
            torch.cat([self.right_CM, other.right_CM], 1),
        )

    def rows(self, index: Tensor) -> "Fit":
        """Some of the candidates, in this order."""
        return Fit(self.loss_CM[index], self.right_CM[index])


def fit_of_latents(
    model: ShipModel, latent_CZ: Tensor, wordings: Sequence[str], examples: Sequence[Examples]
) -> Fit:
    """How each latent's adapter explains examples.

    Args:
        model: makes adapters and answers.
        latent_CZ: one latent a candidate.
        wordings: an instruction a candidate, for a Task LLM that reads it too.
        examples: those of each candidate, equally many for all.
    """
    pieces = []
    with torch.no_grad():
        for chunk in _chunks(examples):
            batch = answers_batch(model, wordings[chunk], examples[chunk])
            logits, labels = model.task_llm(
                model.adapt(latent_CZ[chunk]), batch, len(latent_CZ[chunk])
            )
            pieces.append(_fit(logits, labels, batch, len(latent_CZ[chunk])))
    return _joined(pieces)


def fit_in_prompt(model: ShipModel, wordings: Sequence[str], examples: Sequence[Examples]) -> Fit:
    """How the bare Task LLM explains examples with an instruction in the prompt.

    Args:
        model: holds the Task LLM.
        wordings: an instruction a candidate.
        examples: those of each candidate, equally many for all.
    """
    prompts, pieces = model.prompts, []
    with torch.no_grad():
        for chunk in _chunks(examples):
            pairs = [
                (text, e)
                for text, examples_M in zip(wordings[chunk], examples[chunk], strict=True)
                for e in examples_M
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
        [e.input for examples_M in examples for e in examples_M],
        [e.target for examples_M in examples for e in examples_M],
        [text for text, examples_M in zip(wordings, examples, strict=True) for _ in examples_M],
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


def _chunks(examples: Sequence[Examples]) -> list[slice]:
    """Candidates whose examples go through the model together."""
    num_examples = len(examples[0]) if examples else 1
    step = max(1, _ROWS // max(num_examples, 1))
    return [slice(start, start + step) for start in range(0, len(examples), step)]


def _joined(pieces: Sequence[Fit]) -> Fit:
    return Fit(
        torch.cat([piece.loss_CM for piece in pieces]),
        torch.cat([piece.right_CM for piece in pieces]),
    )
