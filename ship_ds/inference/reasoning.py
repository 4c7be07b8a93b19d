"""Inductive reasoning: induce an instruction from examples, encode it again, answer new inputs
(arXiv 2502.02315, section 3.3).

Letters: T tasks, Z latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ship_ds.data.task import Example
from ship_ds.inference.bank import Bank, encode_all
from ship_ds.inference.deduction import answer_latents, answer_stated
from ship_ds.inference.induction import Induction, InductionConfig, Say, induce_many, silent
from ship_ds.inference.scoring import Examples, fit_of_latents
from ship_ds.model.ship import ShipModel

Answers = list[str | None]
"""One an input; None where no end came in time."""


@dataclass(frozen=True)
class Reasoning:
    """Answers to the same inputs by the latent that induction found, by the refined latent (the
    induced text encoded again), and with the induced text in the prompt."""

    induction: Induction
    found: Answers
    refined: Answers
    stated: Answers


def reason_many(
    model: ShipModel,
    bank: Bank,
    tasks: Sequence[Examples],
    inputs: Sequence[Sequence[str]],
    config: InductionConfig,
    max_new_tokens: int,
    num_rounds: int = 1,
    seed: int = 0,
    say: Say = silent,
) -> list[Reasoning]:
    """num_rounds: after the first, each one shows induction the answers that it is surest of beside
    the given examples."""
    inductions = induce_many(model, bank, tasks, config, seed, say)
    for turn in range(1, num_rounds):
        say(f"round {turn + 1}: inducing from the given examples and the answers to the inputs")
        widened = _widened(model, tasks, inputs, inductions, max_new_tokens)
        again = induce_many(model, bank, widened, config, seed + turn, say)
        inductions = _better(model, tasks, inductions, again)
    texts = [induction.instruction for induction in inductions]
    found_TZ = torch.tensor([induction.latent for induction in inductions])
    return [
        Reasoning(*parts)
        for parts in zip(
            inductions,
            answer_latents(model, found_TZ, texts, inputs, max_new_tokens),
            answer_latents(model, encode_all(model, texts), texts, inputs, max_new_tokens),
            answer_stated(model, texts, inputs, max_new_tokens),
            strict=True,
        )
    ]


def _widened(
    model: ShipModel,
    tasks: Sequence[Examples],
    inputs: Sequence[Sequence[str]],
    inductions: Sequence[Induction],
    max_new_tokens: int,
) -> list[list[Example]]:
    """The given examples and, as further ones, the inputs that both ways of using the induced text
    answer alike."""
    texts = [induction.instruction for induction in inductions]
    through = answer_latents(model, encode_all(model, texts), texts, inputs, max_new_tokens)
    stated = answer_stated(model, texts, inputs, max_new_tokens)
    return [
        [
            *own,
            *(
                Example(x, one)
                for x, one, other in zip(asked, first, second, strict=True)
                if one is not None and one == other
            ),
        ]
        for own, asked, first, second in zip(tasks, inputs, through, stated, strict=True)
    ]


def _better(
    model: ShipModel, tasks: Sequence[Examples], old: Sequence[Induction], new: Sequence[Induction]
) -> list[Induction]:
    """Of each pair the one whose text explains the given examples, not its own answers, with more
    right and then less loss."""
    chosen = []
    for examples, first, second in zip(tasks, old, new, strict=True):
        texts = [first.instruction, second.instruction]
        fit = fit_of_latents(model, encode_all(model, texts), texts, [examples] * 2)
        keys = [(-int(fit.right_CM[i].sum()), float(fit.loss_CM[i].sum())) for i in (0, 1)]
        chosen.append(second if keys[1] < keys[0] else first)
    return chosen
