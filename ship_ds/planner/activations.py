"""Activations that a rank holds at the end of the forward pass and at its heaviest moment, counted
by running the real forward and backward on the meta device.

Every storage is counted from the operation that makes it until nothing holds it any more, so the
count follows the code of the model family, of the adapters and of checkpointing, whatever they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.config import Config
from ship_ds.data.source import source_of
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.batch import TokenBatch
from ship_ds.model.step import ShipBatch
from ship_ds.planner.live_bytes import LiveBytes
from ship_ds.planner.shapes import Shapes

Lengths = tuple[int | None, int | None, int | None]
"""Tokens of an instruction, an input and a target; None: the recipe's truncation limits."""


@dataclass(frozen=True)
class Workload:
    """A micro-batch of one rank, every text as long as it may be: the peak, not the mean."""

    tasks: int
    examples_per_task: int
    instruction_tokens: int
    input_tokens: int
    target_tokens: int
    shown_examples: int

    @classmethod
    def of(cls, config: Config, tasks: int, tokens: Lengths = (None, None, None)) -> "Workload":
        """A micro-batch of this run.

        Args:
            config: of the run.
            tasks: how many it has.
            tokens: of an instruction, an input and a target; None: as many as the run's task source
                allows.
        """
        instruction, text, target = (
            given or limit
            for given, limit in zip(tokens, source_of(config.data).lengths(), strict=True)
        )
        return cls(
            tasks,
            config.training.examples_per_task,
            instruction,
            text,
            target,
            config.model.decoder.max_examples,
        )

    @property
    def examples(self) -> int:
        return self.tasks * self.examples_per_task

    def answer_length(self, shapes: Shapes) -> int:
        task_llm = shapes.config.task_llm
        is_stated = task_llm.instruction != "none" or task_llm.fading_steps
        in_prompt = self.instruction_tokens if is_stated else 0
        return shapes.ship.num_virtual_tokens + in_prompt + self.input_tokens + self.target_tokens

    def read_length(self, shapes: Shapes) -> int:
        """Of what the encoder reads: the instruction with as many examples as may be shown."""
        examples = shapes.config.encoder.max_examples * (self.input_tokens + self.target_tokens)
        return self.instruction_tokens + examples

    def decoded_length(self, shapes: Shapes) -> int:
        examples = self.shown_examples * (self.input_tokens + self.target_tokens)
        return shapes.config.decoder.num_soft_tokens + examples + self.instruction_tokens

    def tokens(self, shapes: Shapes) -> dict[str, int]:
        """Of each part that runs over tokens."""
        return {
            "encoder": self.tasks * self.read_length(shapes),
            "decoder": self.tasks * self.decoded_length(shapes),
            "task LLM": self.examples * self.answer_length(shapes),
        }


@dataclass(frozen=True)
class Activations:
    """Bytes. kept: by the parts when the forward ends, adapters and logits apart; adapters: the
    generated weights; logits: what the loss keeps of them; working: what the heaviest moment of
    forward and backward needs beside these, recomputed blocks and gradients included."""

    kept: dict[str, int]
    adapters: int
    logits: int
    working: int

    @property
    def at_end_of_forward(self) -> int:
        """What is held before the backward pass begins."""
        return sum(self.kept.values()) + self.adapters + self.logits

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return self.at_end_of_forward + self.working


@lru_cache(maxsize=16)
def count_activations(shapes: Shapes, work: Workload, is_zero3: bool = False) -> Activations:
    """By one forward and backward of the very model that trains, on the device of its weights: the
    meta device in a plan, a real one where a test compares the two.

    Args:
        shapes: of the model.
        work: a micro-batch of one rank.
        is_zero3: trained weights are sharded (`ShipModel.reads_together`).
    """
    models = shapes.shallow or (shapes,)
    counts = [_Count(one, work).run(is_zero3) for one in models]
    return _of_all_layers(shapes, *counts) if shapes.shallow else counts[0]


def _of_all_layers(shapes: Shapes, two: Activations, four: Activations) -> Activations:
    """What grows with the layers goes on growing as it did between two and four.

    `working` does not: it is what the heaviest moment needs beside all that is kept, which is at
    most as much as where little is kept.
    """

    def grown(part: str, few: int, more: int) -> int:
        return extrapolated(shapes, part, few, more)

    return Activations(
        {part: grown(part, two.kept[part], four.kept[part]) for part in four.kept},
        grown("task LLM", two.adapters, four.adapters),
        grown("task LLM", two.logits, four.logits),
        four.working,
    )


def extrapolated(shapes: Shapes, part: str, few: int, more: int) -> int:
    """Bytes of a part with all its layers, from those of the two shallow models.

    Args:
        shapes: of the deep model.
        part: what has no layers of its own grows with the Task LLM's.
        few, more: its bytes in the two.
    """
    layers = [one.depths.get(part, one.depths["task LLM"]) for one in (*shapes.shallow, shapes)]
    first, second, all_layers = layers
    if first == second:
        return more
    return more + (more - few) * (all_layers - second) // (second - first)


def planned_batch(shapes: Shapes, work: Workload) -> ShipBatch:
    """A micro-batch without texts: every row as long as it may be."""
    device = shapes.ship.device
    ship, tasks = shapes.ship, work.tasks
    num_virtual, num_soft = ship.num_virtual_tokens, shapes.config.decoder.num_soft_tokens
    question_length = work.answer_length(shapes) - num_virtual - work.target_tokens
    decoder_prompt_length = work.decoded_length(shapes) - num_soft - work.instruction_tokens
    batch = ShipBatch(
        TokenBatch.of_lengths(tasks, work.read_length(shapes), 0, 0, device),
        TokenBatch.of_lengths(
            work.examples, question_length, work.target_tokens, num_virtual, device
        ),
        TokenBatch.of_lengths(
            tasks, decoder_prompt_length, work.instruction_tokens, num_soft, device
        ),
        torch.zeros(tasks, dtype=torch.bool, device=device),
        torch.zeros(tasks, shapes.config.latent_size, device=device),
        torch.ones(tasks, device=device),
    )
    for name, objective in ship.objectives.items():
        extra = objective.prepare_shapes(batch)
        if extra is not None:
            batch = batch.with_extra(name, extra)
    return batch


class _Count:
    """Walks once through SHIP's forward and backward and puts down what is alive to the parts."""

    def __init__(self, shapes: Shapes, work: Workload) -> None:
        self.shapes, self.work = shapes, work
        parameters = [p for module in shapes.parts.values() for p in module.parameters()]
        self.trained = [p for p in parameters if p.requires_grad]
        self.live = LiveBytes([*parameters, *shapes.ship.buffers()])
        self.adapters = 0

    def run(self, is_zero3: bool) -> Activations:
        """The step, and what it held."""
        batch = planned_batch(self.shapes, self.work)
        hooks = [*self._watch_parts(), *self._drop_gradients()]
        self.shapes.ship.plans_shards = is_zero3
        try:
            with self.live:
                sums = list(self.shapes.ship(batch).objectives.values())
                kept = self._kept()
                # Unweighted: weights scale gradients and change no storage.
                torch.stack(sums).sum().backward()
        finally:
            # The same shapes are counted again, sharded or not.
            self.shapes.ship.plans_shards = False
            for hook in hooks:
                hook.remove()
        logits = kept.pop("logits")
        held = sum(kept.values()) + self.adapters + logits
        return Activations(kept, self.adapters, logits, max(0, self.live.peak - held))

    def _kept(self) -> dict[str, int]:
        totals = self.live.by_part()
        kept = {part: totals.get(part, 0) for part in (*self.shapes.parts, "logits")}
        # Made within the hypernetwork's forward, and a line of their own.
        kept["hypernetwork"] -= self.adapters
        return kept

    def _watch_parts(self) -> Iterator[Any]:
        """What comes between two parts counts to the earlier one, what follows a language model
        that gives logits to these."""
        ship = self.shapes.ship
        modules = {
            "encoder": ship.encoder,
            "hypernetwork": ship.hypernetwork,
            "task LLM": ship.task_llm,
            "decoder": ship.decoder,
        }
        for name, module in modules.items():
            yield module.register_forward_pre_hook(partial(self._enter, name))
        yield ship.hypernetwork.register_forward_hook(self._after_hypernetwork)
        for module in (ship.task_llm, ship.decoder):
            yield module.register_forward_hook(partial(self._enter, "logits"))

    def _enter(self, part: str, *_: Any) -> None:
        self.live.part = part

    def _after_hypernetwork(self, module: nn.Module, inputs: Any, adapter: Adapter) -> None:
        self.adapters = self.live.made_by("hypernetwork", adapter.tensors().values())

    def _drop_gradients(self) -> Iterator[Any]:
        """A trained weight's gradient goes into DeepSpeed's buckets, which are counted apart."""
        for parameter in self.trained:
            yield parameter.register_post_accumulate_grad_hook(_drop_gradient)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
