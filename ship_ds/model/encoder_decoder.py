"""T5 and its like as Task LLM: one stack reads, the other writes, and meets at each token what the
first one made of the input.

    reading stack    [virtual tokens, instruction, prompt]            sees all of it at once
    writing stack    [start, target without its last token]           grows to the right

An adapter's sites are in both stacks and in the attention between them (cross-attention). Rows
are padded, in both: T5 adds to each score of its attention a bias that goes by the distance, which
no kernel for packed tokens knows. T5 scales no scores, and shares the first block's biases with the
blocks after it, so its blocks hand on what AdaptedBlock passes through.

Letters: E sequences, S padded length, K labelled positions, H hidden size, V vocabulary, P virtual
tokens, Y generated tokens, T tasks, X other letters flattened.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache

from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.attention import TAKES_PREFIX
from ship_ds.model.batch import TokenBatch
from ship_ds.model.budget import Costs
from ship_ds.model.decoder_only import GivenStates, under
from ship_ds.model.key_value_cache import preallocated_cache, preallocated_layers
from ship_ds.model.language_model import Feature, LanguageModel, Stream
from ship_ds.model.projections import inside


class EncoderDecoder(LanguageModel):
    """See `LanguageModel`."""

    auto_class: ClassVar[Any] = AutoModelForSeq2SeqLM
    goes_by_lengths: ClassVar[bool] = False

    def missing(self, feature: Feature) -> str | None:
        """See `LanguageModel`."""
        if feature == "packing":
            return f"{type(self.module).__name__}: reads padded rows alone"
        attention = self.module.config._attn_implementation
        if feature == "prefix" and attention not in TAKES_PREFIX:
            return (
                f"{type(self.module).__name__}: its attention here is {attention}, which cannot "
                "attend to a prefix; set model.attention=sdpa"
            )
        return None

    @staticmethod
    def has_own_output(config: Any) -> bool:
        """See `LanguageModel`: that of version 1.1, which is not scaled."""
        return getattr(config, "scale_decoder_outputs", True) is False

    def blocks(self) -> dict[str, nn.Module]:
        """See `LanguageModel`: the reading stack's, then the writing one's."""
        return {
            f"{stack}.block.{i}": block
            for stack in ("encoder", "decoder")
            for i, block in enumerate(getattr(self.module, stack).block)
        }

    @cached_property
    def costs(self) -> Costs:
        """See `LanguageModel`. The writing stack alone keeps keys and values: of its own tokens,
        and of the prompt's for cross-attention. The bias makes of each mask scores of all heads."""
        settings, costs = self.module.config, super().costs
        num_heads, head_size = self.key_value_heads
        return replace(
            costs,
            cache=2 * len(self.module.decoder.block) * num_heads * head_size * self._itemsize,
            scores=2 * settings.num_attention_heads * self._itemsize,
        )

    @property
    def _itemsize(self) -> int:
        size: int = self.module.dtype.itemsize
        return size

    def attentions(self) -> dict[str, str]:
        """See `LanguageModel`: of a writing block also that to what was read."""
        return super().attentions() | self._crossing()

    def fusing(self) -> tuple[str, ...]:
        """See `LanguageModel`: cross-attention meets a text's states beside those of the input, as
        in HINT."""
        return tuple(self._crossing())

    def keys_and_values(self, place: str, states_TPH: Tensor) -> Tensor:
        """See `LanguageModel`. T5 turns no keys: its bias by distance is zero for what has no place
        among the tokens. Cross-attention takes what was read as it is."""
        states_TPH, crossing = states_TPH.to(self.module.dtype), self._crossing()
        layers = inside(self.blocks()[crossing.get(place, place)]).layer
        if place in crossing:
            attention = layers[1].EncDecAttention
        else:
            attention, states_TPH = layers[0].SelfAttention, layers[0].layer_norm(states_TPH)
        made = [project(states_TPH) for project in (attention.k, attention.v)]
        return torch.stack(made, 1).unflatten(3, self.key_value_heads).transpose(2, 3)

    def _crossing(self) -> dict[str, str]:
        """Cross-attention -> its block."""
        return {f"{path}.layer.1": path for path in self.blocks() if path.startswith("decoder.")}

    def is_written(self, path: str) -> bool:
        """See `LanguageModel`: keys and values of cross-attention are those of what was read."""
        of_read = path.endswith((".EncDecAttention.k", ".EncDecAttention.v"))
        return path.startswith("decoder.") and not of_read

    def hidden(
        self,
        batch: TokenBatch,
        embeddings_ESH: Tensor | None = None,
        adapter: Adapter | None = None,
        *,
        checkpointing: bool = False,
    ) -> Tensor:
        """See `LanguageModel`: the reading stack's."""
        if embeddings_ESH is None:
            embeddings_ESH = self.embed(batch)
        states: Tensor = self.module.encoder(
            inputs_embeds=embeddings_ESH,
            attention_mask=_sources(batch),
            **under(adapter, checkpointing),
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
        """See `LanguageModel`."""
        assert not packed, self.missing("packing")
        if adapter is not None:
            adapter = adapter.over(None)
        row_K = batch.label_row_K
        place_K = batch.padded.column_K + 1 - _source_lengths(batch)[row_K]
        # The writing stack reads each target one token late, after the start token.
        shape = len(batch.lengths), max(batch.target_lengths) + 1
        late_EY = torch.full(shape, self.start, device=row_K.device)
        # What stands in the row, which is not the label where that is hidden (`TokenBatch.hiding`).
        written_K = batch.ids_ES[row_K, batch.padded.column_K + 1]
        late_EY = late_EY.index_put((row_K, place_K + 1), written_K)[:, :-1]
        states_EYH = self._write(
            self._read(batch, adapter, soft, instruction, checkpointing=checkpointing),
            _sources(batch),
            late_EY,
            adapter,
            checkpointing=checkpointing,
        )
        return states_EYH[row_K, place_K]

    def head(self, states_XH: Tensor) -> Tensor:
        """See `LanguageModel`; the model's own forward around a writing stack that gives the
        states. T5 of version 1.0 scales them there."""
        around = copy.copy(self.module)
        around._modules = {**self.module._modules, "decoder": GivenStates(self.module.decoder)}
        # Not called, but its forward: hooks on the whole model would meet it a second time.
        logits: Tensor = around.forward(
            encoder_outputs=(states_XH[None],),
            decoder_inputs_embeds=states_XH[None],
            use_cache=False,
        ).logits
        return logits[0]

    def logits(
        self, batch: TokenBatch, adapter: Adapter | None = None, soft: Tensor | None = None
    ) -> Tensor:
        """See `LanguageModel`: of the prompts' own tokens, written after they were read."""
        ids_ES = batch.ids_ES[:, batch.num_virtual_tokens :]
        start_E1 = torch.full_like(ids_ES[:, :1], self.start)
        late_ES = torch.cat([start_E1, ids_ES[:, :-1]], 1)
        read_ESH = self._read(batch, adapter, soft)
        written_ESH = self._write(read_ESH, _sources(batch), late_ES, adapter)
        return self.head(written_ESH.flatten(0, 1)).unflatten(0, late_ES.shape)

    def stream(
        self,
        prompts: TokenBatch,
        adapter: Adapter | None = None,
        *,
        soft: Tensor | None = None,
        instruction: Tensor | None = None,
    ) -> "WrittenStream":
        """See `LanguageModel`."""
        return WrittenStream(self, prompts, adapter, soft, instruction)

    @property
    def start(self) -> int:
        """The token that every answer begins after."""
        return start_token(self.module.config)

    def _read(
        self,
        batch: TokenBatch,
        adapter: Adapter | None,
        soft: Tensor | None = None,
        instruction: Tensor | None = None,
        *,
        checkpointing: bool = False,
    ) -> Tensor:
        """What the reading stack makes of all that is before the targets, (E, S, H)."""
        sources_ESH = self.embed(batch, soft, instruction)[:, : _longest_source(batch)]
        return self.hidden(batch, sources_ESH, adapter, checkpointing=checkpointing)

    def _write(
        self,
        read_ESH: Tensor,
        mask: Tensor,
        ids_EY: Tensor,
        adapter: Adapter | None,
        *,
        checkpointing: bool = False,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """The writing stack's states (E, Y, H) after each of these tokens."""
        states: Tensor = self.module.decoder(
            # Embedded as prompts are: both go through one module, which ZeRO-3 gathers.
            inputs_embeds=self.embed_ids(ids_EY),
            encoder_hidden_states=read_ESH,
            encoder_attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **under(adapter, checkpointing),
        ).last_hidden_state
        return states


def start_token(settings: Any) -> int:
    """The token that answers begin after: the config's own, else that of padding, else the first,
    as T5 has it. transformers' T5Config knows the key only where config.json has it."""
    for name in ("decoder_start_token_id", "pad_token_id"):
        token: int | None = getattr(settings, name, None)
        if token is not None:
            return token
    return 0


class WrittenStream(Stream):
    """The prompts' states, read once, the keys and values that cross-attention makes of them, and
    those of what was written. All rows begin at the start token, so none is padded."""

    @torch.no_grad()
    def __init__(
        self,
        lm: EncoderDecoder,
        prompts: TokenBatch,
        adapter: Adapter | None,
        soft: Tensor | None,
        instruction: Tensor | None,
    ) -> None:
        """Read the prompts; arguments as in `LanguageModel.score`."""
        super().__init__(adapter and adapter.prepared(lm.module.dtype), prompts)
        self.lm, self.mask = lm, _sources(prompts)
        self.prompt_of_row = list(range(self.num_rows))
        settings = lm.module.decoder.config
        written = preallocated_cache(settings, cuts_windows=True)
        assert written is not None
        self.cache = EncoderDecoderCache(written, _CrossCache(config=settings))
        self.read_ESH = lm._read(prompts, self.adapter, soft, instruction)
        self._write(torch.full((self.num_rows,), lm.start, device=self.device))

    def _write(self, next_E: Tensor) -> None:
        states_E1H = self.lm._write(
            self.read_ESH, self.mask, next_E[:, None], self.adapter, cache=self.cache
        )
        self.logits_EV = self.lm.head(states_E1H[:, 0])

    @torch.no_grad()
    def advance_rows(self, next_E: Tensor) -> None:
        """See `Stream`."""
        if self.lm.is_sharded:
            self._gather_again()
        self._write(next_E)

    def _gather_again(self) -> None:
        """Where ranks take turns, a token goes through the modules that prompts go through, in the
        same order, or another rank would wait for ever: the reading stack, and the linears of
        cross-attention whose outputs are kept. One token of each row is as little as can be read,
        and nothing of it is used."""
        start_E1 = torch.full((self.num_rows, 1), self.lm.start, device=self.device)
        self.lm.module.encoder(inputs_embeds=self.lm.embed_ids(start_E1), **under(self.adapter))
        self.read_ESH = self.read_ESH[:, :1]
        self.cache.is_updated.clear()

    def reserve(self, num_tokens: int) -> None:
        """See `Stream`."""
        for layer in preallocated_layers(self.cache.self_attention_cache):
            layer.room = num_tokens

    def select_rows(self, rows: Sequence[int]) -> None:
        """See `Stream`. What was read moves only where another prompt's row takes a place."""
        index_E = self.index(rows)
        for layer in preallocated_layers(self.cache.self_attention_cache):
            layer.select(index_E, 0, self.index([]))
        self.logits_EV = self.logits_EV[index_E]
        prompts = [self.prompt_of_row[row] for row in rows]
        if prompts != self.prompt_of_row:
            self.cache.cross_attention_cache.batch_select_indices(index_E)
            self.read_ESH, self.mask = self.read_ESH[index_E], self.mask[index_E]
        self.prompt_of_row = prompts


class _CrossCache(DynamicCache):
    """Keys and values of the prompts: the first ones stay, whatever is made again."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.get_seq_length(layer_idx):
            layer: Any = self.layers[layer_idx]
            return layer.keys, layer.values
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _longest_source(batch: TokenBatch) -> int:
    targets = batch.target_lengths or (0,) * len(batch.lengths)
    return max(length - target for length, target in zip(batch.lengths, targets, strict=True))


def _source_lengths(batch: TokenBatch) -> Tensor:
    """Tokens before each row's target, (E,), on the device of the batch."""
    ones_K = torch.ones_like(batch.label_row_K)
    return batch.lengths_E.index_add(0, batch.label_row_K, ones_K, alpha=-1)


def _sources(batch: TokenBatch) -> Tensor:
    """True where a prompt's token is, (E, 1, 1, S): transformers takes four dimensions as they
    are."""
    columns = torch.arange(_longest_source(batch), device=batch.ids_ES.device)
    return (columns < _source_lengths(batch)[:, None])[:, None, None]
