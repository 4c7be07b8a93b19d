"""One way into every transformers causal LM: embed, insert soft tokens, run, logits only where there is a label.

Letters: E sequences, S padded length, N packed tokens, K labelled positions, V vocabulary, P soft tokens, H hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.model.adapters import Adapter
from ship_ds.model.batch import IGNORE, TokenBatch


def embed(model: nn.Module, ids: Tensor, slots: Tensor, soft: Tensor | None) -> Tensor:
    """Token embeddings (..., H) with soft (E, P, H), in order, written into the reserved slots."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    hidden: Tensor = embedding(ids)
    if soft is None:
        return hidden
    return hidden.masked_scatter(slots[..., None].expand_as(hidden), soft.to(hidden.dtype))


def label_logits(
    model: nn.Module, batch: TokenBatch, soft: Tensor | None = None, adapter: Adapter | None = None, *,
    packed: bool = False, checkpointing: bool = False, num_tasks: int = 1, model_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (K, V) that predict the batch's labels, and those labels (K,), in row-major order.

    soft: (E, P, H) embeddings for the reserved slots. packed: one sequence of all real tokens, isolated by positions.
    """
    extra: dict[str, Any] = dict(model_kwargs or {})
    if adapter is not None:
        extra |= {"ship_adapter": adapter.over(batch.task_offsets(num_tasks) if packed else None)}
    if checkpointing:
        extra |= {"ship_checkpoint": True}
    hidden = embed(model, batch.ids_ES, batch.slots_ES, soft)
    predicts_ES = torch.zeros_like(batch.labels_ES, dtype=torch.bool)
    predicts_ES[:, :-1] = batch.labels_ES[:, 1:] != IGNORE
    labels_K = batch.labels_ES[batch.labels_ES != IGNORE]
    if packed:
        real_ES = batch.real_ES
        positions = torch.arange(batch.ids_ES.shape[1], device=hidden.device).expand_as(real_ES)[real_ES]
        keep = predicts_ES[real_ES].nonzero()[:, 0]
        out = model(
            inputs_embeds=hidden[real_ES][None], position_ids=positions[None], logits_to_keep=keep, use_cache=False, **extra
        )
        return out.logits[0], labels_K
    columns = predicts_ES.any(0).nonzero()[:, 0]
    out = model(inputs_embeds=hidden, logits_to_keep=columns, use_cache=False, **extra)
    return out.logits[predicts_ES[:, columns]], labels_K


@torch.no_grad()
def greedy(
    model: nn.Module, prompts: TokenBatch, soft: Tensor | None, adapter: Adapter | None, eos_id: int, max_new_tokens: int,
    any_unfinished: Any = bool,
) -> list[list[int]]:
    """Greedy continuations with a KV cache, each up to and including its first end-of-sequence token.

    `any_unfinished(flag)` agrees over ranks whether to go on, so that ranks that share sharded weights stay in step.
    """
    lengths_E, width = prompts.lengths_E, prompts.ids_ES.shape[1]
    shift_E = width - lengths_E
    order_ES = (torch.arange(width, device=lengths_E.device)[None] - shift_E[:, None]) % width
    mask_ES = (torch.arange(width, device=lengths_E.device)[None] >= shift_E[:, None]).long()
    hidden = embed(model, prompts.ids_ES, prompts.slots_ES, soft)
    hidden = hidden.gather(1, order_ES[..., None].expand_as(hidden))
    positions = (mask_ES.cumsum(1) - 1).clamp(min=0)
    extra: dict[str, Any] = {} if adapter is None else {"ship_adapter": adapter}
    out = model(inputs_embeds=hidden, attention_mask=mask_ES, position_ids=positions, use_cache=True, logits_to_keep=1, **extra)
    cache, tokens = out.past_key_values, []
    done_E = torch.zeros_like(lengths_E, dtype=torch.bool)
    next_E = out.logits[:, -1].argmax(-1)
    for step in range(max_new_tokens):
        tokens.append(torch.where(done_E, eos_id, next_E))
        done_E = done_E | (next_E == eos_id)
        if step == max_new_tokens - 1 or not any_unfinished(not bool(done_E.all())):
            break
        mask_ES = torch.cat([mask_ES, torch.ones_like(mask_ES[:, :1])], 1)
        out = model(
            input_ids=tokens[-1][:, None], attention_mask=mask_ES, position_ids=(lengths_E + step)[:, None],
            past_key_values=cache, use_cache=True, **extra,
        )
        next_E = out.logits[:, -1].argmax(-1)
    rows = torch.stack(tokens, 1).tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]
