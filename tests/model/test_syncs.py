"""A micro-step never makes the host wait for the GPU, found without one.

On the meta device there are shapes and no data: whatever would read a size or a value from a tensor
raises, and so does an operation between a tensor there and one on the host, or of two types. What
runs through there waits for nothing, forgets no tensor on the host, and stays in 16 bits.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ship_ds.config import (
    AttentionPooling,
    EncoderConfig,
    FlowPriorConfig,
    LoraHypernetworkConfig,
    LossConfig,
    MixturePriorConfig,
    ModelConfig,
    TaskLlmConfig,
)
from ship_ds.data.sampler import TaskDraw
from ship_ds.data.task import Example
from ship_ds.model import attention
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.attention import SDPA, VARLEN
from ship_ds.model.language_model import auto_class
from ship_ds.model.loading import load_tokenizer
from ship_ds.planner.shapes import MetaWeights, base_config
from ship_ds.prompt import PromptFormat

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(
    latent_size=16,
    task_llm=TaskLlmConfig(quantisation="none", checkpointing=True),
    hypernetwork=LoraHypernetworkConfig(rank=2, width=8),
)
POOLED = CONFIG.model_copy(
    update={"encoder": EncoderConfig(base=CONFIG.encoder.base, pooling=AttentionPooling())}
)
"""The encoder reads all positions."""
CHUNKED = CONFIG.model_copy(
    update={"encoder": EncoderConfig(base=CONFIG.encoder.base, chunk_tokens=4)}
)
"""It reads texts in pieces."""
PLAIN = LossConfig()
EVERYTHING = LossConfig.model_validate(
    {"kl": {"free_bits": 0.1, "warmup_steps": 3}, "distillation": 0.5, "contrastive": 0.1}
)
CASES = {
    "last": (CONFIG, PLAIN),
    "attention": (POOLED, PLAIN),
    "chunks": (CHUNKED, PLAIN),
    "by answer": (CONFIG, LossConfig.model_validate({"task": {"mean_over": "answers"}})),
    "mixture": (CONFIG.model_copy(update={"prior": MixturePriorConfig()}), EVERYTHING),
    "flow": (CONFIG.model_copy(update={"prior": FlowPriorConfig()}), EVERYTHING),
}


def _draws() -> list[TaskDraw]:
    """Two tasks, whose rows are of many lengths."""
    texts = ("3 9 5", "1 2 6 1 7 2 8", "8", "4 4 0 3")
    examples = [Example(text, text) for text in texts]
    return [
        TaskDraw("a", "keep the numbers above 4", tuple(examples[:2]), (examples[2],), True, "ab"),
        TaskDraw("b", "put 7 at the front", tuple(examples[2:]), (examples[0],), False),
    ]


class TextsOnMeta(MetaWeights):
    """Shapes with a tokenizer, under one of the attentions of training."""

    def __init__(self, implementation: str) -> None:
        super().__init__(torch.bfloat16)
        self.implementation = implementation

    def language_model(self, base: str, quantisation: Any, sharded: bool) -> nn.Module:
        config = base_config(base)
        lm: nn.Module = auto_class(config).from_config(
            config, dtype=self.dtype, attn_implementation=self.implementation
        )
        return lm

    def prompts(  # type: ignore[override]
        self, base: str, system_message: str | None
    ) -> PromptFormat:
        with torch.device("cpu"):
            return PromptFormat(load_tokenizer(base), system_message)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("implementation", [SDPA, VARLEN])
def test_a_collated_bf16_step_runs_where_no_data_can_be_read(
    implementation: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts to gradients; with VARLEN through the GPU's very kernel, which knows its shapes."""
    config, loss = CASES[case]
    if implementation == VARLEN:
        monkeypatch.setattr(attention, "kernel_runs", lambda device, dtype: True)
    with torch.device("meta"):
        ship = build_ship(config, TextsOnMeta(implementation), loss).bfloat16()
    batch = ship.collate(_draws(), 0, 0)
    assert batch.answers.task_offsets(2) is not None, "the tasks have to be of unequal length"
    assert all(tensor.is_meta for tensor in batch._tensors())
    sums = ship(batch).objectives
    assert all(term.is_meta and term.dtype == torch.float32 for term in sums.values())
    sum(sums.values()).backward()  # type: ignore[union-attr]
    trained = [p for p in ship.parameters() if p.requires_grad]
    assert len(trained) > 50
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in trained)


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in masks)
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))


def _any_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Has the shape of attention and gives everything a gradient, and waits for nothing."""
    return query + key.mean(1, keepdim=True) + value.mean(1, keepdim=True)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("implementation", [SDPA, VARLEN])
def test_texts_to_gradients_wait_at_most_three_times(
    implementation: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, loss = CASES[case]
    ship = build_ship(config, LoadedWeights(), loss)
    if implementation == VARLEN:
        monkeypatch.setattr(attention, "kernel_runs", lambda device, dtype: True)
        monkeypatch.setattr(attention, "varlen_attn", _any_attention)
        for role in (ship.encoder, ship.task_llm, ship.decoder):
            role.lm.config._attn_implementation = VARLEN
    with Waits() as waits:
        batch = ship.collate(_draws(), 0, 0)
        sum(ship(batch).objectives.values()).backward()  # type: ignore[union-attr]
    assert waits.operations.total() <= 3, waits.operations


def test_the_counter_counts() -> None:
    values = torch.arange(3.0)
    with Waits() as waits:
        values[values > 1].sum().item()
        values.nonzero()
    assert waits.operations == {"index": 1, "_local_scalar_dense": 1, "nonzero": 1}
