"""One way into every decoder-only transformers model: embed, insert virtual tokens, run, logits
only where there is a label.

Nothing here looks into a tensor: data are reached by the batch's index tensors, so that a forward
neither waits for a GPU nor needs data at all. On the meta device it gives the shapes.

Letters: E sequences, S padded length, N packed tokens, K labelled positions, V vocabulary,
P virtual tokens, H hidden size, X other letters flattened.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.model.adapters import Adapter
from ship_ds.model.batch import TokenBatch


def embed(
    model: nn.Module,
    batch: TokenBatch,
    soft: Tensor | None = None,
    instruction: Tensor | None = None,
) -> Tensor:
    """Embeddings (E, S, H) of a batch.

    Args:
        model: a transformers model.
        batch: what to embed.
        soft: (E, P, H), in the places of the virtual tokens.
        instruction: (E, instruction length, H), in place of the instruction's tokens.
    """
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    hidden_ESH: Tensor = embedding(batch.ids_ES)
    if soft is not None:
        assert soft.shape[1] == batch.num_virtual_tokens
        hidden_ESH = torch.cat([soft.to(hidden_ESH.dtype), hidden_ESH[:, soft.shape[1] :]], 1)
    if instruction is not None:
        hidden_XH = hidden_ESH.flatten(0, 1)
        values_XH = instruction.flatten(0, 1).to(hidden_ESH.dtype)
        hidden_ESH = hidden_XH.index_put((batch.instruction_X,), values_XH).view_as(hidden_ESH)
    return hidden_ESH


def hidden_states(model: nn.Module, batch: TokenBatch, embeddings_ESH: Tensor | None) -> Tensor:
    """The last layer's states (E, S, H) of right-padded rows.

    Args:
        model: a transformers model.
        batch: its tokens.
        embeddings_ESH: read in place of them; None: their own.
    """
    inputs: dict[str, Any] = (
        {"input_ids": batch.ids_ES} if embeddings_ESH is None else {"inputs_embeds": embeddings_ESH}
    )
    inputs |= _mask_without_data(batch.ids_ES, batch.ids_ES.shape[1])
    hidden: Tensor = model.model(**inputs, use_cache=False).last_hidden_state  # type: ignore[operator]
    return hidden


def label_logits(
    model: nn.Module,
    batch: TokenBatch,
    soft: Tensor | None = None,
    adapter: Adapter | None = None,
    *,
    instruction: Tensor | None = None,
    packed: bool = False,
    checkpointing: bool = False,
    num_tasks: int = 1,
) -> tuple[Tensor, Tensor]:
    """Logits (K, V) that predict the batch's labels, and those labels (K,), in row-major order.

    Args:
        model: a transformers model, its blocks wrapped if there is an adapter.
        batch: prompts with targets.
        soft: see `embed`.
        adapter: its rows are the batch's `num_tasks` tasks.
        instruction: see `embed`.
        packed: run one sequence of all tokens, isolated by their positions, instead of padded rows.
        checkpointing: recompute each block in the backward pass.
        num_tasks: T; each has E / T consecutive rows.
    """
    extra: dict[str, Any] = {"use_cache": False}
    if adapter is not None:
        extra["ship_adapter"] = adapter.over(batch.task_offsets(num_tasks) if packed else None)
    if checkpointing:
        extra["ship_checkpoint"] = True
    hidden_ESH = embed(model, batch, soft, instruction)
    if packed:
        extra |= _packed_inputs(hidden_ESH, batch)
        return model(**extra).logits[0], batch.labels_K
    extra |= _mask_without_data(hidden_ESH, hidden_ESH.shape[1])
    padded = batch.padded
    logits = model(inputs_embeds=hidden_ESH, logits_to_keep=padded.columns, **extra).logits
    return logits[padded.row_K, padded.place_K], batch.labels_K


def _packed_inputs(hidden_ESH: Tensor, batch: TokenBatch) -> dict[str, Any]:
    packed, longest = batch.packed, batch.ids_ES.shape[1]
    return {
        "inputs_embeds": hidden_ESH.flatten(0, 1)[packed.source_N][None],
        "position_ids": packed.position_N[None],
        "logits_to_keep": packed.predicts_K,
        "cu_seq_lens_q": packed.ends,
        "cu_seq_lens_k": packed.ends,
        "max_length_q": longest,
        "max_length_k": longest,
        **_mask_without_data(hidden_ESH, batch.num_tokens),
    }


def _mask_without_data(like: Tensor, length: int) -> dict[str, Tensor]:
    """On the meta device a mask of four dimensions, else nothing: transformers makes its own mask.

    For that it looks into the positions, which have no data there; one of four dimensions it takes
    as it is.
    """
    if not like.is_meta:
        return {}
    return {
        "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool, device=like.device)
    }
