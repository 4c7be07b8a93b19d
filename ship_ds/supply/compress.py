"""Shortened instructions, by what the run needs of them.

After "Did You Read the Instructions?" (Yin et al. 2023, arXiv 2306.01150): sentences, then words,
are dropped one by one, each time the one that the examples miss least, as long as it
is within a tolerance of the whole instruction's. Theirs prunes a tree of the syntax by the model
that reads it in the prompt; here the Task LLM reads none of it, but has the adapter that is made
of the shortened text.

Letters: C candidates, M examples of a task.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from ship_ds.api import Ship
from ship_ds.console import Log
from ship_ds.data.readers.jsonl import row_of
from ship_ds.data.task import Example, Task
from ship_ds.inference.scoring import fit_of_latents
from ship_ds.model.encoder import means_of
from ship_ds.monitor.progress import ProgressLine
from ship_ds.supply.config import CompressConfig
from ship_ds.supply.journal import Journal, SupplyPart
from ship_ds.supply.known import Known, is_readable, readable_examples

Losses = Callable[[Sequence[str]], list[float]]
"""Texts -> the loss of the task's examples under each, in nats a token; infinite where a text
cannot be read."""
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def without_idle_words(
    text: str, losses: Losses, config: CompressConfig
) -> tuple[str, float, float]:
    """The shortened text, its loss and that of the whole one; the text itself where nothing can go.

    Args:
        text: an instruction.
        losses: of texts.
        config: tolerance and least length.
    """
    whole = losses([text])[0]
    most = whole + config.tolerance
    short, loss = _dropped(_SENTENCE.split(text), whole, most, losses, config.min_words)
    if len(short.split()) <= config.most_words:
        short, loss = _dropped(short.split(), loss, most, losses, config.min_words)
    # Pieces are put together with single spaces.
    return (text if short.split() == text.split() else short), loss, whole


def _dropped(
    pieces: Sequence[str], loss: float, most: float, losses: Losses, min_words: int
) -> tuple[str, float]:
    """Drop the piece that is missed least, as long as the loss is then at most `most`."""
    pieces = list(pieces)
    while len(pieces) > 1:
        shorter = [pieces[:i] + pieces[i + 1 :] for i in range(len(pieces))]
        shorter = [rest for rest in shorter if len(" ".join(rest).split()) >= min_words]
        if not shorter:
            break
        text_losses = losses([" ".join(rest) for rest in shorter])
        best = min(range(len(text_losses)), key=text_losses.__getitem__)
        if text_losses[best] > most:
            break
        pieces, loss = shorter[best], text_losses[best]
    return " ".join(pieces), loss


def losses_of(ship: Ship, examples: Sequence[Example]) -> Losses:
    """The losses of these examples under the adapters of texts."""
    num_tokens = sum(len(ship.model.prompts.target(e.target)) for e in examples)

    def losses(texts: Sequence[str]) -> list[float]:
        text_losses = [float("inf")] * len(texts)
        read = [i for i, text in enumerate(texts) if is_readable(ship, text)]
        if read:
            wordings = [texts[i] for i in read]
            once = ship.model.read_once(wordings)
            fit = fit_of_latents(ship.model, means_of(once), wordings, [examples] * len(read), once)
            for i, loss in zip(read, (fit.loss_CM.sum(1) / num_tokens).tolist(), strict=True):
                text_losses[i] = loss
        return text_losses

    return losses


def compress_tasks(
    ship: Ship,
    known: Known,
    num_tasks: int | None,
    config: CompressConfig,
    journal: Journal,
    log: Log,
) -> None:
    """Add to the journal each task, with its shortened instruction as one more wording where there
    is one.

    Args:
        ship: under whose adapters the losses of a task's examples are taken.
        known: the tasks, and those that must not be given away.
        num_tasks: that are looked at; None: all.
        config: by how much a shortened instruction may do worse, and how short it may be.
        journal: that is gone on with.
        log: takes lines of progress.
    """
    tasks = known.tasks[:num_tasks]
    with ProgressLine("supply", len(tasks), log=log) as progress:
        progress.done(len(journal.parts))
        for task in tasks[len(journal.parts) :]:
            progress.begin("compress")
            journal.add(_part(ship, known, task, config))
            progress.done(1)


def _part(ship: Ship, known: Known, task: Task, config: CompressConfig) -> SupplyPart:
    if not is_readable(ship, task.instruction):
        return SupplyPart({"unreadable": 1}, [])
    if not (examples := readable_examples(ship, task, config.num_examples)):
        return SupplyPart({"unreadable" if task.examples else "no labels": 1}, [])
    losses = losses_of(ship, examples)
    text, loss, whole = without_idle_words(task.instruction, losses, config)
    origin = {
        "how": "compress",
        "run": ship.digest[:12],
        "loss": round(loss, 4),
        "loss_of_whole": round(whole, 4),
    }
    known_words = [one.split() for one in (task.instruction, *task.paraphrases)]
    if text.split() in known_words:
        return SupplyPart({"nothing to drop": 1}, [])
    if known.give_away([Task(task.id, text, ())])[0]:
        return SupplyPart({"held out": 1}, [])
    words, before = len(text.split()), len(task.instruction.split())
    counts = {"shortened": 1, "words before": before, "words after": words}
    longer = replace(task, paraphrases=(*task.paraphrases, text))
    return SupplyPart(counts, [row_of(longer, origin | {"wording": text})])
