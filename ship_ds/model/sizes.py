"""The sizes of a SHIP model that its FLOPs are a formula of (flops.py), read off its modules.

Letters: A attention heads, F size of an attention head, I inputs of a linear, O outputs of a
linear.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from math import prod

from torch import nn

from ship_ds.config import ModelConfig, TrainedRoleConfig
from ship_ds.flops import Matrices, RoleSize, Rows, ShipSize, StepRows, TwoStacks
from ship_ds.model.adapters.adapter import Hypernetwork, num_products
from ship_ds.model.adapters.sites import is_target
from ship_ds.model.language_model import LanguageModel, linear_sizes
from ship_ds.model.step import Parts, ShipBatch

_READ_BLOCK_INPUT = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "query_key_value",
    "Wqkv",
    "q",
    "k",
    "v",
)
"""Names of the linears that read what comes into a block, in transformers' causal LMs and T5."""
_WRAPPED = ("base",)
"""What a wrapper of a linear calls the one inside it."""


def size_of(config: ModelConfig, parts: Parts, decodes: bool = True) -> ShipSize:
    """The sizes of a model, on whatever device and however sharded: shapes alone are read.

    Args:
        config: the run's `model` section.
        parts: of the model.
        decodes: whether its decoder is trained, and so computes at all.
    """
    encoder, decoder, hypernetwork = parts.encoder, parts.decoder, parts.hypernetwork
    task_lm = parts.task_llm.language_model
    # In training a soft instruction is read as tokens, whose embeddings are frozen.
    has_soft_tokens = hypernetwork.num_virtual_tokens > 0
    task_llm = _stack(task_lm, hypernetwork, has_soft_tokens, writes=False)
    if any(map(task_lm.is_written, task_lm.blocks())):
        writing = _stack(task_lm, hypernetwork, False, writes=True)
        reading = {one.name: getattr(task_llm, one.name) for one in fields(task_llm)}
        task_llm = TwoStacks(**reading | {"output": 0}, writing=writing)
    encoder_size = _role(config.encoder, encoder.language_model, encoder.head_products, False)
    encoder_size = replace(encoder_size, chunk_tokens=encoder.chunk_tokens or 0)
    if encoder.pooling is not None:
        encoder_size = replace(encoder_size, pooling=encoder.pooling.num_products)
    decoder_size = RoleSize(Matrices(), Matrices(), 0, 0, False, False)
    if decodes:
        head = num_products(decoder.from_latent)
        decoder_size = _role(config.decoder, decoder.language_model, head, True)
    return ShipSize(
        encoder_size,
        task_llm,
        decoder_size,
        hypernetwork.num_products(),
        hypernetwork.products_of_base(),
        hypernetwork.products_of_state(),
        hypernetwork.base_products_of_state(),
        hypernetwork.fuses,
    )


def step_rows(batch: ShipBatch, encoder_size: RoleSize | None = None) -> StepRows:
    """What the three language models read in a micro-step, without padding.

    Args:
        batch: of the micro-step.
        encoder_size: of the encoder, which may read in chunks; None: it does not.
    """
    task_llm, decoder = (
        Rows.of(tokens.lengths, tokens.num_targets, tokens.target_lengths)
        for tokens in (batch.answers, batch.decoded)
    )
    texts = batch.instructions.lengths
    chunks = [
        part for text in texts for part in (encoder_size.chunks(text) if encoder_size else [text])
    ]
    encoder = Rows.of(chunks, 0, [0] * len(chunks))
    read, answered = batch.instructions.lengths, batch.answers.lengths
    rows_per_task = len(answered) // max(1, len(read))
    pairs = sum(length * read[row // rows_per_task] for row, length in enumerate(answered))
    targets = enumerate(batch.answers.target_lengths)
    written = sum(length * read[row // rows_per_task] for row, length in targets)
    return StepRows(encoder, task_llm, decoder, batch.num_tasks, pairs, written)


def _stack(
    lm: LanguageModel, hypernetwork: Hypernetwork, has_soft_tokens: bool, *, writes: bool
) -> RoleSize:
    """What of the Task LLM runs over an answer's tokens alone, or over the others: in a model of
    one stack over all."""
    all_linears, after = _linears(lm), hypernetwork.products_after()
    linears = {path: one for path, one in all_linears.items() if lm.is_written(path) == writes}
    ranks = {path: rank for path, rank in hypernetwork.ranks().items() if path in linears}
    blocks = _blocks(lm, writes)
    num_below = _num_below(lm, hypernetwork, blocks, writes)
    return RoleSize(
        _matrices(linears, blocks[num_below]),
        _low_rank(linears, ranks, blocks[num_below]),
        _attention(lm, len(blocks)),
        lm.vocabulary_size * lm.hidden_size,
        is_trained=False,
        embeddings_have_gradient=has_soft_tokens,
        after=sum(count for path, count in after.items() if path in linears),
        prefix=hypernetwork.prefix_length,
        attention_below=_attention(lm, num_below),
    )


def _blocks(lm: LanguageModel, writes: bool) -> list[str]:
    """Of the stack that writes, or of the other or only one."""
    return [path for path in lm.blocks() if lm.is_written(path) == writes]


def _num_below(
    lm: LanguageModel, hypernetwork: Hypernetwork, blocks: Sequence[str], writes: bool
) -> int:
    """How many of a stack's first blocks have no gradient, since all that is generated acts
    later."""
    changed = hypernetwork.ranks().keys() | hypernetwork.products_after().keys()
    # Every block of a writing stack meets what adapters of the other one changed.
    if writes and not all(map(lm.is_written, changed)):
        return 0
    if hypernetwork.num_virtual_tokens or hypernetwork.prefix_length or hypernetwork.fuses:
        return 0
    has_changed = (any(path.startswith(f"{block}.") for path in changed) for block in blocks)
    return next((number for number, one in enumerate(has_changed) if one), 0)


def _role(config: TrainedRoleConfig, lm: LanguageModel, head: int, is_decoder: bool) -> RoleSize:
    """The encoder gives states, the decoder logits, after soft tokens made of z."""
    linears, lora = _linears(lm), config.lora
    ranks = (
        {}
        if lora is None
        else {path: lora.rank for path in linears if is_target(path, lora.targets)}
    )
    blocks = _blocks(lm, False)
    return RoleSize(
        _matrices(linears, blocks[0]),
        _low_rank(linears, ranks, blocks[0]),
        _attention(lm, len(blocks)),
        lm.vocabulary_size * lm.hidden_size if is_decoder else 0,
        is_trained=lora is None,
        embeddings_have_gradient=is_decoder or lora is None,
        head=head,
    )


def _linears(lm: LanguageModel) -> dict[str, nn.Module]:
    """Path before any wrapping -> linear of the base."""
    return {
        ".".join(name for name in path.split(".") if name not in _WRAPPED): linear
        for path, linear in lm.linears().items()
    }


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _matrices(linears: Mapping[str, nn.Module], first: str) -> Matrices:
    sizes = {path: prod(linear_sizes(one)) for path, one in linears.items()}
    return Matrices(sum(sizes.values()), sum(sizes[path] for path in _reading(linears, first)))


def _low_rank(linears: Mapping[str, nn.Module], ranks: Mapping[str, int], first: str) -> Matrices:
    """R (I + O) a linear; its A reads what the linear reads."""
    return Matrices(
        sum(rank * sum(linear_sizes(linears[path])) for path, rank in ranks.items()),
        sum(
            ranks[path] * linear_sizes(linears[path])[0]
            for path in _reading(linears, first)
            if path in ranks
        ),
    )


def _reading(linears: Mapping[str, nn.Module], first: str) -> list[str]:
    """Those whose input has no gradient where the embeddings have none: of the first block that
    needs any, those that read what comes into it; and all of the blocks before."""
    in_first = [path.startswith(f"{first}.") for path in linears]
    num_before = in_first.index(True)
    return [
        path
        for number, path in enumerate(linears)
        if number < num_before or (in_first[number] and _reads_block_input(path))
    ]


def _reads_block_input(path: str) -> bool:
    # Cross-attention stands in the middle of a block, and its queries read what came before.
    return _name(path) in _READ_BLOCK_INPUT and "EncDecAttention" not in path


def _attention(lm: LanguageModel, num_blocks: int) -> int:
    """A F summed over so many blocks."""
    return num_blocks * lm.module.config.num_attention_heads * lm.key_value_heads[1]
