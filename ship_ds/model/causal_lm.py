"""One way into every transformers causal LM: embed, insert soft tokens, run, logits only where
there is a label.

Letters: E sequences, S padded length, N packed tokens, K labelled positions, V vocabulary, P soft
tokens, H hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.model.adapters import Adapter
from ship_ds.model.batch import IGNORE, TokenBatch


def embed(
    model: nn.Module,
    batch: TokenBatch,
    soft: Tensor | None = None,
    instruction: Tensor | None = None,
) -> Tensor:
    """Embeddings (E, S, H): `soft` (E, P, H) in the batch's slots, `instruction` (E, *, H) in place
    of the instruction's."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    hidden_ESH: Tensor = embedding(batch.ids_ES)
    for places_ES, source in ((batch.slots_ES, soft), (batch.instruction_ES, instruction)):
        if source is not None:
            hidden_ESH = hidden_ESH.masked_scatter(
                places_ES[..., None].expand_as(hidden_ESH), source.to(hidden_ESH.dtype)
            )
    return hidden_ESH


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

    soft, instruction: as in `embed`. packed: one sequence of all real tokens, isolated by their
    positions. adapter: its rows are the batch's `num_tasks` tasks.
    """
    extra: dict[str, Any] = {"use_cache": False}
    if adapter is not None:
        extra["ship_adapter"] = adapter.over(batch.task_offsets(num_tasks) if packed else None)
    if checkpointing:
        extra["ship_checkpoint"] = True
    hidden_ESH = embed(model, batch, soft, instruction)
    predicts_ES = torch.zeros_like(batch.labels_ES, dtype=torch.bool)
    predicts_ES[:, :-1] = batch.labels_ES[:, 1:] != IGNORE
    labels_K = batch.labels_ES[batch.labels_ES != IGNORE]
    if not packed:
        columns = predicts_ES.any(0).nonzero()[:, 0]
        logits = model(inputs_embeds=hidden_ESH, logits_to_keep=columns, **extra).logits
        return logits[predicts_ES[:, columns]], labels_K
    real_ES = batch.real_ES
    positions_N = torch.arange(real_ES.shape[1], device=real_ES.device).expand_as(real_ES)[real_ES]
    ends = torch.nn.functional.pad(batch.lengths_E.cumsum(0), (1, 0)).to(torch.int32)
    keep_K = predicts_ES[real_ES].nonzero()[:, 0]
    out = model(
        inputs_embeds=hidden_ESH[real_ES][None],
        position_ids=positions_N[None],
        logits_to_keep=keep_K,
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=real_ES.shape[1],
        max_length_k=real_ES.shape[1],
        **extra,
    )
    return out.logits[0], labels_K
