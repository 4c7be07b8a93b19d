"""Activations a rank holds when the backward pass begins, counted by running the real forward on
the meta device.

Autograd hands every tensor that it keeps to a hook, and the storages are counted once each, so the
count follows the code of the model family and of the adapters, whatever they are.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.config import Config
from ship_ds.data.source import source_of
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.adapters.sites import AdaptedBlock
from ship_ds.model.batch import TokenBatch
from ship_ds.model.step import ShipBatch
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
        in_prompt = self.instruction_tokens if shapes.config.task_llm.instruction != "none" else 0
        return shapes.ship.num_virtual_tokens + in_prompt + self.input_tokens + self.target_tokens

    def decoded_length(self, shapes: Shapes) -> int:
        examples = self.shown_examples * (self.input_tokens + self.target_tokens)
        return shapes.config.decoder.num_soft_tokens + examples + self.instruction_tokens

    def tokens(self, shapes: Shapes) -> dict[str, int]:
        """Of each part that runs over tokens."""
        return {
            "encoder": self.tasks * self.instruction_tokens,
            "decoder": self.tasks * self.decoded_length(shapes),
            "task LLM": self.examples * self.answer_length(shapes),
        }


@dataclass(frozen=True)
class Activations:
    """Bytes. kept: by the parts, adapters and logits apart; adapters: the generated weights,
    without their gradients;
    logits: the log-probabilities kept for the loss; working: of the heaviest moment beside
    these."""

    kept: dict[str, int]
    adapters: int
    logits: int
    working: int


@lru_cache(maxsize=16)
def count_activations(shapes: Shapes, work: Workload) -> Activations:
    """By one forward of the very model that trains, on the device of its weights: the meta device
    in a plan, a real one where a benchmark compares the two."""
    return _Count(shapes, work).run()


def planned_batch(shapes: Shapes, work: Workload) -> ShipBatch:
    """A micro-batch without texts: every row as long as it may be."""
    device = shapes.ship.device
    ship, tasks = shapes.ship, work.tasks
    num_virtual, num_soft = ship.num_virtual_tokens, shapes.config.decoder.num_soft_tokens
    question_length = work.answer_length(shapes) - num_virtual - work.target_tokens
    decoder_prompt_length = work.decoded_length(shapes) - num_soft - work.instruction_tokens
    batch = ShipBatch(
        TokenBatch.of_lengths(tasks, work.instruction_tokens, 0, 0, device),
        TokenBatch.of_lengths(
            work.examples, question_length, work.target_tokens, num_virtual, device
        ),
        TokenBatch.of_lengths(
            tasks, decoder_prompt_length, work.instruction_tokens, num_soft, device
        ),
        torch.zeros(tasks, dtype=torch.bool, device=device),
        torch.zeros(tasks, shapes.config.latent_size, device=device),
    )
    for name, objective in ship.objectives.items():
        extra = objective.prepare_shapes(batch)
        if extra is not None:
            batch = batch.with_extra(name, extra)
    return batch


class _Count:
    """Walks once through SHIP's forward and notes which part autograd keeps a tensor for."""

    def __init__(self, shapes: Shapes, work: Workload) -> None:
        self.shapes, self.work = shapes, work
        self.storages: dict[int, Any] = {}
        self.kept = dict.fromkeys(shapes.parts, 0)
        self.part: str | None = None
        self.logits = self.adapters = self.heaviest_logits = 0
        self.blocks: list[int] = []
        for module in shapes.parts.values():
            self.new_bytes(module.parameters())

    def run(self) -> Activations:
        """The forward, and what it left."""
        hooks = [*self._watch_parts(), *self._watch_blocks()]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                self.shapes.ship(planned_batch(self.shapes, self.work))
        finally:
            for hook in hooks:
                hook.remove()
        if self.shapes.config.task_llm.checkpointing:
            self.kept["task LLM"] += self._checkpointed() - sum(self.blocks)
        working = self.heaviest_logits * (4 + self.shapes.dtype.itemsize) + self._block_working()
        return Activations(self.kept, self.adapters, self.logits, working)

    def new_bytes(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the storages that are new among these; they are kept alive, so that no address
        comes twice."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.storages:
                self.storages[storage._cdata] = storage
                total += storage.nbytes()
        return total

    def _pack(self, tensor: Tensor) -> Tensor:
        num_bytes = self.new_bytes([tensor])
        if self.part is None:
            self.logits += num_bytes
        else:
            self.kept[self.part] += num_bytes
        return tensor

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
            yield module.register_forward_hook(self._after_logits)

    def _enter(self, part: str, *_: Any) -> None:
        self.part = part

    def _after_hypernetwork(self, module: nn.Module, inputs: Any, adapter: Adapter) -> None:
        self.adapters = self.new_bytes(adapter.tensors().values())

    def _after_logits(self, module: nn.Module, inputs: Any, out: tuple[Tensor, Tensor]) -> None:
        self.part = None
        self.heaviest_logits = max(self.heaviest_logits, out[0].numel())

    def _watch_blocks(self) -> Iterator[Any]:
        """Append what each block of the Task LLM keeps."""
        before: list[int] = []
        kept = self.kept
        for block in (
            m for m in self.shapes.ship.task_llm.modules() if isinstance(m, AdaptedBlock)
        ):
            yield block.register_forward_pre_hook(lambda *_: before.append(kept["task LLM"]))
            yield block.register_forward_hook(partial(self._after_block, before))

    def _after_block(self, before: list[int], *_: Any) -> None:
        # A pass without gradient, such as a teacher's, keeps nothing and is not recomputed.
        if torch.is_grad_enabled():
            self.blocks.append(self.kept["task LLM"] - before[-1])

    def _checkpointed(self) -> int:
        """Each block's input, and one block recomputed, less what the backward pass has freed of
        the decoder by then."""
        tokens = self.work.tokens(self.shapes)["task LLM"]
        hidden_size = self.shapes.ship.task_llm.language_model.hidden_size
        inputs = len(self.blocks) * tokens * hidden_size * self.shapes.dtype.itemsize
        return inputs + max(0, max(self.blocks) - self.kept["decoder"])

    def _block_working(self) -> int:
        """Beside what is kept: one matrix dequantised, and the gradients inside one feed-forward
        layer."""
        ship = self.shapes.ship
        linears = [
            linear
            for role in (ship.task_llm, ship.decoder)
            for linear in role.language_model.linears().values()
        ]
        widest = max(max(linear.in_features, linear.out_features) for linear in linears)
        tokens = max(self.work.tokens(self.shapes).values())
        largest = max(linear.weight.numel() for linear in linears)
        return self.shapes.dtype.itemsize * (largest + 3 * tokens * widest)
