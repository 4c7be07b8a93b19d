"""How well latents, or instructions in the prompt, explain examples.

One teacher-forced forward gives both the loss of a target and whether greedy decoding would answer
exactly it: it would where the target's every token, the end of sequence included, is the most
likely one.

Letters: C candidates, E sequences, K labelled positions, M examples of a task, T tasks,
V vocabulary, X other letters flattened, Z latent size. The sequences of a batch are the examples of
all its candidates.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ship_ds.data.task import Example, Reading
from ship_ds.model import budget
from ship_ds.model.batch import TokenBatch
from ship_ds.model.encoder import means_of
from ship_ds.model.generation import with_one_end
from ship_ds.model.language_model import LanguageModel
from ship_ds.model.ship import AnyReading, ShipModel
from ship_ds.prompt import PromptFormat

Examples = Sequence[Example]
PromptOf = Callable[[str, Any], Sequence[int]]
"""An input and an instruction -> token ids."""


@dataclass(frozen=True)
class Fit:
    """How candidates explain examples.

    Args:
        loss_CM: of each target, in nats.
        right_CM: whether greedy decoding gives exactly it.
    """

    loss_CM: Tensor
    right_CM: Tensor

    @classmethod
    def empty(cls, examples: Sequence[Examples]) -> "Fit":
        """A table of zeros for candidates with equally many examples, to be filled."""
        shape = len(examples), len(examples[0]) if examples else 0
        return cls(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool))

    def put(self, candidate: int, examples: slice, loss_M: Tensor, right_M: Tensor) -> None:
        """Fill in how a candidate explains these of its examples.

        Args:
            candidate: its row.
            examples: its columns.
            loss_M: of these examples, in nats.
            right_M: whether each is answered rightly.
        """
        self.loss_CM[candidate, examples] = loss_M
        self.right_CM[candidate, examples] = right_M

    def beside(self, other: "Fit") -> "Fit":
        """The same candidates on these and on other examples."""
        return Fit(
            torch.cat([self.loss_CM, other.loss_CM], 1),
            torch.cat([self.right_CM, other.right_CM], 1),
        )

    def rows(self, index: Tensor) -> "Fit":
        """Some of the candidates, in this order."""
        return Fit(self.loss_CM[index], self.right_CM[index])


@torch.no_grad()
def fit_of_latents(
    model: ShipModel,
    latent_CZ: Tensor,
    wordings: Sequence[str],
    examples: Sequence[Examples],
    readings: Sequence[AnyReading] | None = None,
) -> Fit:
    """How each latent's adapter explains examples.

    Args:
        model: makes adapters and answers.
        latent_CZ: one latent a candidate.
        wordings: an instruction a candidate, for a Task LLM that reads it too.
        examples: those of each candidate, equally many for all.
        readings: what each latent was made of, for an adapter that fuses it, which reads it again
            unless it was `read_once`; None: the wordings.
    """
    read: Sequence[AnyReading] = wordings if readings is None else readings
    questions = [
        [model.question(e.input, text) for e in examples_M]
        for text, examples_M in zip(wordings, examples, strict=True)
    ]
    targets = [[model.prompts.target(e.target) for e in examples_M] for examples_M in examples]
    num_virtual, fit = model.num_virtual_tokens, Fit.empty(examples)
    costs = model.task_llm.language_model.costs
    num_labels = max((len(ids) for task in targets for ids in task), default=0)
    widths = [
        [num_virtual + len(ids) + len(target) for ids, target in zip(*rows, strict=True)]
        for rows in zip(questions, targets, strict=True)
    ]
    for pieces in budget.batches(
        widths,
        budget.bytes_free(model.device),
        lambda width: costs.scored_row(width, num_labels),
        model.adapter_bytes_of(read),
    ):
        batch = TokenBatch.build(
            [ids for one in pieces for ids in questions[one.task][one.start : one.stop]],
            [ids for one in pieces for ids in targets[one.task][one.start : one.stop]],
            model.prompts.pad_id,
            num_virtual,
            model.device,
        )
        # Adapters of this batch alone, and of a task that was cut once more in each of its
        # batches: those of all candidates at once need not fit.
        tasks = [one.task for one in pieces]
        adapter = model.adapt(latent_CZ[tasks], [read[task] for task in tasks])
        logits, labels = model.task_llm.score(adapter, batch, len(pieces))
        # `chunk` stands on what `budget.batches` gives: pieces of a batch are equally long.
        losses, rights = _row_fits(logits, labels, batch, model.prompts)
        for piece, *values in zip(
            pieces, losses.chunk(len(pieces)), rights.chunk(len(pieces)), strict=True
        ):
            fit.put(piece.task, slice(piece.start, piece.stop), *values)
    return fit


def scored_batches(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
    num_virtual_tokens: int = 0,
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Rows to score, as many at a time as there is room for, those of about one length together.

    Args:
        lm: that scores them.
        prompts: token ids of each row.
        targets: of each row, end of sequence included.
        pad_id: of the padding.
        device: where the model is.
        num_virtual_tokens: before each prompt.

    Yields:
        Which rows, and their batch.
    """
    widths = [
        num_virtual_tokens + len(prompt) + len(target)
        for prompt, target in zip(prompts, targets, strict=True)
    ]
    costs, num_labels = lm.costs, max(map(len, targets), default=0)
    for rows in budget.row_batches(
        widths, budget.bytes_free(device), lambda width: costs.scored_row(width, num_labels)
    ):
        yield (
            rows,
            TokenBatch.build(
                [prompts[row] for row in rows],
                [targets[row] for row in rows],
                pad_id,
                num_virtual_tokens,
                device,
            ),
        )


@torch.no_grad()
def fit_in_prompt(
    model: ShipModel,
    stated: Sequence[Any],
    examples: Sequence[Examples],
    prompt: PromptOf | None = None,
) -> Fit:
    """How the bare Task LLM explains examples with an instruction in the prompt.

    Args:
        model: holds the Task LLM.
        stated: an instruction a candidate, or what else `prompt` takes; None: none.
        examples: those of each candidate, equally many for all.
        prompt: of an input and what is stated, as ids; None: ours (`PromptFormat.task_prompt`).
    """
    prompts, fit = model.prompts, Fit.empty(examples)
    prompt = prompt or prompts.task_prompt
    places = [(c, m) for c, examples_M in enumerate(examples) for m in range(len(examples_M))]
    questions = [prompt(examples[c][m].input, stated[c]) for c, m in places]
    targets = [prompts.target(examples[c][m].target) for c, m in places]
    lm = model.task_llm.language_model
    for rows, batch in scored_batches(lm, questions, targets, prompts.pad_id, model.device):
        logits, labels = model.task_llm.score(None, batch, 1)
        losses, rights = _row_fits(logits, labels, batch, prompts)
        for row, loss, right in zip(rows, losses, rights, strict=True):
            c, m = places[row]
            fit.put(c, slice(m, m + 1), loss[None], right[None])
    return fit


def losses_under_adapters(
    model: ShipModel,
    wordings: Sequence[str],
    examples: Sequence[Examples],
    readings: Sequence[str | Reading] | None = None,
) -> list[list[float]]:
    """Loss of each target under the adapter of its instruction, or of what else the encoder reads
    (`readings`), nats a token with the end of sequence.

    Args:
        model: makes adapters and answers.
        wordings: an instruction a candidate.
        examples: those of each candidate, as many as there are.
        readings: what the encoder reads in place of the instructions; None: these.

    Returns:
        One row a candidate, one number an example.
    """
    if not wordings:
        return []
    read = model.read_once(wordings if readings is None else readings)
    latent_CZ = means_of(read)
    return _losses_a_token(
        lambda some: fit_of_latents(
            model,
            latent_CZ[some],
            [wordings[c] for c in some],
            [examples[c] for c in some],
            [read[c] for c in some],
        ),
        examples,
        model.prompts,
    )


def losses_in_prompt(
    model: ShipModel,
    stated: Sequence[Any],
    examples: Sequence[Examples],
    prompt: PromptOf | None = None,
) -> list[list[float]]:
    """Likewise of the bare Task LLM with the instruction in the prompt.

    Args:
        model: holds the Task LLM.
        stated: an instruction a candidate, or what else `prompt` takes; None: none.
        examples: those of each candidate, as many as there are.
        prompt: see `fit_in_prompt`.

    Returns:
        One row a candidate, one number an example.
    """
    return _losses_a_token(
        lambda some: fit_in_prompt(
            model, [stated[c] for c in some], [examples[c] for c in some], prompt
        ),
        examples,
        model.prompts,
    )


@torch.no_grad()
def losses_of_texts(model: ShipModel, latent_TZ: Tensor, texts: Sequence[str]) -> list[float]:
    """Loss of each text under the decoder beside its latent, without examples, nats a token with
    the end of sequence.

    Args:
        model: whose decoder predicts the texts.
        latent_TZ: one a text.
        texts: instructions.
    """
    prompts, num_soft = model.decoder_prompts, model.config.decoder.num_soft_tokens
    targets, decoder = [prompts.target(text) for text in texts], model.decoder
    questions = [prompts.decoder_prompt(())] * len(texts)
    losses = [0.0] * len(texts)
    for rows, batch in scored_batches(
        decoder.language_model, questions, targets, prompts.pad_id, model.device, num_soft
    ):
        logits, labels = decoder.score(latent_TZ[rows].to(model.device), None, batch)
        sums_E = losses_by_example(logits, labels, batch, len(rows))[:, 0].tolist()
        for row, loss in zip(rows, sums_E, strict=True):
            losses[row] = loss / len(targets[row])
    return losses


def _losses_a_token(
    fit_of: Callable[[list[int]], Fit], examples: Sequence[Examples], form: PromptFormat
) -> list[list[float]]:
    """fit_of: of some candidates by their numbers, which have equally many examples."""
    losses: list[list[float]] = [[] for _ in examples]
    # A `Fit` is a rectangle: candidates go by how many examples they have.
    for count in sorted({len(some) for some in examples} - {0}):
        alike = [c for c, some in enumerate(examples) if len(some) == count]
        for c, loss_M in zip(alike, fit_of(alike).loss_CM.tolist(), strict=True):
            lengths = [len(form.target(example.target)) for example in examples[c]]
            losses[c] = [loss / length for loss, length in zip(loss_M, lengths, strict=True)]
    return losses


def answers_batch(
    model: ShipModel, wordings: Sequence[str], examples: Sequence[Examples]
) -> TokenBatch:
    """What the Task LLM reads under one adapter a candidate, with the targets.

    Args:
        model: makes the prompts.
        wordings: an instruction a candidate, for a Task LLM that reads it too.
        examples: those of each candidate, equally many for all.

    Returns:
        C x M sequences, candidate by candidate.
    """
    return model.task_batch(
        [e.input for examples_M in examples for e in examples_M],
        [e.target for examples_M in examples for e in examples_M],
        [text for text, examples_M in zip(wordings, examples, strict=True) for _ in examples_M],
    )


def losses_by_example(
    logits_KV: Tensor, labels_K: Tensor, batch: TokenBatch, num_candidates: int
) -> Tensor:
    """Sums of token losses, (C, M), with their gradient.

    Args:
        logits_KV: of the label positions.
        labels_K: the labels.
        batch: says which sequence a label is of; C x M sequences, candidate by candidate.
        num_candidates: C.
    """
    # In fp32, as in training: candidates are ranked by differences that 16 bits round away.
    token_losses = torch.nn.functional.cross_entropy(logits_KV.float(), labels_K, reduction="none")
    return sum_per_example(token_losses, batch, num_candidates)


def _row_fits(
    logits_KV: Tensor, labels_K: Tensor, batch: TokenBatch, form: PromptFormat
) -> tuple[Tensor, Tensor]:
    """Each sequence's loss, and whether greedy decoding gives all its labels; on the CPU."""
    num_rows = len(batch.lengths)
    ends_X = torch.tensor(form.other_ends, device=logits_KV.device)
    # As `greedy` decodes: an answer that stops at another end of the model's is right, too.
    best_K = with_one_end(logits_KV.argmax(-1), form.eos_id, ends_X)
    wrong_K = (best_K != labels_K).float()
    losses = losses_by_example(logits_KV, labels_K, batch, num_rows)[:, 0]
    return losses.cpu(), (sum_per_example(wrong_K, batch, num_rows)[:, 0] == 0).cpu()


def sum_per_example(values_K: Tensor, batch: TokenBatch, num_candidates: int) -> Tensor:
    """Values of label positions summed over each example, (C, M).

    Args:
        values_K: of the label positions.
        batch: says which sequence a label is of; C x M sequences, candidate by candidate.
        num_candidates: C.
    """
    sums_E = values_K.new_zeros(len(batch.lengths)).index_add(0, batch.label_row_K, values_K)
    return sums_E.view(num_candidates, -1)
