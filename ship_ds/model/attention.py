"""Which attention runs: SDPA on the CPU; on CUDA `flash_attn` or torch's variable-length kernel,
which compute nothing for padding.

`ship_varlen` is registered with transformers as a mask and an attention function. It takes torch's
kernel where that one runs (CUDA, 16 bits) and the tokens lie as in training: packed, or whole rows.
Everything else, generation with a cache and left padding included, goes through SDPA with
transformers' own mask, so one loaded model serves both.

`ship_sdpa` is SDPA with transformers' own mask. Both let each row attend to an adapter's prefix as
well: keys and values that a block hands down as `ship_prefix` (adapters/sites.py).

Letters: E sequences, S padded length, N packed tokens, A attention heads, G key-value heads,
F size of an attention head.
"""

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from ship_ds.errors import UserError

Choice = Literal["auto", "sdpa", "varlen", "flash"]
SDPA, VARLEN, FLASH = "ship_sdpa", "ship_varlen", "flash_attention_2"
PACKS = (VARLEN, FLASH)
"""Implementations for which a packed batch costs less than a padded one."""
TAKES_PREFIX = [SDPA, VARLEN]
"""Implementations that attend to an adapter's prefix; the planner adds its own."""


def this_machine() -> torch.device:
    """The GPU, where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve(choice: Choice, device: torch.device, caps_scores: bool = False) -> str:
    """The transformers `attn_implementation` for a model that will run on `device`.

    Args:
        choice: what the config asks for.
        device: where the model will run.
        caps_scores: the model soft-caps its attention scores (Gemma 2), which neither SDPA nor
            torch's kernel can do.

    Raises:
        UserError: the choice cannot run there.
    """
    on_cuda, has_flash = device.type == "cuda", importlib.util.find_spec("flash_attn") is not None
    if choice in ("varlen", "flash") and not on_cuda:
        raise UserError(
            f"model.attention={choice}: needs CUDA, and the model runs on "
            f"{device.type}; set it to auto or sdpa"
        )
    if choice == "flash" and not has_flash:
        raise UserError(
            "model.attention=flash: flash_attn is not installed; install "
            "ship-ds[flash] or set it to auto"
        )
    if choice in ("varlen", "sdpa") and caps_scores:
        raise UserError(
            f"model.attention={choice}: this model soft-caps its attention scores, "
            "which needs auto or flash"
        )
    if choice == "flash" or (choice == "auto" and on_cuda and has_flash):
        return FLASH
    if caps_scores:
        return "eager"
    return VARLEN if on_cuda and choice in ("auto", "varlen") else SDPA


def kernel_runs(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether torch's variable-length kernel takes tensors of this device and type."""
    return torch.device(device).type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def needs_no_mask(implementation: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this model's attention goes by lengths alone where tokens lie as in training."""
    return implementation == VARLEN and kernel_runs(device, dtype)


def no_mask(device: torch.device) -> Tensor:
    """A mask that `varlen_forward` takes for none and transformers passes on as it is.

    Where it is given no mask, transformers looks whether the positions start again somewhere, to
    make one that keeps packed samples apart. That look makes the host wait for the GPU in every
    forward, for a mask that the kernel does not need.
    """
    return torch.empty(0, 0, 0, 0, dtype=torch.bool, device=device)


def varlen_mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """None where `varlen_forward` takes the kernel, else the mask that SDPA needs."""
    if attention_mask is None and q_length == kv_length and kernel_runs(device, dtype):
        return None
    mask: Tensor | None = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        dtype=dtype,
        device=device,
        **kwargs,
    )
    return mask


def varlen_attn(*args: Any, **kwargs: Any) -> Any:
    """torch's kernel, imported at its first use: it brings the compiler along, a second or two that
    a process on a CPU has no use for."""
    from torch.nn.attention.varlen import varlen_attn as kernel

    return kernel(*args, **kwargs)


def varlen_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: query (E, A, S, F), key and value (E, G, S, F) -> (E, S, A, F).

    Sequences end where `cu_seq_lens_q` says, else where `position_ids` start again, else at the end
    of each row.
    """
    ends: Tensor | None = kwargs.get("cu_seq_lens_q")
    if attention_mask is not None and not attention_mask.numel():
        attention_mask = None
    if (
        attention_mask is not None
        or query.shape[2] != key.shape[2]
        or not kernel_runs(query.device, query.dtype)
        or kwargs.get("ship_prefix") is not None
    ):
        # SDPA would let packed samples see each other: without a mask each row is one sequence.
        assert attention_mask is not None or ends is None or len(ends) == len(query) + 1
        kwargs |= {"sliding_window": sliding_window}
        return sdpa_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise UserError(
            "model.attention: torch's variable-length kernel has no attention dropout; "
            "set model.attention=sdpa"
        )
    rows, num_heads, length, head_size = query.shape
    longest = kwargs.get("max_length_q")
    if ends is None or longest is None:
        ends, longest = _ends(kwargs.get("position_ids"), rows, length, query.device)
    query_NAF, key_NGF, value_NGF = (
        states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)
    )
    # transformers' window counts the token itself, the kernel's those to its left.
    out_NAF = varlen_attn(
        query_NAF,
        key_NGF,
        value_NGF,
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=num_heads != key.shape[1],
    )
    assert isinstance(out_NAF, Tensor)
    return out_NAF.view(rows, length, num_heads, head_size), None


def _ends(
    position_ids: Tensor | None, rows: int, length: int, device: torch.device
) -> tuple[Tensor, int]:
    """Cumulative lengths (one more than there are sequences, int32) and the longest length."""
    if position_ids is None:
        return torch.arange(
            0, (rows + 1) * length, length, dtype=torch.int32, device=device
        ), length
    (ends, _), (longest, _) = prepare_fa_kwargs_from_position_ids(position_ids.expand(rows, length))
    return ends, int(longest)


def prepend(
    prefix: tuple[Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sliding_window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with an adapter's before them, and a mask by which every query sees these.

    Args:
        prefix: keys and values (E, G, P, F), P of each row.
        query, key, value: see `sdpa_forward`.
        mask: of the keys there are, boolean or added to the scores; None: causal, within
            `sliding_window`.
    """
    keys, values = (states.to(key.dtype) for states in prefix)
    length, num_keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(length, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - length)
        if sliding_window is not None:  # the token itself is one of the window
            mask = mask.triu(num_keys - length - sliding_window + 1)
        mask = mask[None, None]
    seen = True if mask.dtype == torch.bool else 0.0
    mask = torch.nn.functional.pad(mask, (keys.shape[2], 0), value=seen)
    return torch.cat([keys, key], 2), torch.cat([values, value], 2), mask


def sdpa_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    ship_prefix: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: query (E, A, S, F), key and value (E, G, S, F) -> (E, S, A, F)."""
    if ship_prefix is not None:
        key, value, attention_mask = prepend(
            ship_prefix, query, key, value, attention_mask, kwargs.get("sliding_window")
        )
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **kwargs
    )
    return out


AttentionInterface.register(SDPA, sdpa_forward)
AttentionMaskInterface.register(SDPA, sdpa_mask)
AttentionInterface.register(VARLEN, varlen_forward)
AttentionMaskInterface.register(VARLEN, varlen_mask)
