"""Inductive reasoning: induce an instruction from examples, encode it again, answer new inputs
(arXiv 2502.02315, section 3.3).

    reason_many(model, bank, [[Example("1 2", "2 1")]], [["3 4"]], config, 20)
    -> [Reasoning(induction of "reverse the list", ["4 3"], ["4 3"], ["4 3"], None)]

Letters: C candidates, M examples of a task, T tasks, Z latent size.
"""

from collections.abc import Sequence

import torch

from ship_ds.console import Log, no_log
from ship_ds.data.task import Example, Reading
from ship_ds.inference.bank import Bank
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import AnswersByTask, answer_latents, answer_stated
from ship_ds.inference.induction import induce_many
from ship_ds.inference.results import Answers, Induction, Reasoning
from ship_ds.inference.scoring import Examples, fit_of_latents
from ship_ds.model.ship import ShipModel


def reason_many(
    model: ShipModel,
    bank: Bank,
    tasks: Sequence[Examples],
    inputs: Sequence[Sequence[str]],
    config: InductionConfig,
    max_new_tokens: int,
    num_rounds: int = 1,
    seed: int = 0,
    log: Log = no_log,
) -> list[Reasoning]:
    """One reasoning a task.

    Args:
        model: with its trained weights.
        bank: the known instructions.
        tasks: the examples of each.
        inputs: of each task, to be answered.
        config: how to search for an instruction.
        max_new_tokens: of an answer.
        num_rounds: after the first, each one gives induction the answers that it is surest of
            beside the given examples.
        seed: of every draw.
        log: takes a line of progress.

    Raises:
        UserError: as `induce_many`.
    """
    inductions = induce_many(model, bank, tasks, config, seed, log)
    for i in range(1, num_rounds):
        log(f"round {i + 1}: inducing from the given examples and the answers to the inputs")
        more_examples = _with_agreed_answers(model, tasks, inputs, inductions, max_new_tokens)
        again = induce_many(model, bank, more_examples, config, seed + i, log)
        inductions = _better(model, tasks, inductions, again)
    texts = [induction.instruction for induction in inductions]
    latent_TZ = torch.tensor([induction.latent for induction in inductions])
    readings = [induction.latent_reading for induction in inductions]
    by_latent = answer_latents(model, latent_TZ, texts, inputs, max_new_tokens, readings=readings)
    refined = answer_beside(model, texts, tasks, inputs, max_new_tokens)
    in_prompt = answer_stated(model, texts, inputs, max_new_tokens)
    read: Sequence[Answers | None] = [None] * len(texts)
    if model.config.encoder.reads_examples_alone:
        read = answer_beside(model, texts, tasks, inputs, max_new_tokens, reads_text=False)
    columns = zip(inductions, by_latent, refined, in_prompt, read, strict=True)
    return [Reasoning(*row) for row in columns]


def answer_beside(
    model: ShipModel,
    texts: Sequence[str],
    tasks: Sequence[Examples],
    inputs: Sequence[Sequence[str]],
    max_new_tokens: int,
    *,
    reads_text: bool = True,
    keeps_cut_off: bool = False,
) -> AnswersByTask:
    """Answers under the adapter of what is known of a task by then: an induced text and, where the
    encoder was trained on both (`model.encoder.max_examples`), the examples that it was induced
    from, the first ones of more than in training.

    Of 78 unseen tasks around SmolLM2, whose text is that of the known task most alike, ROUGE-L is
    0.167 by the text alone, 0.353 with five examples (of which three are read) and 0.387 by these
    alone (docs/results.md, Induction).

    Args:
        model: with its trained weights.
        texts: one a task; they matter to a Task LLM that reads them too.
        tasks: the examples of each.
        inputs: of each task, to be answered.
        max_new_tokens: of an answer.
        reads_text: False: the encoder reads the examples alone, and was trained to.
        keeps_cut_off: see `deduction.Answerer`.
    """
    most = model.config.encoder.max_examples
    readings = [
        Reading(text if reads_text else None, tuple(examples[:most])) if most else text
        for text, examples in zip(texts, tasks, strict=True)
    ]
    return answer_latents(
        model,
        model.encode(readings),
        texts,
        inputs,
        max_new_tokens,
        readings=readings,
        keeps_cut_off=keeps_cut_off,
    )


def _with_agreed_answers(
    model: ShipModel,
    tasks: Sequence[Examples],
    inputs: Sequence[Sequence[str]],
    inductions: Sequence[Induction],
    max_new_tokens: int,
) -> list[list[Example]]:
    """The given examples and, as further ones, the inputs that both ways of using the induced text
    answer alike: such an answer is more often right than either alone."""
    texts = [induction.instruction for induction in inductions]
    encoded = answer_beside(model, texts, tasks, inputs, max_new_tokens)
    in_prompt = answer_stated(model, texts, inputs, max_new_tokens)
    return [
        [
            *examples,
            *(
                Example(x, one)
                for x, one, other in zip(inputs_of_task, answers, others, strict=True)
                if one is not None and one == other
            ),
        ]
        for examples, inputs_of_task, answers, others in zip(
            tasks, inputs, encoded, in_prompt, strict=True
        )
    ]


def _better(
    model: ShipModel,
    tasks: Sequence[Examples],
    before: Sequence[Induction],
    after: Sequence[Induction],
) -> list[Induction]:
    """Of each task's two inductions the one whose text explains the given examples, not its own
    answers, with more right and then less loss."""
    better = []
    for examples, pair in zip(tasks, zip(before, after, strict=True), strict=True):
        texts = [induction.instruction for induction in pair]
        fit = fit_of_latents(model, model.encode(texts), texts, [examples] * 2)
        first, second = (
            (-int(right_M.sum()), float(loss_M.sum()))
            for right_M, loss_M in zip(fit.right_CM, fit.loss_CM, strict=True)
        )
        better.append(pair[1] if second < first else pair[0])
    return better
