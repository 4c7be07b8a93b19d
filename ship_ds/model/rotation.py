"""Keys turned by some positions, as the rotary embedding of a transformers model turns them
(RoPE, Su et al. 2021, arXiv 2104.09864).

Letters: T tasks, G key-value heads, P virtual tokens, F size of an attention head.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ship_ds.errors import UserError


def rotation_of(lm: Any) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """What gives cosines and sines of positions, and what turns queries and keys by these, the same
    for every block; None: the model's positions are no such rotations that its module gives
    away."""
    rotary = getattr(lm.base_model, "rotary_emb", None)
    turn = getattr(sys.modules[type(lm).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or turn is None:
        return None
    # Gemma 3's asks for the kind of the block besides.
    is_one = list(inspect.signature(rotary.forward).parameters) == ["x", "position_ids"]
    return (rotary, turn) if is_one else None


def at_positions(lm: Any, keys_TGPF: Tensor, positions_P: Tensor) -> Tensor:
    """Keys as the model's blocks have those of tokens at these positions, which may be negative.

    Args:
        lm: a transformers causal LM with a `rotation_of` its own.
        keys_TGPF: as projected.
        positions_P: whole numbers.
    """
    rotation = rotation_of(lm)
    assert rotation is not None
    rotary, turn = rotation
    _, turned = turn(keys_TGPF, keys_TGPF, *rotary(keys_TGPF, positions_P[None]))
    placed: Tensor = turned
    return placed


def rotated_by(lm: Any, keys_GPF: Tensor, num_positions: int) -> Tensor:
    """Every key turned on by `num_positions`, or back by as many where it is negative.

    Args:
        lm: a transformers causal LM.
        keys_GPF: as they meet queries.
        num_positions: by how many.

    Raises:
        UserError: the model's positions are no rotations that its module gives away.
    """
    rotation = rotation_of(lm)
    kinds = set(getattr(lm.config, "layer_types", None) or ())
    if rotation is None or len(kinds) > 1:
        raise UserError(
            f"{type(lm).__name__}: its positions are not rotated alike in every block, so a prefix "
            "means something else in a folder of peft, where the prompt begins behind it; "
            "`ship-ds answer` applies the adapter"
        )
    rotary, turn = rotation
    place = torch.full((1, keys_GPF.shape[1]), abs(num_positions), device=keys_GPF.device)
    keys_1GPF = keys_GPF[None].float()
    cos, sin = rotary(keys_1GPF, place)
    # Some scale what they turn (YaRN); a model may turn a part of each head alone (Phi).
    scale, width = getattr(rotary, "attention_scaling", 1.0), cos.shape[-1]
    cos, sin = cos.float() / scale, sin.float() / scale
    sin = sin if num_positions >= 0 else -sin
    part = keys_1GPF[..., :width]
    _, turned = turn(part, part, cos, sin)
    turned = torch.cat([turned, keys_1GPF[..., width:]], -1)
    return turned[0].to(keys_GPF.dtype)
