"""ItD: induction through deduction."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ship_ds.console import log
from ship_ds.data.task import Example
from ship_ds.evaluation.baselines.group_decoding import group_beams
from ship_ds.evaluation.baselines.oracles import draw
from ship_ds.evaluation.baselines.static_adapters import TaskLoras
from ship_ds.evaluation.baselines.trained import TrainedMethod
from ship_ds.evaluation.budgets import Spent
from ship_ds.model import budget

_ANSWERED_BETWEEN_LOOKS = 96
"""Prompts that the base answers between two looks at the clock."""


@dataclass(frozen=True)
class ItdRecipe:
    """How ITD is trained and searches."""

    data_share: float = 0.3
    most_per_instruction: int = 40
    proposals_per_task: int = 2
    prior_share: float = 0.15
    rows_per_step: int | None = None
    """None: as many as a step of SHIP answers."""
    lr: float = 2e-3
    num_beams: int = 5


@dataclass(frozen=True)
class Deduced:
    """An instruction and examples of it whose targets the base itself gave."""

    instruction: str
    examples: tuple[Example, ...]


class Itd(TrainedMethod):
    """The base teaches itself induction by its own deductions (Sun et al. 2024, arXiv 2403.05789).

    Deductive data (section 3.1): instructions f ~ p(f) are the base's own initial inductions from
    seen tasks' examples and the seen wordings; inputs x come from the seen tasks; y is what the
    base answers to x with f in its prompt. Naive Bayesian induction (section 3.2): a LoRA is
    trained on p(f | x, y) with one example at a time, and on p(f) without any; beams are grown by
    the mean over the shown examples of log p(token | x_i, y_i), and the finished ones ranked by
    sum_i log p(f | x_i, y_i) - (n - 1) log p(f).
    Simplified: the initial inductions vary by the examples shown instead of by sampled decoding; x
    is taken from the data instead of being generated. A base that ends no answer teaches nothing:
    its own texts are voted on.
    """

    name: ClassVar[str] = "itd"
    about: ClassVar[str] = "a LoRA on the base's own deductions; the examples vote on the text"
    states_instruction: ClassVar[bool] = False
    in_stages: ClassVar[bool] = True
    recipe: ClassVar[ItdRecipe] = ItdRecipe()
    module: TaskLoras

    def build(self) -> nn.Module:
        return TaskLoras(self.base.sites, self.base.lora)

    def train(self) -> None:
        recipe, prompts = self.recipe, self.base.prompts
        (deduced, used), sampler = self.deduce_data(), self.sampler
        if not deduced:
            log(f"{self.name}: the base ended no answer, so that it has nothing to train on")
            return
        num_rows = recipe.rows_per_step or sampler.tasks_per_step * sampler.examples_per_task
        rng = random.Random(f"{self.setting.seed} itd")

        def losses_at(step: int) -> Iterator[Tensor]:
            chosen = rng.choices(deduced, k=num_rows)
            shown = [
                () if rng.random() < recipe.prior_share else (rng.choice(one.examples),)
                for one in chosen
            ]
            return self.base.losses(
                self.module(),
                [[prompts.decoder_prompt(row)] for row in shown],
                [[one.instruction] for one in chosen],
            )

        left = self.budget.share(self.budget.rest(recipe.data_share, used))
        self.fit(losses_at, left, recipe.lr, self.name, num_rows)

    def deduce_data(self) -> tuple[list[Deduced], Spent]:
        """Batch after batch of proposed instructions and inputs, answered by the base, until the
        data's share is spent, or each instruction was asked often enough; and what that took."""
        allowed = self.budget.share(self.recipe.data_share)
        started, used = time.perf_counter(), Spent()
        proposed = self.propose()
        inputs = [e.input for task in self.setting.splits.seen for e in task.train]
        rng = random.Random(f"{self.setting.seed} itd inputs")
        turns = _in_turn(proposed, rng)
        most = self.recipe.most_per_instruction * len(proposed)
        examples_of: dict[str, list[Example]] = {}
        with tqdm(desc=f"{self.name}: answers", total=most, mininterval=5) as bar:
            while not used.steps or (allowed.spent(used) < 1 and used.examples < most):
                asked = [
                    (text, rng.choice(inputs)) for text in islice(turns, _ANSWERED_BETWEEN_LOOKS)
                ]
                answers = self.base.generate(
                    [self.base.prompts.task_prompt(x, text) for text, x in asked],
                    self.base.config.evaluation.max_new_tokens,
                )
                for (text, x), y in zip(asked, answers, strict=True):
                    if y:
                        examples_of.setdefault(text, []).append(Example(x, y))
                bar.update(len(asked))
                used = used.after(1, len(asked), time.perf_counter() - started)
        return [Deduced(text, tuple(examples)) for text, examples in examples_of.items()], used

    def propose(self) -> list[str]:
        """Initial induction: what the bare base says of each seen task's examples, and the seen
        wordings; each text once."""
        rng = random.Random(f"{self.setting.seed} itd proposals")
        seen = self.setting.splits.seen
        shown = [
            draw(task.train, rng.randint(1, 5), f"{self.setting.seed} {i} {task.id}")
            for task in seen
            for i in range(self.recipe.proposals_per_task)
        ]
        prompts = [self.base.prompts.decoder_prompt(row) for row in shown]
        length = self.base.config.evaluation.max_instruction_tokens
        induced: list[str | None] = []
        with tqdm(
            desc=f"{self.name}: initial inductions", total=len(prompts), mininterval=5
        ) as bar:
            for start in range(0, len(prompts), _ANSWERED_BETWEEN_LOOKS):
                some = prompts[start : start + _ANSWERED_BETWEEN_LOOKS]
                induced += self.base.generate(some, length)
                bar.update(len(some))
        wordings = [wording for task in seen for wording in task.wordings]
        return list(dict.fromkeys([*wordings, *(text for text in induced if text)]))

    @torch.no_grad()
    def induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        """Tasks that show equally many examples are decoded together."""
        instructions, num_beams = [""] * len(shown), self.recipe.num_beams
        num_tokens, costs = (
            self.base.config.evaluation.max_instruction_tokens,
            self.base.task_llm.language_model.costs,
        )
        for size in sorted({len(row) for row in shown}):
            tasks = [t for t, row in enumerate(shown) if len(row) == size]
            widths = [max(map(self._width, shown[t])) for t in tasks]
            for batch in budget.row_batches(
                widths,
                budget.bytes_free(self.base.device),
                lambda width, size=size: (  # type: ignore[misc]
                    size * num_beams * costs.decoded_row(width, num_tokens, chooses_greedily=False)
                ),
            ):
                chunk = [tasks[place] for place in batch]
                for t, text in zip(chunk, self._induce([shown[t] for t in chunk]), strict=True):
                    instructions[t] = text
        return instructions

    def _width(self, example: Example) -> int:
        return len(self.base.prompts.decoder_prompt([example]))

    def _induce(self, shown: Sequence[Sequence[Example]]) -> list[str]:
        prompts, adapter, evaluation = self.base.prompts, self.module(), self.base.config.evaluation
        conditions = [[prompts.decoder_prompt([example]) for example in row] for row in shown]
        beams = group_beams(
            self.base, adapter, conditions, self.recipe.num_beams, evaluation.max_instruction_tokens
        )
        candidates = [(t, text) for t, texts in enumerate(beams) for text in dict.fromkeys(texts)]
        given = (
            self.base.log_likelihoods(
                adapter,
                [prompt for t, _ in candidates for prompt in conditions[t]],
                [text for t, text in candidates for _ in conditions[t]],
            )
            .view(len(candidates), -1)
            .sum(1)
        )
        nothing = [prompts.decoder_prompt(())] * len(candidates)
        prior = self.base.log_likelihoods(adapter, nothing, [text for _, text in candidates])
        scores = (given - (len(shown[0]) - 1) * prior).tolist()
        # the best one of each task last, so it stays
        ranked = sorted(zip(scores, candidates, strict=True))
        best = {t: text for _, (t, text) in ranked}
        return [best[t] for t in range(len(shown))]


def _in_turn(texts: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Without end, all of them in a new order each time: every instruction gets as many examples as
    the others."""
    while True:
        yield from rng.sample(texts, len(texts))
