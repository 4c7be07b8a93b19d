"""New tasks: an instruction that somebody proposes, and the run's own answers to it.

After Self-Instruct (Wang et al. 2023, arXiv 2212.10560), with the filters of Ensemble-Instruct (Lee
et al. 2023, arXiv 2310.13961) and Cycle-Instruct. In this order, each counted:

    repeated          proposed before
    unreadable        the encoder cannot read it
    known             ROUGE-L with a known or kept one is 0.7 or more
    disagreement      too few answers that the samples of its posterior agree on
    trivial           most answers are the input, or all are one
    cycle             the instruction that its examples induce answers other inputs otherwise
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ship_ds.api import Ship
from ship_ds.console import Log
from ship_ds.data.readers.jsonl import row_of
from ship_ds.data.task import Example, Task
from ship_ds.inference.confidence import agreement
from ship_ds.inference.deduction import answer_latents
from ship_ds.inference.latents import nearest_known
from ship_ds.monitor.progress import Progress
from ship_ds.supply.config import ProposeConfig
from ship_ds.supply.filters import agreed, is_new, is_trivial, share_alike
from ship_ds.supply.journal import Journal, Part
from ship_ds.supply.known import inputs_of, is_readable
from ship_ds.supply.proposers import Proposal, Proposer


def propose(
    ship: Ship,
    proposer: Proposer,
    known: Sequence[Task],
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
        known: tasks that a new one must not be like, and whose inputs it takes.
        config: see there.
        num_tasks: to keep.
        seed: of every draw.
        journal: that is gone on with.
        log: takes lines of progress.
    """
    rounds = _Rounds(ship, proposer, known, config, seed)
    with Progress("supply", num_tasks, log=log) as progress:
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
        known: Sequence[Task],
        config: ProposeConfig,
        seed: int,
    ) -> None:
        self.ship, self.proposer, self.config, self.seed = ship, proposer, config, seed
        self.known = [task.instruction for task in known]
        self.by_instruction = {task.instruction: task for task in known}
        self.length = ship.config.evaluation.max_new_tokens
        self.bank = ship.bank_of(self.known)

    def take(self, number: int, journal: Journal, most: int) -> Part:
        """The round's part: at most `most` tasks."""
        counts: Counter[str] = Counter()
        proposals = self.proposer.propose(self.known, self.seed, number)
        counts["proposed"] = len(proposals)
        tried = {text for part in journal.parts for text in part.tried}
        kept = [task["instruction"] for task in journal.tasks]
        tasks: list[dict[str, Any]] = []
        new: list[str] = []
        for proposal in proposals:
            text = proposal.text.strip()
            if len(tasks) == most:
                counts["not looked at: enough are kept"] += 1
                continue
            if text in tried:
                counts["repeated"] += 1
                continue
            tried.add(text)
            new.append(text)
            if not is_readable(self.ship, text):
                counts["unreadable"] += 1
            elif not is_new(text, [*self.known, *kept], self.config.max_rouge):
                counts["known"] += 1
            else:
                reason, row = self.answer(proposal, f"{number}-{len(new)}")
                counts[reason] += 1
                if row is not None:
                    kept.append(text)
                    tasks.append(row)
        return Part(dict(counts), tasks, new)

    def answer(self, proposal: Proposal, name: str) -> tuple[str, dict[str, Any] | None]:
        """What becomes of a new instruction: the reason and, where it is kept, its line."""
        config, text = self.config, proposal.text.strip()
        source, examples, share = self.execute(text)
        if len(examples) < config.min_examples:
            return "disagreement", None
        if is_trivial(examples):
            return "trivial", None
        induced, cycle = self.cycle(examples)
        if cycle < config.min_cycle:
            return "cycle", None
        origin = proposal.origin | {
            "how": "propose",
            "inputs_of": source.id,
            "agreement": round(share, 3),
            "induced": induced,
            "cycle": round(cycle, 3),
        }
        task = Task(f"propose-{self.seed}-{name}", text, tuple(examples))
        return "kept", row_of(task, origin)

    @torch.no_grad()
    def execute(self, text: str) -> tuple[Task, list[Example], float]:
        """The known task that is nearest to an instruction, the answers to its inputs that are
        agreed on, and the mean agreement."""
        ship, config = self.ship, self.config
        posterior = ship.model.posterior([text])
        nearest = nearest_known(self.bank, posterior.mean_TZ[0], 1)[0].instruction
        source = self.by_instruction[nearest]
        places = list(range(len(source.examples)))
        random.Random(f"inputs {self.seed} {text}").shuffle(places)
        inputs = inputs_of(source, config.num_inputs, places)
        answers = answer_latents(ship.model, posterior.mean_TZ, [text], [inputs], self.length)
        shares = agreement(ship.model, posterior, [text], [inputs], answers, self.length)
        examples = agreed(inputs, answers[0], shares[0], config.min_agreement)
        return source, examples, sum(shares[0]) / len(shares[0])

    def cycle(self, examples: Sequence[Example]) -> tuple[str, float]:
        """The instruction that some examples induce, and the share of the others that it answers as
        they have it."""
        shown, asked = examples[: self.config.num_shown], examples[self.config.num_shown :]
        induced = self.ship.induce([(e.input, e.target) for e in shown], seed=self.seed).instruction
        if not is_readable(self.ship, induced):
            return induced, 0.0
        answers = self.ship.answer(induced, [e.input for e in asked])
        return induced, share_alike(answers, asked)
