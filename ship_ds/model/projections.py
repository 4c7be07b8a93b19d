"""Keys and values that a block would make of hidden states, by the modules that it would call
itself: the norm before its attention, its projections, the norm of its keys where it has one.

    states --input_layernorm--> --k_proj--> --(k_norm)--> --position--> keys
                                --v_proj------------------------------> values

Each module is called, whatever it is (4-bit, wrapped, sharded by ZeRO-3), and outside its block no
adapter is in it: what is made goes by the base's own weights. For the families that write their
attention as transformers' Llama does, which their source is asked for: another one may scale, clip
or leave out what stands here, and its keys would be wrong without a word.

Letters: T tasks, P virtual tokens, H hidden size, G key-value heads, F size of an attention head.
"""

import ast
import inspect
import textwrap
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.model.adapters.sites import AdaptedBlock
from ship_ds.model.rotation import at_positions, rotation_of

_NORM = "hidden_states = self.input_layernorm(hidden_states)"
_VALUES = "value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)"
_KEYS = "key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)"
_NORMED_KEYS = (
    "key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)"
)
_TURN = ast.unparse(
    ast.parse("query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)")
)
"""As the Python that runs writes a tuple."""


def inside(block: nn.Module) -> Any:
    """A block without what wraps it for adapters."""
    return block.block if isinstance(block, AdaptedBlock) else block


def can_project(lm: Any, blocks: list[nn.Module]) -> bool:
    """Whether `keys_and_values` is what these blocks of a transformers model would make."""
    attentions = [getattr(inside(block), "self_attn", None) for block in blocks]
    return rotation_of(lm) is not None and all(
        attention is not None
        and _norms_first(type(inside(block)).forward)
        and _has_llamas_keys(type(attention).forward)
        for block, attention in zip(blocks, attentions, strict=True)
    )


def keys_and_values(lm: Any, block: nn.Module, states_TPH: Tensor) -> Tensor:
    """What the block's attention makes of hidden states before position 0, (T, 2, G, P, F).

    Args:
        lm: the transformers model, which turns keys by their positions.
        block: of it; see `can_project`.
        states_TPH: as they would come into the block; the last one stands at position -1.
    """
    inner = inside(block)
    attention = inner.self_attn
    normed_TPH = inner.input_layernorm(states_TPH)
    keys_TPGF, values_TPGF = (
        project(normed_TPH).unflatten(2, (-1, attention.head_dim))
        for project in (attention.k_proj, attention.v_proj)
    )
    if _NORMED_KEYS in _written(type(attention).forward, "key_states"):
        keys_TPGF = attention.k_norm(keys_TPGF)
    positions_P = torch.arange(-states_TPH.shape[1], 0, device=states_TPH.device)
    keys_TGPF = at_positions(lm, keys_TPGF.transpose(1, 2), positions_P)
    return torch.stack([keys_TGPF, values_TPGF.transpose(1, 2)], 1)


def _norms_first(forward: Any) -> bool:
    """Whether a block's forward gives its attention the normed input and nothing else."""
    norm, attend, *_ = *_written(forward, "hidden_states"), "", ""
    return norm == _NORM and " = self.self_attn(" in attend


def _has_llamas_keys(forward: Any) -> bool:
    """Whether an attention's forward makes keys and values as Llama's does, or with normed keys as
    Qwen3's, at every call. What it gets back of the cache is no matter."""
    always = _written(forward, "key_states", "value_states", nested=False)
    made = [one for one in _written(forward, "key_states", "value_states") if _CACHE not in one]
    return (
        made == always
        and made in ([_KEYS, _VALUES, _TURN], [_NORMED_KEYS, _VALUES, _TURN])
        and _attends_once(forward)
    )


@cache
def _attends_once(forward: Any) -> bool:
    """Whether what a function makes as keys and values goes, as it is, through the cache into one
    attention and nowhere else: not in halves, as in differential attention, nor into a mask."""
    nodes = [*ast.walk(_parsed(forward))]
    calls = [one for one in nodes if isinstance(one, ast.Call)]
    attends = [one for one in calls if ast.unparse(one.func) == "attention_interface"]
    reads = Counter(
        one.id for one in nodes if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)
    )
    # The rotation reads the keys besides.
    reads_as_llama = reads["key_states"] == 3 and reads["value_states"] == 2
    arguments = [ast.unparse(one) for call in attends for one in call.args]
    return reads_as_llama and arguments[1:4] == ["query_states", "key_states", "value_states"]


_CACHE = " = past_key_values.update(key_states, value_states, "


@cache
def _written(forward: Any, *names: str, nested: bool = True) -> list[str]:
    """The statements of a function that give one of these names a value, in their order; those
    below an `if` and its like only where `nested`."""
    function = _parsed(forward)
    statements = [one for top in function.body for one in (ast.walk(top) if nested else [top])]
    return [
        ast.unparse(one)
        for one in statements
        if isinstance(one, ast.Assign | ast.AugAssign | ast.AnnAssign)
        and not _given_a_value(one).isdisjoint(names)
    ]


def _parsed(forward: Any) -> ast.FunctionDef:
    [function, *_] = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    assert isinstance(function, ast.FunctionDef)
    return function


def _given_a_value(statement: ast.stmt) -> set[str]:
    names = (one for one in ast.walk(statement) if isinstance(one, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}
