"""The language model port: what SHIP needs of a language model, whatever its architecture.

    role (encoder, decoder, Task LLM)             registers the transformers model as `lm`
        .language_model: LanguageModel            a plain object around it
            score     prompts with targets   ->   logits where there is a label
            stream    prompts                ->   rows that grow token by token
            hidden    texts                  ->   states, from rows with padding
            states    texts                  ->   states, read as this model reads fastest
            blocks    module path            ->   what an adapter wraps

An architecture is one class here, found by the class of its transformers config. `DecoderOnly`
takes every causal LM whose blocks are a list, `EncoderDecoder` T5. Another one is added by

    LANGUAGE_MODELS[MT5Config] = EncoderDecoder

in a module that SHIP_DS_PLUGINS names (kinds.py). Nobody outside model/ touches `lm`: what depends
on the architecture stays behind these methods.

What such a class can count on. A `TokenBatch` lays virtual tokens, instruction, prompt and target
in one row and says on the host how long the target is, so an encoder-decoder reads what is before
the target with one stack and grows the target with the other. Padded rows are task-major in every
stack, so an adapter's products need no offsets in any of them. A cache belongs to the `Stream`,
which alone knows how to reorder it.

Letters: E sequences, S padded length, N packed tokens, K labelled positions, V vocabulary,
P virtual tokens, H hidden size, T tasks, G key-value heads, F size of an attention head,
X other letters flattened.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, T5Config
from transformers.pytorch_utils import Conv1D

from ship_ds.errors import UserError, first_line
from ship_ds.model.batch import TokenBatch
from ship_ds.model.budget import Costs

if TYPE_CHECKING:  # adapters.py wraps what this file finds
    from ship_ds.model.adapters.adapter import Adapter

Feature = Literal["adapters", "prefix", "projection", "packing"]
"""What a model may lack: sites for adapters; attention to a prefix of theirs; keys and values of
given states; batches without padding."""


class Stream(ABC):
    """Prompts read once; then each `advance` adds a token to every row.

    `logits_EV` predict the next one. Selecting rows moves the cache and each row's adapter
    together, so one operation drops finished rows, reorders beams and repeats a prompt. Which rows
    move is known on the host, so none of this waits for a GPU.
    """

    logits_EV: Tensor

    def __init__(self, adapter: "Adapter | None", prompts: TokenBatch) -> None:
        """Say whose adapter each row has; the subclass reads the prompts.

        Args:
            adapter: its tasks have equally many consecutive rows each.
            prompts: without targets.
        """
        num_rows = len(prompts.lengths)
        rows_per_task = num_rows // adapter.num_tasks if adapter is not None else 1
        self.adapter, self.num_rows = adapter, num_rows
        self.device = prompts.ids_ES.device
        self.task_of_row = [row // rows_per_task for row in range(num_rows)]

    @abstractmethod
    def reserve(self, num_tokens: int) -> None:
        """Say how many tokens a row will get at most: a cache can make room for all of them
        once."""

    before_token: Callable[[], None] | None = None
    """What a token waits for where ranks take turns (turns.py)."""

    def advance(self, next_E: Tensor) -> None:
        """Add one token to each row."""
        if self.before_token is not None:
            self.before_token()
        self.advance_rows(next_E)

    @abstractmethod
    def advance_rows(self, next_E: Tensor) -> None:
        """Read one token more in each row, by the same modules in the same order as the prompts."""

    @abstractmethod
    def select_rows(self, rows: Sequence[int]) -> None:
        """Reorder the cache and `logits_EV`."""

    def select(self, rows: Sequence[int]) -> None:
        """Row e becomes what row rows[e] was.

        Rows of one task have to stay together: an adapter's products run over each task's rows.
        """
        self.num_rows = len(rows)
        self.select_rows(rows)
        if self.adapter is None:
            return
        groups = [
            (task, len(list(group)))
            for task, group in groupby(self.task_of_row[row] for row in rows)
        ]
        if [task for task, _ in groups] != list(range(self.adapter.num_tasks)):
            self.adapter = self.adapter.rows(self.index([task for task, _ in groups]))
        counts = [count for _, count in groups]
        self.task_of_row = [task for task, count in enumerate(counts) for _ in range(count)]
        self.adapter = self.adapter.for_rows(counts)

    def joining(self, other: "Stream") -> Callable[[], None] | None:
        """What takes the cache and `logits_EV` of another stream's rows in, after these, once it is
        called; None, as by default: nothing does."""
        return None

    def join(self, other: "Stream") -> bool:
        """Take the rows of another stream in, after these: one forward then grows them all.

        Args:
            other: of the same model; of no use any more where this succeeds.

        Returns:
            Whether it did. Where a cache or a kind of adapter cannot, both streams go on alone.
        """
        # First what costs nothing: `beside` copies both adapters.
        take_rows = self.joining(other)
        if take_rows is None or (self.adapter is None) != (other.adapter is None):
            return False
        adapter = None
        if self.adapter is not None and other.adapter is not None:
            adapter = self.adapter.beside(other.adapter)
            if adapter is None:
                return False
        take_rows()
        num_tasks = self.adapter.num_tasks if self.adapter is not None else self.num_rows
        self.task_of_row = self.task_of_row + [num_tasks + task for task in other.task_of_row]
        self.num_rows += other.num_rows
        if adapter is not None:
            counts = [len(list(group)) for _, group in groupby(self.task_of_row)]
            self.adapter = adapter.for_rows(counts)
        return True

    def index(self, rows: Sequence[int]) -> Tensor:
        """Rows as an index on the stream's device."""
        return torch.tensor(rows, dtype=torch.long, device=self.device)


def linear_sizes(linear: Any) -> tuple[int, int]:
    """(I, O) of a linear, or of GPT-2's Conv1D, which is one with its weight transposed."""
    return (
        (linear.nx, linear.nf)
        if isinstance(linear, Conv1D)
        else (
            linear.in_features,
            linear.out_features,
        )
    )


@dataclass(frozen=True)
class Passage:
    """What one role reads of a batch: arguments as in `LanguageModel.label_states`."""

    batch: TokenBatch
    adapter: "Adapter | None" = None
    num_tasks: int = 1
    soft: Tensor | None = None
    instruction: Tensor | None = None


class LanguageModel(ABC):
    """One architecture's way to embed, score, stream and be adapted.

    Holds no weights of its own: a role registers `module` under the name `lm`, so that the names
    and the order of parameters do not depend on this class.
    """

    auto_class: ClassVar[Any]
    """The transformers class that makes it from a folder or a config."""
    goes_by_lengths: ClassVar[bool] = True
    """Whether its attention may run in a kernel that is told lengths and nothing else."""
    unfit: ClassVar[Mapping[str, str]] = {}
    """Model types that it cannot take, and why, in a few words: told before one is loaded."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @property
    def hidden_size(self) -> int:
        """H, the width of embeddings and states."""
        size: int = self.module.get_input_embeddings().embedding_dim
        return size

    @property
    def vocabulary_size(self) -> int:
        """V, rows of the embedding table."""
        size: int = self.module.get_input_embeddings().num_embeddings
        return size

    @property
    def embedding_weight(self) -> nn.Parameter:
        """The embedding table (V, H)."""
        weight: nn.Parameter = self.module.get_input_embeddings().weight
        return weight

    @property
    def output_weight(self) -> nn.Parameter | None:
        """The output layer's matrix (V, H), a tied one being `embedding_weight` itself; None where
        it was dropped."""
        weight: nn.Parameter | None = getattr(self.module.get_output_embeddings(), "weight", None)
        return weight

    @property
    def context_length(self) -> int | None:
        """The most tokens of prompt and answer together; None: no limit of its own."""
        length: int | None = getattr(self.module.config, "max_position_embeddings", None)
        return length

    @property
    def key_value_heads(self) -> tuple[int, int]:
        """(G, F): key-value heads of a block and the size of one; (0, 0) where it has none."""
        settings = self.module.config
        num_heads = getattr(settings, "num_attention_heads", 0)
        size = getattr(settings, "head_dim", None) or self.hidden_size // max(1, num_heads)
        return getattr(settings, "num_key_value_heads", None) or num_heads, size

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold shares of the output layer and gather it whenever it is called."""
        parameters = self.module.get_output_embeddings().parameters()
        return any(hasattr(parameter, "ds_id") for parameter in parameters)

    @property
    def embedding_spread(self) -> float:
        """Standard deviation of the token embeddings; on the meta device, where they have none,
        that of a fresh model."""
        if self.embedding_weight.is_meta:
            return float(self.module.config.initializer_range)
        return float(self.embedding_weight.detach().float().std())

    @cached_property
    def costs(self) -> Costs:
        """What rows need beside the weights (budget.py).

        The factors count the tensors that a block holds at once in transformers 5.23's Llama;
        tests/model/test_budget.py compares them with what four families hold.
        """
        settings, itemsize = self.module.config, self.module.dtype.itemsize
        paths, num_blocks = self.linears(), len(self.blocks())
        linears = paths.values()
        # A stack without a list of blocks is taken for one of the usual width.
        sizes = [max(linear_sizes(one)) for one in linears]
        widest = max(sizes, default=4 * self.hidden_size)
        num_blocks = num_blocks or settings.num_hidden_layers
        num_heads, head_size = self.key_value_heads
        all_heads = settings.num_attention_heads * head_size
        is_eager = settings._attn_implementation == "eager"
        # A wrapped linear is called `base`, below its name.
        num_latents = sum(path.removesuffix(".base").endswith(f".{_OF_LATENTS}") for path in paths)
        # Gate, its activation and the product; an adapted linear also holds what it adds.
        num_wide = 4 if any(hasattr(module, "adapter") for module in self.module.modules()) else 3
        return Costs(
            cache=itemsize
            * (
                num_latents * _latent_size(settings)
                + 2 * max(0, num_blocks - num_latents) * num_heads * head_size
            ),
            working=itemsize * (4 * self.hidden_size + num_wide * widest) + 8 * head_size,
            attending=itemsize * (3 * self.hidden_size + 4 * all_heads),
            repeated=2 * all_heads * itemsize if is_eager else 0,
            kept=num_blocks * itemsize * (10 * self.hidden_size + 5 * widest),
            scores=5 * settings.num_attention_heads * itemsize // 2 if is_eager else 1,
            logits=self.vocabulary_size * itemsize,
            float_logits=self.vocabulary_size * 4,
        )

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Embeddings (*ids.shape, H), through the model's own module, where ZeRO-3 gathers it."""
        embeddings: Tensor = self.module.get_input_embeddings()(ids)
        return embeddings

    def embed(
        self, batch: TokenBatch, soft: Tensor | None = None, instruction: Tensor | None = None
    ) -> Tensor:
        """Embeddings (E, S, H) of a batch.

        Args:
            batch: what to embed.
            soft: (E, P, H), in the places of the virtual tokens.
            instruction: (E, instruction length, H), in place of the instruction's tokens.
        """
        hidden_ESH = self.embed_ids(batch.ids_ES)
        if soft is not None:
            assert soft.shape[1] == batch.num_virtual_tokens
            hidden_ESH = torch.cat([soft.to(hidden_ESH.dtype), hidden_ESH[:, soft.shape[1] :]], 1)
        if instruction is not None:
            hidden_XH = hidden_ESH.flatten(0, 1)
            values_XH = instruction.flatten(0, 1).to(hidden_ESH.dtype)
            hidden_ESH = hidden_XH.index_put((batch.instruction_X,), values_XH).view_as(hidden_ESH)
        return hidden_ESH

    def embed_packed(
        self, batch: TokenBatch, soft: Tensor | None = None, instruction: Tensor | None = None
    ) -> Tensor:
        """Embeddings of the packed tokens of a batch.

        Args:
            batch: what to embed.
            soft: (E, P, H), in the places of the virtual tokens; None: nothing is put there.
            instruction: (E, instruction length, H), in place of the instruction's tokens; None:
                theirs.

        Returns:
            (1, N, H).
        """
        packed = batch.packed
        hidden_NH = self.embed_ids(batch.ids_ES.flatten().index_select(0, packed.source_N))
        for places_X, values in ((packed.virtual_X, soft), (packed.instruction_X, instruction)):
            if values is not None:
                values_XH = values.flatten(0, 1).to(hidden_NH.dtype)
                hidden_NH = hidden_NH.index_copy(0, places_X, values_XH)
        return hidden_NH[None]

    def drop_output_layer(self) -> None:
        """Take the output layer away: for who reads states alone it would be a dead trainable
        parameter, for which the engine waits in vain."""
        nothing = nn.Identity()
        nothing.register_parameter("bias", None)  # BERT's class takes it over
        self.module.set_output_embeddings(nothing)

    @staticmethod
    def has_own_output(config: Any) -> bool:
        """Whether files of a model with this config hold an output layer of its own, although
        transformers takes it for tied until it has read them."""
        return False

    @abstractmethod
    def missing(self, feature: Feature) -> str | None:
        """Why this model cannot do it, in one line; None where it can."""

    @property
    def packs(self) -> bool:
        """Whether batches are read without padding, where the adapter can be applied so."""
        return self.missing("packing") is None

    @abstractmethod
    def blocks(self) -> dict[str, nn.Module]:
        """Module path -> block, in the order of the forward; of all stacks.

        An adapter wraps the linears inside; a block is what gradient checkpointing recomputes.
        """

    def attentions(self) -> dict[str, str]:
        """Where an adapter's prefix may be met -> module path of the block that it is in. A block's
        own attention has the block's path; another of the same block, to what another stack read,
        a path of its own and a place behind all of those."""
        return {path: path for path in self.blocks()}

    def fusing(self) -> tuple[str, ...]:
        """Those of `attentions` where a text that another model read is met beside the input
        (fusion.py)."""
        return tuple(self.attentions())

    def keys_and_values(self, place: str, states_TPH: Tensor) -> Tensor:
        """What one of `attentions` makes of hidden states that no token stands behind, keys before
        values, (T, 2, G, P, F): by the modules that it calls itself, which are frozen, and with the
        positions right before a prompt's. Of a model that `missing` does not refuse.

        Args:
            place: which.
            states_TPH: as they would come into the block, or, where what another stack read is met,
                as they would come from that stack.

        Raises:
            UserError: the class does not say what its attention makes of them.
        """
        raise UserError(
            f"{type(self.module).__name__}: {type(self).__name__} does not say what its attention "
            "makes of given states; set another model.hypernetwork.kind, such as prefix"
        )

    def is_written(self, path: str) -> bool:
        """Whether the block or linear at this module path runs over an answer's tokens alone, as
        what writes does where another stack reads. For FLOPs."""
        return False

    def linears(self) -> dict[str, nn.Module]:
        """Module path -> linear of all blocks that is called; `linear_sizes` says how wide one
        is."""
        return {
            f"{path}.{inner}": module
            for path, block in self.blocks().items()
            for inner, module in block.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
            and not _is_router(module)
            and inner.rpartition(".")[2] not in _NEVER_CALLED
        }

    @abstractmethod
    def hidden(
        self,
        batch: TokenBatch,
        embeddings_ESH: Tensor | None = None,
        adapter: "Adapter | None" = None,
        *,
        checkpointing: bool = False,
    ) -> Tensor:
        """The last layer's states (E, S, H) of right-padded rows.

        Args:
            batch: its tokens.
            embeddings_ESH: read in place of them.
            adapter: one for all rows.
            checkpointing: recompute each block in the backward pass.
        """

    def states(
        self,
        batch: TokenBatch,
        embeddings_ESH: Tensor | None = None,
        adapter: "Adapter | None" = None,
        *,
        checkpointing: bool = False,
    ) -> Tensor:
        """The last layer's states after every token of each row, for who attends to a whole text. A
        model that can reads it packed, unless embeddings are given.

        Args:
            batch: its tokens.
            embeddings_ESH: read in place of them; None: they are embedded as they are.
            adapter: one for all rows; None: the bare base.
            checkpointing: recompute each block in the backward pass.

        Returns:
            (E, S, H), zero in the padding.
        """
        if self.packs and embeddings_ESH is None:
            return batch.in_rows(self.packed_states(batch, adapter, checkpointing=checkpointing))
        hidden_ESH = self.hidden(batch, embeddings_ESH, adapter, checkpointing=checkpointing)
        if not batch.has_padding:
            return hidden_ESH
        return hidden_ESH.masked_fill(~batch.real_ES[..., None], 0)

    def states_of_blocks(
        self,
        batch: TokenBatch,
        embeddings_ESH: Tensor | None = None,
        adapter: "Adapter | None" = None,
        *,
        checkpointing: bool = False,
    ) -> Tensor:
        """`states` and, behind them, what came into each of `blocks`, side by side.

        Args:
            batch: its tokens.
            embeddings_ESH: read in place of them; None: they are embedded as they are.
            adapter: one for all rows; None: the bare base.
            checkpointing: recompute each block in the backward pass.

        Returns:
            (E, S, X), zero in the padding; X is (1 + blocks) x H.
        """
        came_in: list[Tensor] = []

        def keep(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            came_in.append(arguments[0] if arguments else named["hidden_states"])

        # On the outermost modules of the blocks: what recomputes one in the backward pass is in it.
        handles = [
            block.register_forward_pre_hook(keep, with_kwargs=True)
            for block in self.blocks().values()
        ]
        try:
            states_ESH = self.states(batch, embeddings_ESH, adapter, checkpointing=checkpointing)
        finally:
            for handle in handles:
                handle.remove()
        is_packed = self.packs and embeddings_ESH is None
        rows = [batch.in_rows(one[0]) if is_packed else one for one in came_in]
        all_ESX = torch.cat([states_ESH, *rows], -1)
        if is_packed or not batch.has_padding:
            return all_ESX
        return all_ESX.masked_fill(~batch.real_ES[..., None], 0)

    def last_states(
        self,
        batch: TokenBatch,
        embeddings_ESH: Tensor | None = None,
        adapter: "Adapter | None" = None,
        *,
        checkpointing: bool = False,
    ) -> Tensor:
        """The last layer's states after the last token of each row, which has read all of it. A
        model that can reads it packed, unless embeddings are given.

        Args:
            batch: its tokens.
            embeddings_ESH: read in place of them; None: they are embedded as they are.
            adapter: one for all rows; None: the bare base.
            checkpointing: recompute each block in the backward pass.

        Returns:
            (E, H).
        """
        if self.packs and embeddings_ESH is None:
            states_NH = self.packed_states(batch, adapter, checkpointing=checkpointing)
            return states_NH.index_select(0, batch.packed.last_E)
        hidden_ESH = self.hidden(batch, embeddings_ESH, adapter, checkpointing=checkpointing)
        rows_E = torch.arange(len(hidden_ESH), device=hidden_ESH.device)
        return hidden_ESH[rows_E, batch.lengths_E - 1]

    def packed_states(
        self, batch: TokenBatch, adapter: "Adapter | None" = None, *, checkpointing: bool = False
    ) -> Tensor:
        """The last layer's states (N, H) of all tokens, read end to end: of a model that `packs`.

        Args:
            batch: its tokens.
            adapter: one for all rows.
            checkpointing: recompute each block in the backward pass.
        """
        raise NotImplementedError

    @abstractmethod
    def label_states(
        self,
        batch: TokenBatch,
        adapter: "Adapter | None" = None,
        num_tasks: int = 1,
        *,
        soft: Tensor | None = None,
        instruction: Tensor | None = None,
        packed: bool = False,
        checkpointing: bool = False,
    ) -> Tensor:
        """The states (K, H) that predict the batch's labels, in row-major order; `head` makes their
        logits. A model that cannot part the two gives the logits (K, V) themselves.

        Looks into no tensor: it waits for no GPU and gives shapes on the meta device.

        Args:
            batch: prompts with targets.
            adapter: its rows are the batch's `num_tasks` tasks.
            num_tasks: T; each has E / T consecutive rows.
            soft: see `embed`.
            instruction: see `embed`.
            packed: run one sequence of all tokens instead of padded rows, where `missing` allows.
            checkpointing: recompute each block in the backward pass.
        """

    def label_states_together(
        self, passages: Sequence[Passage], *, checkpointing: bool = False
    ) -> list[Tensor]:
        """The `label_states` of each, read packed and end to end in one pass: of a model that
        `packs`, where `together.can_read_together` allows.

        Args:
            passages: what is read, none under another's adapter.
            checkpointing: recompute each block in the backward pass.
        """
        raise NotImplementedError

    def head(self, states_XH: Tensor) -> Tensor:
        """Logits (X, V) of some of `label_states`, with all that the model does to logits."""
        return states_XH

    def score(self, batch: TokenBatch, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Logits (K, V) that predict the batch's labels, and those labels (K,); arguments as in
        `label_states`."""
        return self.head(self.label_states(batch, *arguments, **options)), batch.labels_K

    @abstractmethod
    def logits(
        self, batch: TokenBatch, adapter: "Adapter | None" = None, soft: Tensor | None = None
    ) -> Tensor:
        """Logits for each token of the prompts but virtual ones: of what comes after it, or, where
        another stack writes, of that token itself as the answer.

        Args:
            batch: prompts without targets.
            adapter: its tasks have equally many consecutive rows each; None: the bare base.
            soft: see `embed`.

        Returns:
            (E, S - P, V); what stands where a row is padded means nothing.
        """

    @abstractmethod
    def stream(
        self,
        prompts: TokenBatch,
        adapter: "Adapter | None" = None,
        *,
        soft: Tensor | None = None,
        instruction: Tensor | None = None,
    ) -> Stream:
        """The prompts read, to be continued.

        Args:
            prompts: without targets.
            adapter: its tasks have equally many consecutive rows each; None: the bare base.
            soft: see `embed`.
            instruction: see `embed`.
        """


LANGUAGE_MODELS: dict[type[PreTrainedConfig], str | type[LanguageModel]] = {
    PreTrainedConfig: "ship_ds.model.decoder_only:DecoderOnly",
    T5Config: "ship_ds.model.encoder_decoder:EncoderDecoder",
}
"""By the class of the transformers config, or the nearest one that it derives from."""


def implementation(config: PreTrainedConfig) -> type[LanguageModel]:
    """The class that knows models with this transformers config."""
    nearest = next(base for base in type(config).__mro__ if base in LANGUAGE_MODELS)
    chosen = LANGUAGE_MODELS[nearest]
    if isinstance(chosen, str):
        module, _, name = chosen.partition(":")
        imported: type[LanguageModel] = getattr(importlib.import_module(module), name)
        return imported
    return chosen


def auto_class(config: PreTrainedConfig) -> Any:
    """The transformers class that makes models with this config.

    Raises:
        UserError: it makes none of this architecture.
    """
    chosen = implementation(config).auto_class
    if type(config) not in chosen._model_mapping:
        kind, way_out = _kind_and_way_out(config)
        raise UserError(
            f"{config.model_type}: {chosen.__name__} knows no such model{kind}; {way_out}"
        )
    if reason := implementation(config).unfit.get(config.model_type):
        raise UserError(f"{config.model_type}: {reason}; give another base")
    return chosen


def _is_router(module: nn.Module) -> bool:
    """Whether what is a linear by its class gives more than a product: a choice of experts, as
    PhiMoE's. transformers has such a class beside its model, those of quantisation elsewhere."""
    kind = type(module)
    is_of_model = kind.__module__.startswith("transformers.models.")
    return is_of_model and kind.forward is not nn.Linear.forward


_OF_LATENTS = "kv_b_proj"
"""The linear of which an attention makes keys and values of cached latents, as DeepSeek's does."""


def _latent_size(settings: Any) -> int:
    """Numbers that such an attention caches of a token, those by which an indexer finds it
    included."""
    names = ("kv_lora_rank", "qk_rope_head_dim", "index_head_dim")
    return sum(getattr(settings, name, None) or 0 for name in names)


_NEVER_CALLED = ("dt_proj",)
"""Linears of which a block reads the weight, as the state-space layers of a Jamba: what an adapter
adds to their output is in no answer, and would be in those of a merged model."""

TEXT_MODEL = "give a decoder-only model of texts, such as the one inside it saved by itself"


def reads_more_than_texts(config: PreTrainedConfig) -> bool:
    """Whether a model reads images or sounds, with a language model inside it."""
    return hasattr(config, "vision_config") or hasattr(config, "audio_config")


def fills_in_words(config: PreTrainedConfig) -> bool:
    """Whether a model of one stack reads texts in both directions, as BERT does, so that what it
    says of a word has seen the words after it."""
    return (
        type(config) in AutoModelForMaskedLM._model_mapping
        and not getattr(config, "is_encoder_decoder", False)
        and not getattr(config, "is_decoder", False)
    )


def _kind_and_way_out(config: PreTrainedConfig) -> tuple[str, str]:
    """What a model is that continues no text, as far as its config tells, and what to do."""
    if reads_more_than_texts(config):
        return ", which reads more than texts", TEXT_MODEL
    if fills_in_words(config):
        return (
            ", which fills in words and continues no text (an encoder)",
            "give a decoder-only model",
        )
    return (
        "",
        "give a decoder-only model, or write a language model of your own for it "
        "(docs/extending.md)",
    )


def without_weights(config: PreTrainedConfig, **how: Any) -> Any:
    """The transformers model of a config, for its shapes.

    Args:
        config: of the model.
        how: as transformers' `from_config` takes it.

    Raises:
        UserError: see `auto_class`; or it describes no model.
    """
    chosen = auto_class(config)
    try:
        model = chosen.from_config(config, **how)
    except (MemoryError, ImportError):
        raise
    # A size or a name that no module takes: of any class, as deep as it is met.
    except Exception as error:
        path = Path(config.name_or_path or "the model's") / "config.json"
        raise UserError(
            f"{path}: no {config.model_type} can be made of it: {first_line(error)}; correct it, "
            "or download it again"
        ) from error
    if implementation(config).has_own_output(config):
        output = model.get_output_embeddings()
        output.weight = nn.Parameter(torch.empty_like(output.weight))
    return model


def language_model(module: nn.Module) -> LanguageModel:
    """The port around a transformers model."""
    config: Any = module.config
    return implementation(config)(module)
