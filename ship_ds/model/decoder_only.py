"""Decoder-only transformers models: one stack of causal blocks, prompt and target in one row.

Everything goes through the model's own forward, so that soft-capping, scaling and tied heads stay
right, under ZeRO-3 too. Stack and output layer are run apart (`label_states`, `head`), so that a
loss may take the logits in pieces. Data are reached by the batch's index tensors alone: a forward
neither waits for a GPU nor needs data at all, and on the meta device it gives the shapes.

Letters: E sequences, S padded length, N packed tokens, K labelled positions, V vocabulary,
P virtual tokens, H hidden size, T tasks, X other letters flattened.
"""

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from ship_ds.base_files import UNFIT
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.adapters.together import Together
from ship_ds.model.attention import (
    FLASH,
    PACKS,
    SDPA,
    TAKES_PREFIX,
    VARLEN,
    needs_no_mask,
    no_mask,
    no_mask_of_packed,
)
from ship_ds.model.batch import Layout, TokenBatch
from ship_ds.model.key_value_cache import (
    PreallocatedLayer,
    ending_at,
    preallocated_cache,
    preallocated_layers,
)
from ship_ds.model.language_model import Feature, LanguageModel, Passage, Stream
from ship_ds.model.projections import can_project, keys_and_values

EAGER_ATTENTION, SLIDING = "eager", "sliding_attention"
MASKED = (SDPA, VARLEN, EAGER_ATTENTION)
"""Implementations of attention that take a mask of four dimensions."""
_BY_LENGTHS = {"full_attention", SLIDING}
"""Kinds of layers, as transformers calls them, whose attention goes by lengths and positions."""

_KEEP_ENDS_TO_THEMSELVES = {"nemotron", "stablelm"}
"""Model types whose blocks call their attention without what else they were given (transformers
5.23); attention.py refuses the others that do so, when it meets one."""

_KEEP_WINDOWS_TO_THEMSELVES = {"phimoe", "qwen2_moe"}
"""Model types whose blocks do not tell their attention how far back a token sees: the mask alone
says it (transformers 5.23)."""


class DecoderOnly(LanguageModel):
    """See `LanguageModel`."""

    auto_class: ClassVar[Any] = AutoModelForCausalLM
    unfit: ClassVar[Mapping[str, str]] = UNFIT

    def missing(self, feature: Feature) -> str | None:
        """See `LanguageModel`."""
        if feature == "adapters":
            return self._why_not_adapted()
        attention = self._attention
        if feature == "packing":
            return self._why_padded()
        if feature == "projection":
            return self._why_not_projected()
        if feature == "prefix" and self.module.config.model_type in _KEEP_ENDS_TO_THEMSELVES:
            return (
                f"{type(self.module).__name__}: its blocks do not hand a prefix on to their "
                "attention; set another model.hypernetwork.kind"
            )
        if feature == "prefix" and (reason := self._why_no_prefix()) is not None:
            return reason
        if feature == "prefix" and attention not in TAKES_PREFIX:
            return (
                f"{type(self.module).__name__}: its attention here is {attention}, which cannot "
                "attend to a prefix; set model.attention=sdpa, or another model.hypernetwork.kind"
            )
        return None

    def _why_not_adapted(self) -> str | None:
        name = type(self.module).__name__
        if not self.blocks():
            return (
                f"{name}: has no list of num_hidden_layers blocks; only decoder-only models with "
                "one can be adapted"
            )
        if not _hands_on(inspect.getsource(type(self._stack).forward)):
            return (
                f"{name}: hands its blocks nothing but its own arguments, so that no adapter "
                "reaches them; give another base"
            )
        return None

    def _why_no_prefix(self) -> str | None:
        """Keys and values that a prefix has not the sizes of."""
        settings, what = self.module.config, None
        if getattr(settings, "kv_lora_rank", None):
            what = "makes keys and values of latents, each of a size of its own"
        elif settings.model_type == "jetmoe":
            what = "has keys and values for each expert of its attention"
        return what and (
            f"{type(self.module).__name__}: {what}, which a prefix does not fit; set another "
            "model.hypernetwork.kind, such as lora"
        )

    def _why_not_projected(self) -> str | None:
        if can_project(self.module, [*self.blocks().values()]):
            return None
        return (
            f"{type(self.module).__name__}: makes keys and values otherwise than Llama's and "
            "Qwen3's attention, so prompts in its blocks are not known how to project; set "
            "another model.hypernetwork.kind, such as prefix"
        )

    def keys_and_values(self, place: str, states_TPH: Tensor) -> Tensor:
        """See `LanguageModel`."""
        states_TPH = states_TPH.to(self.module.dtype)
        return keys_and_values(self.module, self.blocks()[place], states_TPH)

    def _why_padded(self) -> str | None:
        name, attention = type(self.module).__name__, self._attention
        if attention not in PACKS:
            return f"{name}: its attention here is {attention}, which goes by a mask of all tokens"
        if self.module.config.model_type in _KEEP_ENDS_TO_THEMSELVES:
            return f"{name}: its blocks do not hand on where a sequence ends"
        if self._hides_windows():
            return f"{name}: its blocks do not tell their attention how far back a token sees"
        kinds = set(getattr(self.module.config, "layer_types", None) or ()) - _BY_LENGTHS
        if kinds:
            return f"{name}: has layers of {', '.join(sorted(kinds))}, which goes by a mask"
        return None

    def _hides_windows(self) -> bool:
        settings = self.module.config
        if settings.model_type not in _KEEP_WINDOWS_TO_THEMSELVES:
            return False
        kinds = getattr(settings, "layer_types", None)
        return bool(settings.sliding_window) and (kinds is None or SLIDING in kinds)

    @property
    def _attention(self) -> str:
        implementation: str = self.module.config._attn_implementation
        return implementation

    @property
    def _stack(self) -> nn.Module:
        """The model without its output layer."""
        stack: nn.Module = getattr(self.module, self._stack_name)
        return stack

    @property
    def _stack_name(self) -> str:
        """Llama 4's model of texts names its prefix as within a larger model."""
        prefix: str = self.module.base_model_prefix
        return prefix if hasattr(self.module, prefix) else "model"

    def blocks(self) -> dict[str, nn.Module]:
        """See `LanguageModel`: the outermost list of as many modules as the model has layers."""
        for path, layers in self._stack.named_modules(prefix=self._stack_name):
            if isinstance(layers, nn.ModuleList) and len(layers) == self._num_layers:
                return {f"{path}.{i}": block for i, block in enumerate(layers)}
        return {}

    @property
    def _num_layers(self) -> int | None:
        number: int | None = getattr(self.module.config, "num_hidden_layers", None)
        return number

    def hidden(
        self,
        batch: TokenBatch,
        embeddings_ESH: Tensor | None = None,
        adapter: Adapter | None = None,
        *,
        checkpointing: bool = False,
    ) -> Tensor:
        """See `LanguageModel`."""
        tokens: dict[str, Any] = (
            {"input_ids": batch.ids_ES}
            if embeddings_ESH is None
            else {"inputs_embeds": embeddings_ESH}
        )
        # The rows are padded on the right and causal, so no state sees padding.
        extra = self.whole_rows(batch) | under(adapter, checkpointing)
        states: Tensor = self._stack(**tokens, **extra, use_cache=False).last_hidden_state
        return states

    def packed_states(
        self, batch: TokenBatch, adapter: Adapter | None = None, *, checkpointing: bool = False
    ) -> Tensor:
        """See `LanguageModel`."""
        extra = under(adapter, checkpointing) | self._end_to_end([batch])
        states: Tensor = self._stack(
            inputs_embeds=self.embed_packed(batch), use_cache=False, **extra
        ).last_hidden_state
        return states[0]

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
        if packed:
            passage = Passage(batch, adapter, num_tasks, soft, instruction)
            [packed_KH] = self.label_states_together([passage], checkpointing=checkpointing)
            return packed_KH
        if adapter is not None:
            adapter = adapter.over(None)
        extra = under(adapter, checkpointing) | self.whole_rows(batch)
        hidden = self.embed(batch, soft, instruction)
        # The prompt, the virtual tokens and the padding never meet the V-wide product.
        states: Tensor = self._stack(
            inputs_embeds=hidden, use_cache=False, **extra
        ).last_hidden_state
        return states[batch.padded.row_K, batch.padded.column_K]

    def label_states_together(
        self, passages: Sequence[Passage], *, checkpointing: bool = False
    ) -> list[Tensor]:
        """See `LanguageModel`."""
        batches = [one.batch for one in passages]
        extra = under(_adapter_over(passages), checkpointing) | self._end_to_end(batches)
        hidden = [self.embed_packed(one.batch, one.soft, one.instruction) for one in passages]
        states: Tensor = self._stack(
            inputs_embeds=torch.cat(hidden, 1) if len(hidden) > 1 else hidden[0],
            use_cache=False,
            **extra,
        ).last_hidden_state
        parts = states[0].split([batch.num_tokens for batch in batches])
        return [
            part.index_select(0, batch.packed.predicts_K)
            for part, batch in zip(parts, batches, strict=True)
        ]

    def head(self, states_XH: Tensor) -> Tensor:
        """See `LanguageModel`; the model's own forward around a stack that gives the states.

        A family scales or caps its logits there, ZeRO-3 gathers the output layer by its own hooks,
        and a tied one is the embedding's weight as ever.
        """
        around = copy.copy(self.module)
        around._modules = {**self.module._modules, self._stack_name: GivenStates(self._stack)}
        # Not called, but its forward: hooks on the whole model would meet it a second time.
        logits: Tensor = around.forward(inputs_embeds=states_XH[None], use_cache=False).logits
        return logits[0]

    def _end_to_end(self, batches: Sequence[TokenBatch]) -> dict[str, Any]:
        """What a stack needs for one row of all tokens of all batches.

        Kernels for variable lengths go by the cumulative lengths, SDPA by the rows. Another
        attention gets transformers' mask, which keeps samples apart where the positions start
        again: right, but for the square of all tokens.
        """
        layout = Layout.of(batches)
        device = layout.position_N.device
        inputs: dict[str, Any] = {"position_ids": layout.position_N[None]}
        if self._attention not in PACKS:
            return inputs | self._mask(device, len(layout.position_N))
        if self._attention in (VARLEN, FLASH):
            inputs |= _lengths(layout.ends, layout.longest)
        if self._attention != FLASH:
            inputs |= {"ship_rows": layout.rows, "attention_mask": no_mask_of_packed(device)}
        return inputs

    def whole_rows(self, batch: TokenBatch) -> dict[str, Any]:
        """What attention needs for right-padded rows, or for rows of one length."""
        num_rows, length = batch.ids_ES.shape
        mask = self._mask(batch.ids_ES.device, length)
        if not self._runs_varlen(batch.ids_ES.device):
            return mask
        steps = torch.arange(num_rows + 1, dtype=torch.int32, device=batch.ids_ES.device)
        return mask | _lengths(steps * length, length)

    def _mask(self, device: torch.device, length: int) -> dict[str, Tensor]:
        """Nothing where transformers may make its own mask, for which it looks into the positions.

        On the meta device they hold no data, and a kernel for variable lengths needs no mask:
        there it gets one of four dimensions, which it passes on as it is.
        """
        if device.type == "meta":
            ones = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
            return {"attention_mask": ones}
        return {"attention_mask": no_mask(device)} if self._runs_varlen(device) else {}

    def _runs_varlen(self, device: torch.device) -> bool:
        runs = needs_no_mask(self._attention, device, self.module.dtype)
        return runs and not self._hides_windows()

    def logits(
        self, batch: TokenBatch, adapter: Adapter | None = None, soft: Tensor | None = None
    ) -> Tensor:
        """See `LanguageModel`."""
        out: Tensor = self.module(
            inputs_embeds=self.embed(batch, soft), use_cache=False, **under(adapter)
        ).logits
        return out[:, batch.num_virtual_tokens :]

    def stream(
        self,
        prompts: TokenBatch,
        adapter: Adapter | None = None,
        *,
        soft: Tensor | None = None,
        instruction: Tensor | None = None,
    ) -> "CachedStream":
        """See `LanguageModel`."""
        return CachedStream(self, prompts, adapter, soft, instruction)


@cache
def _hands_on(source: str) -> bool:
    """Whether a stack's forward gives its blocks what it was called with besides its own arguments,
    which is how an adapter gets there: by its source, since nothing else tells."""
    _, _, body = source.partition(":\n")
    return re.search(r"\*\*\w*kwargs,?\s*\)", body) is not None


class GivenStates(nn.Module):
    """In place of a model's stack: what it is given are the stack's states."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        # A plain list: its weights are not registered once more.
        self.in_place_of = [stack]

    @property
    def decoder(self) -> "GivenStates":
        """OPT's forward calls its stack by this name."""
        return self

    def __getattr__(self, name: str) -> Any:
        # Falcon-H1's forward looks at its stack for how much it scales the logits.
        return getattr(self.__dict__["in_place_of"][0], name)

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> "_States":
        return _States(last_hidden_state=inputs_embeds)


@dataclass
class _States(BaseModelOutput):
    """States alone. What else a family's forward hands on, such as the choices of its experts, is
    None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class CachedStream(Stream):
    """Rows that grow to the right of their prompts, with the keys and values of all before.

    Attributes:
        real_EX: True where a column of the cache is no padding; it has the columns of tokens to
            come already, so that a token's mask is a view.
        prompt_of_row: which prompt a row continues: rows of one prompt share its columns.
    """

    @torch.no_grad()
    def __init__(
        self,
        lm: DecoderOnly,
        prompts: TokenBatch,
        adapter: Adapter | None,
        soft: Tensor | None,
        instruction: Tensor | None,
    ) -> None:
        """Read the prompts; arguments as in `LanguageModel.score`."""
        super().__init__(adapter and adapter.prepared(lm.module.dtype), prompts)
        self.lm, self.module = lm, lm.module
        self.implementation: str = lm.module.config._attn_implementation
        self.masks_itself = self.implementation in MASKED
        self.width = self.length = prompts.ids_ES.shape[1]
        self.is_padded = len(set(prompts.lengths)) > 1
        self.prompt_of_row = list(range(self.num_rows))
        self.next_position_E = prompts.lengths_E.clone()
        columns = torch.arange(self.width, device=self.device)[None]
        shift_E1 = (self.width - prompts.lengths_E)[:, None]
        self.real_EX = columns >= shift_E1
        hidden_ESH = lm.embed(prompts, soft, instruction)
        if self.is_padded:
            # Padding goes to the left, so that the last column is every row's last token.
            index_ES1 = ((columns - shift_E1) % self.width)[..., None]
            hidden_ESH = hidden_ESH.gather(1, index_ES1.expand_as(hidden_ESH))
            attention: dict[str, Any] = {"attention_mask": self.real_EX.long()}
        else:
            attention = lm.whole_rows(prompts)
        self.cache = preallocated_cache(lm.module.config, self.masks_itself)
        self._run(hidden_ESH, (columns - shift_E1).clamp(min=0), attention)

    def _run(self, hidden_ESH: Tensor, positions_ES: Tensor, attention: Mapping[str, Any]) -> None:
        out = self.module(
            inputs_embeds=hidden_ESH,
            position_ids=positions_ES,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **under(self.adapter),
            **attention,
        )
        self.logits_EV = out.logits[:, -1]
        self.cache = out.past_key_values

    def reserve(self, num_tokens: int) -> None:
        """See `Stream`."""
        self._widen(self.length + num_tokens)
        for layer in preallocated_layers(self.cache):
            layer.room = num_tokens

    def _widen(self, num_columns: int) -> None:
        missing = num_columns - self.real_EX.shape[1]
        if missing > 0:
            self.real_EX = torch.nn.functional.pad(self.real_EX, (0, missing), value=True)

    @torch.no_grad()
    def advance_rows(self, next_E: Tensor) -> None:
        """See `Stream`."""
        self.length += 1
        self._widen(self.length)
        # Embedded out here as the prompts were: both go through the same modules in one order.
        hidden_E1H = self.lm.embed_ids(next_E[:, None])
        self._run(hidden_E1H, self.next_position_E[:, None], {"attention_mask": self._mask()})
        self.next_position_E += 1

    def _mask(self) -> Tensor | dict[str, Tensor] | None:
        """What one more token sees.

        transformers would look into a two-dimensional mask whether there is padding at all, for
        which the host waits, and make a mask of four dimensions; it takes one of four as it is.
        """
        windows = {layer.window for layer in preallocated_layers(self.cache)}
        if not self.masks_itself or not windows:
            return self.real_EX[:, : self.length].long()
        if windows == {None} and not self.is_padded:
            return None
        masks = {window: self._columns_within(window) for window in windows}
        if len(masks) == 1:
            return next(iter(masks.values()))
        kinds = {window: "full_attention" if window is None else SLIDING for window in masks}
        return {kinds[window]: mask for window, mask in masks.items()}

    def _columns_within(self, window: int | None) -> Tensor:
        first = 0 if window is None else max(0, self.length - window)
        mask = self.real_EX[:, None, None, first : self.length]
        if self.implementation != EAGER_ATTENTION:
            return mask
        # Eager attention adds its mask to the scores.
        dtype = self.logits_EV.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def select_rows(self, rows: Sequence[int]) -> None:
        """See `Stream`."""
        index_E = self.index(rows)
        layers = preallocated_layers(self.cache)
        if layers:
            moved_X = self._rows_of_other_prompts(rows)
            for layer in layers:
                layer.select(index_E, self.width, moved_X)
        elif self.cache is not None:
            # Not batch_select_indices, which leaves the states of linear attention where they are.
            self.cache.reorder_cache(index_E)  # type: ignore[arg-type]
        self.prompt_of_row = [self.prompt_of_row[row] for row in rows]
        self.real_EX, self.logits_EV = self.real_EX[index_E], self.logits_EV[index_E]
        self.next_position_E = self.next_position_E[index_E]

    def joining(self, other: Stream) -> Callable[[], None] | None:
        """See `Stream`: where the base keeps nothing but keys and values of its past."""
        assert isinstance(other, CachedStream)
        layers, theirs = (preallocated_layers(one.cache) for one in (self, other))
        if not layers or len(layers) != len(theirs):
            return None
        return partial(self._take_rows, other, layers, theirs)

    def _take_rows(
        self,
        other: "CachedStream",
        layers: Sequence[PreallocatedLayer],
        theirs: Sequence[PreallocatedLayer],
    ) -> None:
        """Rows end in the same column; what no row has any more is left behind, so that a stream
        which others join for ever stays as short as its longest row."""
        positions_E = torch.cat([self.next_position_E, other.next_position_E])
        lengths: list[int] = positions_E.tolist()
        length = max(lengths)
        for layer, their in zip(layers, theirs, strict=True):
            layer.join(their, length)
        self.real_EX = torch.cat(
            [ending_at(one.real_EX[:, : one.length], length, 1) for one in (self, other)]
        )
        self.logits_EV = torch.cat([self.logits_EV, other.logits_EV])
        self.next_position_E, self.length = positions_E, length
        self.is_padded = min(lengths) < length
        # From here on no columns are known to be shared.
        self.width, self.prompt_of_row = 0, list(range(len(lengths)))
        self._widen(length + max(layer.room for layer in layers))

    def _rows_of_other_prompts(self, rows: Sequence[int]) -> Tensor | None:
        """Rows whose place belongs to another prompt until now; None: there are more rows than
        places."""
        if len(rows) > len(self.prompt_of_row):
            return None
        prompts = self.prompt_of_row
        return self.index([e for e, row in enumerate(rows) if prompts[row] != prompts[e]])


def _adapter_over(passages: Sequence[Passage]) -> Adapter | None:
    """What packed tokens are read under, text after text."""
    if all(one.adapter is None for one in passages):
        return None
    adapters = [
        one.adapter and one.adapter.over(one.batch.task_offsets(one.num_tasks)) for one in passages
    ]
    if len(adapters) == 1:
        return adapters[0]
    counts = [one.batch.num_tokens for one in passages]
    return Together(tuple(zip(adapters, counts, strict=True)))


def under(adapter: Adapter | None, checkpointing: bool = False) -> dict[str, Any]:
    """What a stack hands down to `AdaptedBlock`: stock blocks do not know the arguments, so they
    are passed where they say something alone."""
    given: dict[str, Any] = {} if adapter is None else {"ship_adapter": adapter}
    return given | ({"ship_checkpoint": True} if checkpointing else {})


def _lengths(ends: Tensor, longest: int) -> dict[str, Any]:
    """As kernels for variable lengths call them."""
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
