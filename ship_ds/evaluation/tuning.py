"""`ship-ds tune`: one LoRA trained by gradient on labelled examples of one task, from the adapter
that the hypernetwork makes of an instruction, or from where `peft` starts one. Of a combination the
LoRA is trained, and what else was made of the instruction stays as it is.

The loop is that of the baselines (baselines/fitting.py), over the run's own frozen base.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ship_ds.api import Pair, Ship
from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.evaluation.baselines.fitting import DevCurve, fit
from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.evaluation.baselines.oracles import draw
from ship_ds.evaluation.baselines.static_adapters import TaskLoras
from ship_ds.evaluation.budgets import Steps
from ship_ds.inference import checks
from ship_ds.model.adapters.adapter import Adapter, Around
from ship_ds.origin import Tuning

_EXAMPLES_PER_STEP = 16
_MOST_LOOKS = 20
"""At the held-out examples, evenly over the steps, beside the one before the first."""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast. held_out_share: of the examples, which are never trained on."""

    steps: int
    lr: float
    held_out_share: float
    seed: int


@dataclass(frozen=True)
class Curve:
    """Losses in nats a target token.

    start: "generated" or "fresh". training: of each step. held_out: by the steps that were taken
    before; 0 is the start.
    """

    start: str
    training: tuple[float, ...]
    held_out: dict[int, float]

    @property
    def first(self) -> float:
        return self.held_out[0]

    @property
    def last(self) -> float:
        return self.held_out[len(self.training)]

    def steps_to(self, loss: float) -> int | None:
        """Steps before the first look at which the held-out loss is that or less; None: it never
        is."""
        return next((step for step, value in self.held_out.items() if value <= loss), None)

    def rows(self) -> list[dict[str, Any]]:
        """One a step, for JSON lines; a step without a look has null for its held-out loss."""
        return [
            {
                "start": self.start,
                "step": step,
                "training_loss": self.training[step - 1] if step else None,
                "held_out_loss": self.held_out.get(step),
            }
            for step in range(len(self.training) + 1)
        ]


@dataclass(frozen=True)
class Tuned:
    """What came out. fresh: the curve from the other start, where it was asked for."""

    adapter: Adapter
    recipe: Recipe
    curve: Curve
    fresh: Curve | None
    num_examples: int
    num_held_out: int

    def rows(self) -> list[dict[str, Any]]:
        """Of every curve, for JSON lines."""
        return [row for curve in (self.curve, self.fresh) if curve for row in curve.rows()]

    def summary(self) -> Tuning:
        """For ship.json."""
        return Tuning(
            start=self.curve.start,
            steps=self.recipe.steps,
            lr=self.recipe.lr,
            seed=self.recipe.seed,
            num_examples=self.num_examples,
            num_held_out=self.num_held_out,
            held_out_loss=(self.curve.first, self.curve.last),
        )


def tune(
    ship: Ship, instruction: str, pairs: Sequence[Pair], recipe: Recipe, with_fresh: bool = False
) -> Tuned:
    """Train the adapter of an instruction on examples.

    Args:
        ship: a run whose adapters are LoRAs, or combinations with one.
        instruction: whose generated adapter is the start.
        pairs: input and target of each example.
        recipe: how long and how fast.
        with_fresh: train a second one from `peft`'s start, on the same examples in the same order,
            with nothing beside it.

    Raises:
        UserError: the models cannot read the instruction or an example, or there are fewer than
            two examples.
        UserError: a loss is not finite.
    """
    checks.check_instruction(ship.model, instruction)
    examples = [Example(*pair) for pair in pairs]
    checks.check_examples(ship.model, examples, instruction)
    train, held_out = parted(examples, recipe.held_out_share, recipe.seed)
    base = FrozenBase.of_run(ship)
    with torch.no_grad():
        generated = ship.model.adapt(ship.model.encode([instruction]), [instruction])
    within = generated.lora_within()
    assert within is not None, "the verb refuses other kinds"
    start, with_rest = within
    lora = fresh_lora(base, recipe.seed)
    lora.start_at(start)

    def question(text: str) -> Sequence[int]:
        return ship.model.question(text, instruction)

    curve = train_lora(base, lora, question, train, held_out, recipe, "generated", with_rest)
    fresh = None
    if with_fresh:
        other = fresh_lora(base, recipe.seed)
        fresh = train_lora(base, other, question, train, held_out, recipe, "fresh")
    adapter = with_rest(lora.requires_grad_(False)())
    return Tuned(adapter, recipe, curve, fresh, len(train), len(held_out))


def parted(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Those that are trained on and those that are held out, at least one of each.

    Args:
        examples: of one task; one that is given again counts once, since it would lie on both
            sides.
        share: of them, that is held out, rounded to whole examples.
        seed: of the draw, and of the order of both.

    Returns:
        What is trained on, and what is held out.

    Raises:
        UserError: there are fewer than two inputs.
    """
    examples = list({example.input: example for example in examples}.values())
    if len(examples) < 2:
        raise UserError(
            "--data: has examples of one input; give two inputs or more, since some are held out"
        )
    order = random.Random(f"{seed} tune").sample(examples, len(examples))
    num_held_out = min(len(examples) - 1, max(1, round(share * len(examples))))
    return order[num_held_out:], order[:num_held_out]


def fresh_lora(base: FrozenBase, seed: int) -> TaskLoras:
    """A LoRA of the run's rank and sites where `peft` starts it: A uniform, B zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lora = TaskLoras(base.sites, base.lora)
    return lora.to(base.device)


def train_lora(
    base: FrozenBase,
    lora: TaskLoras,
    question: Callable[[str], Sequence[int]],
    train: Sequence[Example],
    held_out: Sequence[Example],
    recipe: Recipe,
    start: str,
    with_rest: Around = lambda lora: lora,
) -> Curve:
    """Train a LoRA in place.

    Args:
        base: whose Task LLM it adapts.
        lora: of one task.
        question: an input's prompt, as token ids.
        train: what is trained on, in an order that the recipe's seed gives.
        held_out: what is looked at on the way.
        recipe: how long and how fast.
        start: what the curve is called.
        with_rest: what stands beside the LoRA all the while.

    Raises:
        UserError: a loss is not finite.
    """
    soft = with_rest(lora()).virtual_tokens()
    num_virtual = 0 if soft is None else soft.shape[1]

    def losses(some: Sequence[Example], adapter: Any) -> Iterator[Tensor]:
        prompts = [question(example.input) for example in some]
        targets = [example.target for example in some]
        return base.losses(adapter, [prompts], [targets], num_virtual)

    @torch.no_grad()
    def held_out_loss() -> float:
        adapter = with_rest(lora())
        return float(sum(losses(held_out, adapter), torch.zeros((), device=base.device)))

    def losses_at(step: int) -> Iterator[Tensor]:
        count = min(_EXAMPLES_PER_STEP, len(train))
        some = draw(train, count, f"{recipe.seed} tune {step}")
        return losses(some, lambda tasks: with_rest(lora()))

    title = f"tune, {start} start"
    dev_curve = DevCurve(
        lambda: -held_out_loss(),  # a look's score is to rise
        min(recipe.steps, _MOST_LOOKS),
        every=1,
        in_words=lambda best: f"least loss held out {-best:.3f}",
    )
    first = held_out_loss()
    training = fit(
        lora.parameters(), losses_at, Steps(recipe.steps), recipe.lr, title, dev_curve=dev_curve
    )
    held_out_losses = {
        point.step: -point.dev for point in dev_curve.curves[title] if point.dev is not None
    }
    return Curve(start, tuple(training), {0: first, **held_out_losses})
