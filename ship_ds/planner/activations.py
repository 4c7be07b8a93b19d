"""Activations a rank holds when the backward pass begins, counted by running the real forward on
the meta device.

Autograd hands every tensor that it keeps to a hook, and the storages are counted once each, so the
count follows the code of the model family and of the adapters, whatever they are.

Letters: T tasks, E = T*M examples, S length, P soft tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.config import Config
from ship_ds.data.files import FilesConfig
from ship_ds.loss import sum_cross_entropy
from ship_ds.model.adapters import AdaptedBlock, Adapter, LoraAdapter, SoftPrompt
from ship_ds.model.encoder import Posterior
from ship_ds.planner.shapes import Shapes, hidden_size

Lengths = tuple[int | None, int | None, int | None]
"""Tokens of an instruction, an input and a target; None: the recipe's truncation limits."""
_RULES = (10, 30, 12)
"""Tokens of an instruction, an input and a target in the generated world."""


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
        limits = _RULES
        if isinstance(config.data, FilesConfig):
            cuts = config.data.truncation
            limits = (
                cuts.instruction.tokens or 256,
                cuts.input.tokens or 512,
                cuts.target.tokens or 128,
            )
        instruction, text, target = (
            asked or limit for asked, limit in zip(tokens, limits, strict=True)
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
        stated = self.instruction_tokens if shapes.config.task_llm.instruction != "none" else 0
        return (
            shapes.hypernetwork.num_virtual_tokens + stated + self.input_tokens + self.target_tokens
        )

    def decoded_length(self, shapes: Shapes) -> int:
        shown = self.shown_examples * (self.input_tokens + self.target_tokens)
        return shapes.config.decoder.num_soft_tokens + shown + self.instruction_tokens

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
    count = _Count(shapes)
    with torch.device("meta"):
        return count.run(work)


class _Count:
    """Walks once through SHIP's forward."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.dtype_bytes = shapes.dtype.itemsize
        self.known: dict[int, Any] = {}
        self.total = 0
        self.remember(
            parameter for module in shapes.parts.values() for parameter in module.parameters()
        )

    def remember(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the storages that are new among these; they are kept alive, so that no address
        comes twice."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known[storage._cdata] = storage
                total += storage.nbytes()
        self.total += total
        return total

    def kept_by(self, run: Callable[[], Any]) -> tuple[Any, int]:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += self.remember([tensor])
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run()
        return out, total

    def run(self, work: Workload) -> Activations:
        shapes, kept = self.shapes, {}
        latent_TZ, kept["encoder"] = self.kept_by(lambda: self.encode(work))
        adapter, kept["hypernetwork"] = self.kept_by(lambda: shapes.hypernetwork(latent_TZ))
        adapters = self.remember(_generated(adapter))
        (task_logits, blocks), kept["task LLM"] = self.kept_by(lambda: self.answer(adapter, work))
        text_logits, kept["decoder"] = self.kept_by(lambda: self.decode(latent_TZ, work))
        if shapes.config.task_llm.checkpointing:
            # The backward pass has freed the decoder's by the time that a block is recomputed.
            inputs = (
                len(blocks)
                * work.examples
                * work.answer_length(shapes)
                * hidden_size(shapes.task_lm)
                * self.dtype_bytes
            )
            kept["task LLM"] += inputs - sum(blocks) + max(0, max(blocks) - kept["decoder"])
        logits, heaviest = 0, 0
        for logits_KV in (task_logits, text_logits):
            labels_K = torch.zeros(len(logits_KV), dtype=torch.long)
            logits += self.kept_by(lambda: sum_cross_entropy(logits_KV, labels_K))[1]  # noqa: B023 (called at once)
            heaviest = max(heaviest, logits_KV.numel())
        working = heaviest * (4 + self.dtype_bytes) + self.block_working(work)
        return Activations(kept, adapters, logits, working)

    def encode(self, work: Workload) -> Tensor:
        shapes = self.shapes
        hidden_TSH = self.embedded(shapes.encoder.lm, work.tasks, work.instruction_tokens)
        hidden_TSH = self.through(shapes.encoder.lm.model, hidden_TSH).last_hidden_state  # type: ignore[arg-type]
        mean_TZ, raw_TZ = shapes.encoder.head(hidden_TSH[:, -1]).float().chunk(2, dim=-1)
        posterior = Posterior(mean_TZ, raw_TZ - 5.0)
        shapes.ship.prior.kl(posterior.mean_TZ, posterior.log_variance_TZ).mean(1).sum()
        return posterior.sample(torch.zeros_like(mean_TZ))

    def decode(self, latent_TZ: Tensor, work: Workload) -> Tensor:
        decoder = self.shapes.decoder
        soft_TPH = decoder.soft_tokens(latent_TZ, torch.zeros(work.tasks, dtype=torch.bool))
        rest = self.embedded(
            decoder.lm, work.tasks, work.decoded_length(self.shapes) - decoder.num_soft_tokens
        )
        return self.logits(
            decoder.lm, torch.cat([soft_TPH.to(rest.dtype), rest], 1), work.instruction_tokens
        )

    def answer(self, adapter: Adapter, work: Workload) -> tuple[Tensor, list[int]]:
        """Logits, and the bytes that each block keeps."""
        shapes = self.shapes
        hidden_ESH = self.embedded(shapes.task_lm, work.examples, work.answer_length(shapes))
        virtual_TPH = adapter.virtual_tokens()
        if virtual_TPH is not None:
            rows_EPH = virtual_TPH.repeat_interleave(work.examples_per_task, 0).to(hidden_ESH.dtype)
            hidden_ESH = torch.cat([rows_EPH, hidden_ESH[:, rows_EPH.shape[1] :]], 1)
        blocks: list[int] = []
        logits = self.logits(
            shapes.task_lm, hidden_ESH, work.target_tokens, ship_adapter=adapter, block_bytes=blocks
        )
        return logits, blocks

    def embedded(self, lm: Any, rows: int, length: int) -> Tensor:
        return torch.zeros(rows, length, hidden_size(lm), dtype=self.shapes.dtype)

    def logits(self, lm: nn.Module, hidden_ESH: Tensor, num_labels: int, **extra: Any) -> Tensor:
        """(K, V), of the last `num_labels` positions of each row."""
        logits: Tensor = self.through(lm, hidden_ESH, logits_to_keep=num_labels, **extra).logits
        return logits.flatten(0, 1)

    def through(
        self, lm: nn.Module, hidden_ESH: Tensor, block_bytes: list[int] | None = None, **extra: Any
    ) -> Any:
        """A mask of four dimensions: transformers would compute one, and look into it."""
        rows, length, _ = hidden_ESH.shape
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool)
        hooks = [] if block_bytes is None else self.watch_blocks(lm, block_bytes)
        out = lm(
            inputs_embeds=hidden_ESH,
            attention_mask=mask,
            position_ids=torch.arange(length)[None],
            use_cache=False,
            **extra,
        )
        for hook in hooks:
            hook.remove()
        return out

    def watch_blocks(self, lm: nn.Module, block_bytes: list[int]) -> list[Any]:
        """Append what each block keeps, inside `kept_by`."""
        before: list[int] = []
        hooks: list[Any] = []
        for block in (module for module in lm.modules() if isinstance(module, AdaptedBlock)):
            hooks.append(block.register_forward_pre_hook(lambda *_: before.append(self.total)))
            hooks.append(
                block.register_forward_hook(lambda *_: block_bytes.append(self.total - before[-1]))
            )
        return hooks

    def block_working(self, work: Workload) -> int:
        """Beside what is kept: one matrix dequantised, and the gradients inside one feed-forward
        layer."""
        blocks = [
            linear
            for lm in (self.shapes.task_lm, self.shapes.decoder.lm)
            for linear in _block_linears(lm)
        ]
        widest = max(max(linear.in_features, linear.out_features) for linear in blocks)
        tokens = max(work.tokens(self.shapes).values())
        return self.dtype_bytes * (
            max(linear.weight.numel() for linear in blocks) + 3 * tokens * widest
        )


def _block_linears(lm: Any) -> list[nn.Linear]:
    head = lm.get_output_embeddings()
    return [
        module for module in lm.modules() if isinstance(module, nn.Linear) and module is not head
    ]


def _generated(adapter: Adapter) -> list[Tensor]:
    match adapter:
        case LoraAdapter():
            return [factor for factors in adapter.factors.values() for factor in factors]
        case SoftPrompt():
            return [adapter.prompt_TPH]
        case _:
            raise AssertionError(f"{type(adapter).__name__} has no count of its weights yet")
