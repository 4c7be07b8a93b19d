"""The sizes of a SHIP model that its FLOPs are a formula of (flops.py), read off its modules.

Letters: A attention heads, F size of an attention head, I inputs of a linear, O outputs of a
linear, P virtual tokens, H hidden size, Z latent size, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from torch import nn

from ship_ds.config import LoraTuning, ModelConfig, TrainedRoleConfig
from ship_ds.flops import Matrices, RoleSize, Rows, ShipSize, StepRows
from ship_ds.model.adapters.adapter import num_products
from ship_ds.model.adapters.sites import is_target
from ship_ds.model.language_model import LanguageModel, linear_sizes
from ship_ds.model.step import Parts, ShipBatch

_READ_BLOCK_INPUT = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv")
"""Names of the linears that read what comes into a block, in transformers' causal LMs."""
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
    task_llm = RoleSize(
        _matrices(_linears(task_lm)),
        _low_rank(_linears(task_lm), hypernetwork.ranks()),
        _attention(task_lm),
        task_lm.vocabulary_size * task_lm.hidden_size,
        is_trained=False,
        embeddings_have_gradient=has_soft_tokens,
        after=hypernetwork.products_after(),
        prefix=hypernetwork.prefix_length,
    )
    encoder_size = _role(config.encoder, encoder.language_model, encoder.head_products, False)
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
        hypernetwork.products_of_state(),
        hypernetwork.fuses,
    )


def rows_of(batch: ShipBatch) -> StepRows:
    """What the three language models read in a micro-step, without padding."""
    encoder, task_llm, decoder = (
        Rows.of(tokens.lengths, tokens.num_targets)
        for tokens in (batch.instructions, batch.answers, batch.decoded)
    )
    read, answered = batch.instructions.lengths, batch.answers.lengths
    rows_per_task = len(answered) // max(1, len(read))
    pairs = sum(length * read[row // rows_per_task] for row, length in enumerate(answered))
    return StepRows(encoder, task_llm, decoder, batch.num_tasks, pairs)


def _role(config: TrainedRoleConfig, lm: LanguageModel, head: int, is_decoder: bool) -> RoleSize:
    """The encoder gives states, the decoder logits, after soft tokens made of z."""
    linears, tuning = _linears(lm), config.tuning
    is_lora = isinstance(tuning, LoraTuning)
    targets = tuning.targets if isinstance(tuning, LoraTuning) else ()
    rank = tuning.rank if isinstance(tuning, LoraTuning) else 0
    ranks = {path: rank for path in linears if is_target(path, targets)}
    return RoleSize(
        _matrices(linears),
        _low_rank(linears, ranks),
        _attention(lm),
        lm.vocabulary_size * lm.hidden_size if is_decoder else 0,
        is_trained=not is_lora,
        embeddings_have_gradient=is_decoder or not is_lora,
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


def _matrices(linears: Mapping[str, nn.Module]) -> Matrices:
    sizes = {path: prod(linear_sizes(one)) for path, one in linears.items()}
    return Matrices(sum(sizes.values()), sum(sizes[path] for path in _reading(linears)))


def _low_rank(linears: Mapping[str, nn.Module], ranks: Mapping[str, int]) -> Matrices:
    """R (I + O) a linear; its A reads what the linear reads."""
    return Matrices(
        sum(rank * sum(linear_sizes(linears[path])) for path, rank in ranks.items()),
        sum(
            ranks[path] * linear_sizes(linears[path])[0]
            for path in _reading(linears)
            if path in ranks
        ),
    )


def _reading(linears: Mapping[str, nn.Module]) -> list[str]:
    """Those of the first block that read the embeddings."""
    first = next(iter(linears), "").split(".")
    # model.layers.0.self_attn.q_proj: the block is what comes down to the number
    number = next((i for i, name in enumerate(first) if name.isdecimal()), 0)
    block = ".".join(first[: number + 1]) + "."
    return [path for path in linears if path.startswith(block) and _name(path) in _READ_BLOCK_INPUT]


def _attention(lm: LanguageModel) -> int:
    settings = lm.module.config
    return len(lm.blocks()) * settings.num_attention_heads * lm.key_value_heads[1]
