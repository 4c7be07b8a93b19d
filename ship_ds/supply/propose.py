"""New tasks: an instruction that somebody proposes, and the run's own answers to it.

After Self-Instruct (Wang et al. 2023, arXiv 2212.10560), with the filters of Ensemble-Instruct (Lee
et al. 2023, arXiv 2310.13961) and Cycle-Instruct. In this order, each counted:

    repeated          proposed before
    unreadable        the encoder cannot read it
    held out          a dev or unseen rule of the run, or near to one
    known             ROUGE-L with a wording of a known task or a kept one is 0.7 or more
    disagreement      too few answers that the samples of its posterior agree on
    trivial           most answers are the input, or all are one
    cycle             the instruction that its examples induce answers other inputs otherwise

Letters: T tasks, Z latent size.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ship_ds.api import Ship
from ship_ds.console import Log
from ship_ds.data.readers.jsonl import row_of
from ship_ds.data.task import Example, Task
from ship_ds.errors import UserError
from ship_ds.inference.confidence import agreement
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import answer_latents
from ship_ds.inference.induction import induce_many
from ship_ds.inference.latents import nearest_known
from ship_ds.monitor.progress import ProgressLine
from ship_ds.supply.config import ProposeConfig
from ship_ds.supply.filters import agreed, is_new, is_trivial, share_alike
from ship_ds.supply.journal import Journal, SupplyPart
from ship_ds.supply.known import Known, is_readable, readable_inputs
from ship_ds.supply.proposers import Proposer


def propose(
    ship: Ship,
    proposer: Proposer,
    known: Known,
    config: ProposeConfig,
    num_tasks: int,
    seed: int,
    journal: Journal,
    log: Log,
) -> None:
    """Add rounds to the journal until it has `num_tasks` tasks or `max_rounds` rounds.

    Args:
        ship: answers, and induces.
        proposer: of instructions.
        known: what a new one must not be like, and whose inputs it takes.
        config: see there.
        num_tasks: to keep.
        seed: of every draw.
        journal: that is gone on with.
        log: takes lines of progress.
    """
    rounds = _Rounds(ship, proposer, known, config, seed)
    with ProgressLine("supply", num_tasks, log=log) as progress:
        progress.done(len(journal.tasks))
        for number in range(len(journal.parts), config.max_rounds):
            missing = num_tasks - len(journal.tasks)
            if missing <= 0:
                break
            progress.begin(f"round {number + 1}")
            part = rounds.take(number, journal, missing)
            journal.add(part)
            progress.done(len(part.tasks))


class _Rounds:
    def __init__(
        self,
        ship: Ship,
        proposer: Proposer,
        known: Known,
        config: ProposeConfig,
        seed: int,
    ) -> None:
        self.ship, self.proposer, self.config, self.seed = ship, proposer, config, seed
        self.known = [task.instruction for task in known.tasks]
        self.all, self.held_out_wordings = known, known.held_out_wordings
        self.by_instruction = known.lenders(ship)
        if not self.by_instruction:
            raise UserError("--data: no task has an input to answer; give some with examples")
        self.length = ship.config.evaluation.max_new_tokens
        self.bank = ship.bank_of(list(self.by_instruction))
        # Through the encoder alone, and without descents: it has to tell whether examples lead back
        # to what they were made by, not to find the best text there is.
        self.search = InductionConfig(
            num_rounds=0,
            ranks_in_prompt=False,
            asks_task_llm=False,
            max_new_tokens=ship.config.evaluation.max_instruction_tokens,
        )

    def take(self, number: int, journal: Journal, most: int) -> SupplyPart:
        """The round's part: at most `most` tasks."""
        proposals = self.proposer.propose(self.known, self.seed, number)
        counts = Counter(proposed=len(proposals))
        kept = [task["instruction"] for task in journal.tasks]
        before = [text for part in journal.parts for text in part.tried]
        tried = dict.fromkeys(proposal.text.strip() for proposal in proposals)
        tried = {text: None for text in tried if text not in before}
        counts["repeated"] = len(proposals) - len(tried)
        new = self.screen(list(tried), kept, counts)
        answered = self.execute(new) if new else []
        for one in answered:
            if len(one.examples) < self.config.min_examples:
                counts["disagreement"] += 1
            elif is_trivial(one.examples):
                counts["trivial"] += 1
        answered = [one for one in answered if self.is_worth_a_search(one)]
        rows: list[dict[str, Any]] = []
        origins = {proposal.text.strip(): proposal.origin for proposal in reversed(proposals)}
        for one, (induced, share) in zip(answered, self.cycles(answered), strict=True):
            if share < self.config.min_cycle:
                counts["cycle"] += 1
            elif len(rows) == most:
                counts["not written: enough are kept"] += 1
            else:
                counts["kept"] += 1
                name = f"propose-{self.seed}-{number}-{len(rows)}"
                rows.append(self.row(one, name, origins[one.text], induced, share))
        return SupplyPart(dict(counts), rows, list(tried))

    def screen(self, texts: Sequence[str], kept: Sequence[str], counts: Counter[str]) -> list[str]:
        """Those that can be read and are like no other; `counts` takes the rest."""
        new: list[str] = []
        away = self.all.give_away([Task(text, text, ()) for text in texts])
        for text, is_away in zip(texts, away, strict=True):
            if not is_readable(self.ship, text):
                counts["unreadable"] += 1
            elif is_away or not is_new(text, self.held_out_wordings, self.config.max_rouge):
                counts["held out"] += 1
            elif not is_new(text, [*self.all.wordings, *kept, *new], self.config.max_rouge):
                counts["known"] += 1
            else:
                new.append(text)
        return new

    def is_worth_a_search(self, one: "Answered") -> bool:
        """Whether it has enough answers, which say something."""
        return len(one.examples) >= self.config.min_examples and not is_trivial(one.examples)

    def row(
        self, one: "Answered", name: str, origin: Mapping[str, Any], induced: str, share: float
    ) -> dict[str, Any]:
        """The line of a task that is kept."""
        how = {
            "how": "propose",
            "inputs_of": one.source.id,
            "agreement": round(one.agreement, 3),
            "induced": induced,
            "cycle": round(share, 3),
        }
        return row_of(Task(name, one.text, tuple(one.examples)), {**origin, **how})

    @torch.no_grad()
    def execute(self, texts: Sequence[str]) -> list["Answered"]:
        """Each instruction's answers to inputs of the known task that is nearest to it."""
        model, config = self.ship.model, self.config
        posterior, read = model.posterior(texts), model.read_where_fused(texts)
        sources, inputs = [], []
        for text, latent_Z in zip(texts, posterior.mean_TZ, strict=True):
            source = self.by_instruction[nearest_known(self.bank, latent_Z, 1)[0].instruction]
            places = list(range(len(source.examples)))
            random.Random(f"inputs {self.seed} {text}").shuffle(places)
            sources.append(source)
            inputs.append(
                readable_inputs(self.ship, source, config.num_inputs, places, instruction=text)
            )
        length = self.length
        answers = answer_latents(model, posterior.mean_TZ, texts, inputs, length, readings=read)
        shares = agreement(model, posterior, texts, inputs, answers, length, readings=read)
        answered = []
        for i, (text, source) in enumerate(zip(texts, sources, strict=True)):
            examples = agreed(inputs[i], answers[i], shares[i], config.min_agreement)
            share = sum(shares[i]) / max(1, len(shares[i]))
            answered.append(Answered(text, source, examples, share))
        return answered

    def cycles(self, answered: Sequence["Answered"]) -> list[tuple[str, float]]:
        """Of each the instruction that some of its examples induce, and the share of the others
        that this one answers as they have it."""
        if not answered:
            return []
        num_shown = self.config.num_shown
        shown = [one.examples[:num_shown] for one in answered]
        asked = [one.examples[num_shown:] for one in answered]
        inductions = induce_many(self.ship.model, self.ship.bank, shown, self.search, self.seed)
        induced = [induction.instruction for induction in inductions]
        # What the search returns was read and tested by it, so it can be read again.
        answers = self.ship.answer_many(induced, [[e.input for e in row] for row in asked])
        shares = [share_alike(row, others) for row, others in zip(answers, asked, strict=True)]
        return list(zip(induced, shares, strict=True))


class Answered(NamedTuple):
    """An instruction with the task whose inputs it takes, the answers that are agreed on, and the
    mean agreement of all of them."""

    text: str
    source: Task
    examples: list[Example]
    agreement: float
