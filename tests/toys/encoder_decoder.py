"""A toy of the language model port, from outside the package: T5, one stack that reads and one that
writes.

    SHIP_DS_PLUGINS=tests.toys.encoder_decoder ship-ds train ... model.task_llm.base=<a T5's folder>

The first stack reads [virtual tokens, instruction, prompt]; the second one writes the target after
a start token. An adapter's sites are in both, and in the attention between them.

Letters: E sequences, S padded length, K labelled positions, Y generated tokens.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, T5Config

from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.batch import TokenBatch
from ship_ds.model.language_model import LANGUAGE_MODELS, Feature, LanguageModel, Stream


class EncoderDecoder(LanguageModel):
    auto_class: ClassVar[Any] = AutoModelForSeq2SeqLM

    def missing(self, feature: Feature) -> str | None:
        if feature == "packing":
            return f"{type(self.module).__name__}: reads padded rows alone"
        return None

    def blocks(self) -> dict[str, nn.Module]:
        return {
            f"{stack}.block.{i}": block
            for stack in ("encoder", "decoder")
            for i, block in enumerate(getattr(self.module, stack).block)
        }

    def hidden(
        self,
        batch: TokenBatch,
        embeddings_ESH: Tensor | None = None,
        adapter: Adapter | None = None,
        *,
        checkpointing: bool = False,
    ) -> Tensor:
        if embeddings_ESH is None:
            embeddings_ESH = self.embed(batch)
        states: Tensor = self.module.encoder(
            inputs_embeds=embeddings_ESH,
            attention_mask=_sources(batch),
            **_under(adapter, checkpointing),
        ).last_hidden_state
        return states

    def label_states(
        self,
        batch: TokenBatch,
        adapter: Adapter | None = None,
        num_tasks: int = 1,
        *,
        soft: Tensor | None = None,
        instruction: Tensor | None = None,
        packed: bool = False,
        checkpointing: bool = False,
    ) -> Tensor:
        assert not packed, self.missing("packing")
        device = batch.ids_ES.device
        place_K = torch.tensor([y for length in batch.target_lengths for y in range(length)])
        place_K = place_K.to(device)
        # The writing stack reads each target one token late, after the start token.
        shape = len(batch.lengths), max(batch.target_lengths) + 1
        late_EY = torch.full(shape, self._start, device=device)
        late_EY = late_EY.index_put((batch.label_row_K, place_K + 1), batch.labels_K)
        logits = self.module(
            inputs_embeds=self._read(batch, soft, instruction),
            attention_mask=_sources(batch),
            decoder_input_ids=late_EY[:, :-1],
            use_cache=False,
            **_under(adapter, checkpointing),
        ).logits
        return logits[batch.label_row_K, place_K]

    def logits(
        self, batch: TokenBatch, adapter: Adapter | None = None, soft: Tensor | None = None
    ) -> Tensor:
        """Of the first token of an answer alone: the prompt's own tokens are predicted by none."""
        out: Tensor = self.stream(batch, adapter, soft=soft).logits_EV[:, None]
        return out

    def stream(
        self,
        prompts: TokenBatch,
        adapter: Adapter | None = None,
        *,
        soft: Tensor | None = None,
        instruction: Tensor | None = None,
    ) -> "TwoStacks":
        return TwoStacks(self, prompts, adapter, soft, instruction)

    @property
    def _start(self) -> int:
        token: int = self.module.config.decoder_start_token_id
        return token

    def _read(
        self, batch: TokenBatch, soft: Tensor | None = None, instruction: Tensor | None = None
    ) -> Tensor:
        return self.embed(batch, soft, instruction)[:, : _longest_source(batch)]


class TwoStacks(Stream):
    """The prompts' states, read once, and a cache of what was written."""

    @torch.no_grad()
    def __init__(
        self,
        lm: EncoderDecoder,
        prompts: TokenBatch,
        adapter: Adapter | None,
        soft: Tensor | None,
        instruction: Tensor | None,
    ) -> None:
        super().__init__(adapter, prompts)
        self.module, self.mask, self.cache = lm.module, _sources(prompts), None
        self.states_ESH: Tensor = lm.module.encoder(
            inputs_embeds=lm._read(prompts, soft, instruction),
            attention_mask=self.mask,
            **_under(adapter),
        ).last_hidden_state
        self.advance_rows(torch.full((self.num_rows,), lm._start, device=prompts.ids_ES.device))

    @torch.no_grad()
    def advance_rows(self, next_E: Tensor) -> None:
        out = self.module(
            encoder_outputs=(self.states_ESH,),
            attention_mask=self.mask,
            decoder_input_ids=next_E[:, None],
            past_key_values=self.cache,
            use_cache=True,
            **_under(self.adapter),
        )
        self.logits_EV, self.cache = out.logits[:, -1], out.past_key_values

    def reserve(self, num_tokens: int) -> None:
        """transformers' cache grows by each token."""

    def select_rows(self, rows: Sequence[int]) -> None:
        index_E = self.index(rows)
        self.cache.batch_select_indices(index_E)  # type: ignore[attr-defined]
        self.logits_EV = self.logits_EV[index_E]
        self.states_ESH, self.mask = self.states_ESH[index_E], self.mask[index_E]


def _longest_source(batch: TokenBatch) -> int:
    return max(
        length - target for length, target in zip(batch.lengths, batch.target_lengths, strict=True)
    )


def _sources(batch: TokenBatch) -> Tensor:
    """True where the reading stack may look, (E, 1, 1, S): transformers takes four dimensions as
    they are."""
    sources = [
        length - target for length, target in zip(batch.lengths, batch.target_lengths, strict=True)
    ]
    columns = torch.arange(_longest_source(batch), device="cpu")
    mask_ES = columns < torch.tensor(sources, device="cpu")[:, None]
    return mask_ES[:, None, None].to(batch.ids_ES.device)


def _under(adapter: Adapter | None, checkpointing: bool = False) -> dict[str, Any]:
    extra: dict[str, Any] = {} if adapter is None else {"ship_adapter": adapter.over(None)}
    return extra | ({"ship_checkpoint": True} if checkpointing else {})


LANGUAGE_MODELS[T5Config] = EncoderDecoder
