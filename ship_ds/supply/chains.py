"""Two tasks in a row: y of one as x of the next.

After Chain-of-Instructions (Hayati et al. 2024, arXiv 2402.11532). In this order, each counted:

    held out       in one of its wordings a dev or unseen rule of the run
    shape          outputs of the first are no inputs of the second, by what they are made of
    unfinished     too few inputs with an answer of both
    trivial        most answers are the input, or all are one
    one step is enough   the second alone, or the first alone, answers the same
    disagreement   "first A, then B" answers otherwise than A and then B

What A gives is what its examples have; B, and the two in one, are answered by the run. So the
answers of a chain are A's own targets, answered by B's adapter.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from ship_ds.api import Ship
from ship_ds.console import Log
from ship_ds.data.matching import is_list
from ship_ds.data.readers.jsonl import row_of
from ship_ds.data.task import Example, Task
from ship_ds.monitor.progress import ProgressLine
from ship_ds.supply.config import ChainsConfig
from ship_ds.supply.filters import is_trivial, share_alike
from ship_ds.supply.journal import Journal, SupplyPart
from ship_ds.supply.known import Known, can_answer, inputs_of, is_readable

_Answers = Sequence[str | None]
"""To the inputs of one chain; None: the answer did not end in time."""


def fits(outputs: Sequence[str], inputs: Sequence[str]) -> bool:
    """Whether texts look like inputs: lists where most inputs are lists and none where few are; and
    their median number of words is between half of the shortest input's and the longest one's."""
    if not outputs or not inputs:
        return False
    are_lists = [sum(map(is_list, texts)) * 2 > len(texts) for texts in (outputs, inputs)]
    lengths = sorted(len(text.split()) for text in outputs)
    words = [len(text.split()) for text in inputs]
    median = lengths[len(lengths) // 2]
    return are_lists[0] == are_lists[1] and max(1, min(words) / 2) <= median <= max(words)


def make_chains(
    ship: Ship,
    known: Known,
    config: ChainsConfig,
    num_tasks: int,
    seed: int,
    journal: Journal,
    log: Log,
) -> None:
    """Add pairs to the journal, in parts, until it has `num_tasks` tasks or all pairs that were
    drawn are tried.

    Args:
        ship: answers.
        known: the tasks that are paired, and those that must not be given away.
        config: how many pairs are drawn, how many are answered together, and the bounds of a chain
            that is kept.
        num_tasks: to keep.
        seed: of the draw of pairs.
        journal: that is gone on with.
        log: takes lines of progress.
    """
    tasks = known.tasks
    pairs = draw_pairs(len(tasks), config.max_pairs, seed)
    size = config.num_at_once
    with ProgressLine("supply", num_tasks, log=log) as progress:
        progress.done(len(journal.tasks))
        for start in range(size * len(journal.parts), len(pairs), size):
            missing = num_tasks - len(journal.tasks)
            if missing <= 0:
                break
            progress.begin(f"pairs from {start + 1}")
            chosen = [(tasks[a], tasks[b]) for a, b in pairs[start : start + size]]
            part = _part(ship, known, chosen, config, missing)
            journal.add(part)
            progress.done(len(part.tasks))


def draw_pairs(num_tasks: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Distinct ordered pairs of different tasks, `count` of them or all there are.

    Args:
        num_tasks: that are paired, each by its number from 0.
        count: of pairs, at most.
        seed: of the draw.
    """
    num_pairs = num_tasks * (num_tasks - 1)
    drawn = random.Random(f"chains {seed}").sample(range(num_pairs), min(count, num_pairs))
    pairs = (divmod(place, num_tasks - 1) for place in drawn)
    return [(a, b + (b >= a)) for a, b in pairs]


def _part(
    ship: Ship,
    known: Known,
    pairs: Sequence[tuple[Task, Task]],
    config: ChainsConfig,
    most: int,
) -> SupplyPart:
    counts: Counter[str] = Counter(pairs=len(pairs))
    rows: list[dict[str, Any]] = []
    read: list[Chain] = []
    away = known.give_away([_worded(first, second, config) for first, second in pairs])
    for (first, second), is_away in zip(pairs, away, strict=True):
        if is_away:
            counts["held out"] += 1
            continue
        if not first.examples or not inputs_of(second, 1):
            counts["no inputs" if first.examples else "no labels"] += 1
            continue
        inputs = inputs_of(second, len(second.examples) + len(second.inputs))
        if not fits([e.target for e in first.examples[: config.num_inputs]], inputs):
            counts["shape"] += 1
            continue
        texts = joined(first, second, config), second.instruction
        are_read = all(is_readable(ship, text) for text in texts)
        chain = Chain.of(first, second, config, partial(can_answer, ship)) if are_read else None
        if chain is not None and chain.given:
            read.append(chain)
        else:
            counts["unreadable"] += 1
    for chain, answers in zip(read, _answers(ship, read), strict=True):
        reason, examples, share = chain.judged(*answers, config)
        if reason == "kept" and len(rows) == most:
            reason = "not written: enough are kept"
        counts[reason] += 1
        if reason == "kept":
            task = Task(chain.id, chain.text, tuple(examples))
            origin = {
                "how": "chains",
                "of": [chain.first.id, chain.second.id],
                "run": ship.digest[:12],
                "agreement": round(share, 3),
            }
            rows.append(row_of(task, origin))
    return SupplyPart(dict(counts), rows)


def joined(first: Task, second: Task, config: ChainsConfig) -> str:
    """The two instructions in one.

    Args:
        first: whose answers the other one takes.
        second: the other one.
        config: how they are joined.
    """
    return config.joint.format(first=first.instruction, second=second.instruction)


def _worded(first: Task, second: Task, config: ChainsConfig) -> Task:
    """A task without examples, of every wording of the two in one."""
    texts = [
        config.joint.format(first=one, second=other)
        for one in (first.instruction, *first.paraphrases)
        for other in (second.instruction, *second.paraphrases)
    ]
    return Task(f"{first.id} {second.id}", texts[0], (), tuple(texts[1:]))


@dataclass(frozen=True)
class Chain:
    """Two tasks in a row.

    Args:
        first: whose examples give the inputs, and what the second is asked.
        second: answers.
        text: the two instructions in one.
        given: examples of the first.
    """

    first: Task
    second: Task
    text: str
    given: tuple[Example, ...]

    @classmethod
    def of(
        cls,
        first: Task,
        second: Task,
        config: ChainsConfig,
        can_answer: Callable[[str, str], bool],
    ) -> "Chain":
        """The chain of two tasks, with examples that can be answered in all three ways that
        `judged` compares.

        Args:
            first: whose examples give the inputs, one of each, and what the second is asked.
            second: answers.
            config: how the two instructions become one, and how many inputs are taken.
            can_answer: whether the run reads and answers an input (second) under the adapter of an
                instruction (first) that it can read.
        """
        joint = joined(first, second, config)
        read = (
            example
            for example in {example.input: example for example in first.examples}.values()
            if can_answer(joint, example.input)
            and can_answer(second.instruction, example.input)
            and can_answer(second.instruction, example.target)
        )
        return cls(first, second, joint, tuple(islice(read, config.num_inputs)))

    @property
    def id(self) -> str:
        """No other pair has it, whatever signs the two ids have."""
        first = self.first.id.replace("%", "%25").replace("+", "%2B")
        return f"chain-{first}+{self.second.id}"

    @property
    def inputs(self) -> list[str]:
        """Of the first task."""
        return [example.input for example in self.given]

    @property
    def between(self) -> list[str]:
        """What the first task makes of them."""
        return [example.target for example in self.given]

    def judged(
        self,
        then: _Answers,
        at_once: _Answers,
        alone: _Answers,
        config: ChainsConfig,
    ) -> tuple[str, list[Example], float]:
        """What becomes of it, its examples, and the share of them that both ways agree on.

        Args:
            then: what the second makes of `between`.
            at_once: what the text makes of `inputs`.
            alone: what the second makes of `inputs`.
            config: bounds.
        """
        # The second task's own examples are right, whatever the run answers.
        known = {example.input: example.target for example in self.second.examples}
        ends = [known.get(text, y) for text, y in zip(self.between, then, strict=True)]
        done = [i for i, y in enumerate(ends) if y is not None and y.strip()]
        examples = [Example(self.given[i].input, str(ends[i])) for i in done]
        if len(examples) < config.min_examples:
            return "unfinished", [], 0.0
        if is_trivial(examples):
            return "trivial", [], 0.0
        steps = ([alone[i] for i in done], [self.between[i] for i in done])
        if max(share_alike(step, examples) for step in steps) >= config.min_agreement:
            return "one step is enough", [], 0.0
        share = share_alike([at_once[i] for i in done], examples)
        return ("kept" if share >= config.min_agreement else "disagreement"), examples, share


def _answers(ship: Ship, chains: Sequence[Chain]) -> list[tuple[_Answers, _Answers, _Answers]]:
    """Of each chain what `Chain.judged` takes; all share batches."""
    asked = [
        one
        for chain in chains
        for one in (
            (chain.second.instruction, chain.between),
            (chain.text, chain.inputs),
            (chain.second.instruction, chain.inputs),
        )
    ]
    if not asked:
        return []
    rows = ship.answer_many([text for text, _ in asked], [texts for _, texts in asked])
    return [(rows[i], rows[i + 1], rows[i + 2]) for i in range(0, len(rows), 3)]
