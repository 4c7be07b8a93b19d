"""Inductive reasoning: induce an instruction from examples, encode it again, answer new inputs
(arXiv 2502.02315, section 3.3).

    reason_many(model, bank, [[Example("1 2", "2 1")]], [["3 4"]], config, 20)
    -> [Reasoning(induction of "reverse the list", ["4 3"], ["4 3"], ["4 3"], None)]

Letters: T tasks, Z latent size.
"""

from collections.abc import Sequence

import torch

from ship_ds.console import Log, no_log
from ship_ds.data.task import Example, Reading
from ship_ds.inference.bank import Bank
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import answer_latents, answer_read, answer_stated
from ship_ds.inference.induction import induce_many, searches_of
from ship_ds.inference.results import Answers, Induction, Reasoning
from ship_ds.inference.scoring import Examples
from ship_ds.inference.trials import Trial, TrialTable
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
    *,
    keeps_cut_off: bool = False,
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
        keeps_cut_off: a refined answer that did not end in time is a `CutOff` in place of None, for
            whoever scores what was written all the same.

    Raises:
        UserError: as `induce_many`.
    """
    inductions = induce_many(model, bank, tasks, config, seed, log)
    for i in range(1, num_rounds):
        log(f"round {i + 1}: inducing from the given examples and the answers to the inputs")
        more_examples = _with_agreed_answers(model, tasks, inputs, inductions, max_new_tokens)
        again = induce_many(model, bank, more_examples, config, seed + i, log)
        inductions = _better(model, bank, tasks, inductions, again, config)
    texts = [induction.instruction for induction in inductions]
    latent_TZ = torch.tensor([induction.latent for induction in inductions])
    readings = [induction.latent_reading for induction in inductions]
    by_latent = answer_latents(model, latent_TZ, texts, inputs, max_new_tokens, readings=readings)
    known = with_examples(model, texts, tasks)
    refined = answer_read(model, known, texts, inputs, max_new_tokens, keeps_cut_off=keeps_cut_off)
    in_prompt = answer_stated(model, texts, inputs, max_new_tokens)
    read: Sequence[Answers | None] = [None] * len(texts)
    if model.config.encoder.reads_examples_alone:
        read = answer_read(model, examples_alone(model, tasks), texts, inputs, max_new_tokens)
    columns = zip(inductions, by_latent, refined, in_prompt, read, strict=True)
    return [Reasoning(*row) for row in columns]


def with_examples(
    model: ShipModel, texts: Sequence[str], tasks: Sequence[Examples]
) -> list[str | Reading]:
    """What is known of each task once a text is induced, as the encoder reads it: the text and,
    where it was trained on both (`model.encoder.max_examples`), the examples that it was induced
    from, the first ones of more than in training.

    Args:
        model: says how many examples its encoder was trained on.
        texts: the induced instruction of each task.
        tasks: the examples of each.
    """
    most = model.config.encoder.max_examples
    return [
        Reading(text, tuple(examples[:most])) if most and examples else text
        for text, examples in zip(texts, tasks, strict=True)
    ]


def examples_alone(model: ShipModel, tasks: Sequence[Examples]) -> list[Reading]:
    """Each task's examples, the first ones of more than in training, for an encoder that reads them
    without an instruction (`reads_examples_alone`)."""
    most = model.config.encoder.max_examples
    return [Reading(None, tuple(examples[:most])) for examples in tasks]


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
    encoded = answer_read(model, with_examples(model, texts, tasks), texts, inputs, max_new_tokens)
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
    bank: Bank,
    tasks: Sequence[Examples],
    before: Sequence[Induction],
    after: Sequence[Induction],
    config: InductionConfig,
) -> list[Induction]:
    """Of each task's two inductions the one whose text the search would choose, tested through the
    encoder on the given examples, not on its own answers."""
    better = []
    texts = list(dict.fromkeys(induction.instruction for induction in (*before, *after)))
    read = dict(zip(texts, model.read_once(texts), strict=True))
    searches = searches_of(model, bank, tasks, config)
    for search, pair in zip(searches, zip(before, after, strict=True), strict=True):
        texts = [induction.instruction for induction in pair]
        trials = [Trial(search, text, "", read[text].mean_Z, read[text]) for text in texts]
        table = TrialTable.measure(model, trials, slice(None), in_prompt=False)
        first, second = table.candidates()
        # A tie stays with the earlier text: a round has to be better to change it.
        better.append(pair[1] if second.rank < first.rank else pair[0])
    return better
