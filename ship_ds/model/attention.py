"""Which attention runs: SDPA; on CUDA in 16 bits `flash_attn` or torch's variable-length kernel.

Linear layers take the tokens of a batch end to end, without padding; attention alone needs to know
where a sequence ends. `flash_attn` and torch's kernel take cumulative lengths. SDPA takes rows:
`ship_sdpa` lays the packed queries, keys and values out in groups of rows of about one length
(`batch.RowGroups`, made on the host), attends within each and puts the outputs end to end again.

`ship_varlen` takes torch's kernel where that one runs (CUDA, 16 bits) and the tokens lie as in
training: packed, or whole rows. Everything else, generation with a cache and left padding included,
goes through SDPA with transformers' own mask, so one loaded model serves both.

Both let each row attend to an adapter's prefix as well: keys and values that a block hands down as
`ship_prefix` (adapters/sites.py).

Letters: E sequences, S padded length, N packed tokens, A attention heads, G key-value heads,
F size of an attention head, P virtual tokens, X other letters flattened.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils.import_utils import is_flash_attn_2_available

from ship_ds.errors import UserError
from ship_ds.model.batch import RowGroups

Choice = Literal["auto", "sdpa", "varlen", "flash"]
SDPA, VARLEN, FLASH = "ship_sdpa", "ship_varlen", "flash_attention_2"
PACKS = [SDPA, VARLEN, FLASH]
"""Implementations that keep packed sequences apart without a mask of all tokens by all tokens."""
TAKES_PREFIX = [SDPA, VARLEN]
"""Implementations that attend to an adapter's prefix; the planner adds its own to both lists."""


def this_machine() -> torch.device:
    """The GPU, where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve(
    choice: Choice,
    device: torch.device,
    dtype: torch.dtype,
    caps_scores: bool = False,
    takes_others: bool = True,
    goes_by_lengths: bool = True,
) -> str:
    """The transformers `attn_implementation` for a model that will run on `device` in `dtype`.

    Args:
        choice: what the config asks for.
        device: where the model will run.
        dtype: of its queries, keys and values.
        caps_scores: the model soft-caps its attention scores (Gemma 2), which neither SDPA nor
            torch's kernel can do.
        takes_others: transformers' class of the model takes an attention that is not its own
            (GPT-OSS, whose heads have sinks, does not).
        goes_by_lengths: kernels for variable lengths can run it (T5's, with its bias by distance,
            they cannot).

    Raises:
        UserError: the choice cannot run there.
    """
    if not goes_by_lengths:
        if choice in ("varlen", "flash"):
            raise UserError(
                f"model.attention={choice}: this model adds a bias to its attention scores, which "
                "that kernel does not know; set it to auto or sdpa"
            )
        return SDPA
    if not takes_others:
        if choice != "auto":
            raise UserError(
                f"model.attention={choice}: this model has an attention of its own; set it to auto"
            )
        return "eager"
    reason = _why_no_kernel(device, dtype)
    if choice in ("varlen", "flash") and reason is not None:
        raise UserError(f"model.attention={choice}: {reason}; set it to auto or sdpa")
    # Asked after the device: flash_attn of version 4 alone is another package under this name.
    has_flash = reason is None and is_flash_attn_2_available()
    if choice == "flash" and not has_flash:
        raise UserError(
            "model.attention=flash: flash_attn 2 is not installed; install "
            "ship-ds[flash] or set it to auto"
        )
    if choice in ("varlen", "sdpa") and caps_scores:
        raise UserError(
            f"model.attention={choice}: this model soft-caps its attention scores, "
            "which needs auto or flash"
        )
    if choice == "flash" or (choice == "auto" and has_flash):
        return FLASH
    if caps_scores:
        return "eager"
    return VARLEN if reason is None and choice in ("auto", "varlen") else SDPA


def _why_no_kernel(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why neither flash_attn nor torch's variable-length kernel runs; None where both do."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"needs CUDA, and the model runs on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bf16 or fp16, and the model is in {str(dtype).removeprefix('torch.')}"
    capability = _capability(device.index)
    if capability < (8, 0):
        return f"needs a GPU of capability 8.0, and this one has {capability[0]}.{capability[1]}"
    return None


@lru_cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def kernel_runs(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether torch's variable-length kernel takes tensors of this device and type."""
    return _why_no_kernel(device, dtype) is None


def needs_no_mask(implementation: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this model's attention goes by lengths alone where tokens lie as in training.

    Args:
        implementation: the name of its attention for transformers, as `resolve` gives it.
        device: where the model runs.
        dtype: of its queries, keys and values.
    """
    return implementation == VARLEN and kernel_runs(device, dtype)


def no_mask(device: torch.device) -> Tensor:
    """A mask that our functions take for none and transformers passes on as it is.

    Where it is given no mask, transformers looks whether the positions start again somewhere, to
    make one that keeps packed samples apart. That look makes the host wait for the GPU in every
    forward, for a mask of all tokens by all tokens that nobody here needs.
    """
    return torch.empty(0, 0, 0, 0, dtype=torch.bool, device=device)


def no_mask_of_packed(device: torch.device) -> Tensor:
    """As `no_mask`, for packed tokens: attention that then is not told where they end refuses them,
    where it would let samples see each other without a word."""
    return torch.empty(1, 0, 0, 0, dtype=torch.bool, device=device)


def varlen_mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """None where `varlen_forward` can take the kernel, else the mask that SDPA needs.

    Args:
        q_length: tokens of a row that ask.
        kv_length: tokens of a row that are asked, those in the cache included.
        attention_mask: (E, keys), False where a token is padding; None: no row is padded.
        dtype: of the model's states.
        device: where the model runs.
        kwargs: of transformers, for its `sdpa_mask`.

    Returns:
        (E, 1, S, keys), True where a token sees a key; None also where SDPA's own causal mask does.
    """
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
    """transformers' signature: query (E, A, S, F), key and value (E, G, S, F) -> (E, S, A, F);
    values, and then the output, may be narrower.

    Sequences end where `cu_seq_lens_q` says, else where `position_ids` start again, else at the end
    of each row. `sdpa_forward` runs where the kernel does not, or there is a mask, a cache or a
    prefix.

    Args:
        module, query, key, value, attention_mask, dropout, scaling: as transformers gives them.
        sliding_window: how many keys a token sees, its own included; None: all up to its own.
        kwargs: of transformers, and those that `sdpa_forward` takes besides.

    Returns:
        The output, (E, S, A, F), and None in place of the weights.

    Raises:
        UserError: the blocks do not hand on where packed sequences end, ask for attention that is
            not known here, or for dropout in the kernel.
    """
    ends: Tensor | None = kwargs.get("cu_seq_lens_q")
    knows_ends = ends is not None or kwargs.get("ship_rows") is not None
    attention_mask = _none_if_empty(attention_mask, module, knows_ends)
    if (
        attention_mask is not None
        or query.shape[2] != key.shape[2]
        or not kernel_runs(query.device, query.dtype)
        or kwargs.get("ship_prefix") is not None
    ):
        # SDPA would let packed samples see each other: without rows and without a mask each row of
        # the batch is one sequence.
        is_apart = attention_mask is not None or kwargs.get("ship_rows") is not None
        assert is_apart or ends is None or len(ends) == len(query) + 1
        kwargs |= {"sliding_window": sliding_window}
        return sdpa_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    _refuse_unknown(module, kwargs)
    if dropout:
        raise UserError(
            "model.attention: torch's variable-length kernel has no attention dropout; "
            "set model.attention=sdpa"
        )
    rows, num_heads, length, head_size = query.shape
    value_size = value.shape[3]
    # The kernel takes one size. Values of DeepSeek's latent attention are narrower than its keys;
    # zeros beside them give zeros beside the output.
    if value_size < head_size:
        value = nn.functional.pad(value, (0, head_size - value_size))
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
    return out_NAF.view(rows, length, num_heads, head_size)[..., :value_size], None


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


Prefix = tuple[Tensor, Tensor, Tensor | None]
"""Keys and values, (E, G, P, F) each, that a block attends to before its own, and which of them a
row sees, (E, P); None: all. A plain tuple, in which ZeRO-3's hooks find tensors."""


def prefix_of(prefix: Prefix, row_E: Tensor) -> Prefix:
    """That of these rows."""
    keys, values, seen = prefix
    return keys[row_E], values[row_E], None if seen is None else seen[row_E]


def prepend(
    prefix: Prefix,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sliding_window: int | None = None,
    is_causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with an adapter's before them, and a mask by which every query sees these, or
    those of them that its row sees.

    Args:
        prefix: keys and values (E, G, P, F), P of each row, and which of these it sees.
        query, key, value: see `sdpa_forward`.
        mask: of the keys there are, boolean or added to the scores; None: causal, within
            `sliding_window`.
        sliding_window: of so many tokens that a query sees, itself among them; None: of all.
        is_causal: else no mask hides nothing.
    """
    keys, values, seen_EP = prefix
    keys, values = keys.to(key.dtype), values.to(key.dtype)
    length, num_keys = query.shape[2], key.shape[2]
    if mask is None and is_causal:
        mask = _causal(length, num_keys, sliding_window, query.device)
    elif mask is None:
        mask = torch.ones(1, 1, length, num_keys, dtype=torch.bool, device=query.device)
    is_boolean = mask.dtype == torch.bool
    if seen_EP is None:
        mask = torch.nn.functional.pad(mask, (keys.shape[2], 0), value=True if is_boolean else 0.0)
    else:
        before = seen_EP if is_boolean else mask.new_zeros(()).where(seen_EP, -torch.inf)
        before = before[:, None, None].expand(-1, -1, mask.shape[2], -1)
        mask = torch.cat([before, mask.expand(len(before), -1, -1, -1)], 3)
    return torch.cat([keys, key], 2), torch.cat([values, value], 2), mask


def sdpa_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    ship_prefix: Prefix | None = None,
    ship_rows: RowGroups | None = None,
    ship_cross_prefix: Prefix | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: query (E, A, S, F), key and value (E, G, S, F) -> (E, S, A, F);
    values, and then the output, may be narrower.

    Args:
        module, query, key, value, attention_mask, dropout, scaling: as transformers gives them.
        ship_prefix: see `prepend`; its rows are the sequences.
        ship_cross_prefix: that of a block's attention to another stack, in place of ship_prefix.
        ship_rows: where the rows of packed tokens are, which lie as one row, E = 1.
        kwargs: of transformers.
    """
    if is_cross_attention(module):
        ship_prefix = ship_cross_prefix
    # A bias by distance (T5's) is for whole rows alone.
    _refuse_unknown(module, kwargs, () if ship_rows is not None else ("position_bias",))
    attention_mask = _none_if_empty(attention_mask, module, ship_rows is not None)
    if ship_rows is not None:
        assert attention_mask is None
        window = kwargs.pop("sliding_window", None)

        def attend(q: Tensor, k: Tensor, v: Tensor, row_E: Tensor) -> Tensor:
            length, mask = q.shape[2], None
            if ship_prefix is None and window is None and not dropout and _is_slow_in_sdpa(q):
                return by_products(q, k, v, scaling)
            if ship_prefix is not None:
                k, v, mask = prepend(prefix_of(ship_prefix, row_E), q, k, v, None, window)
            elif window is not None and window < length:
                mask = _causal(length, length, window, q.device)
            out: Tensor = sdpa_attention_forward(module, q, k, v, mask, dropout, scaling, **kwargs)[
                0
            ]
            return out

        return packed_in_rows(attend, (query, key, value), ship_rows), None
    if ship_prefix is not None:
        key, value, attention_mask = prepend(
            ship_prefix,
            query,
            key,
            value,
            attention_mask,
            kwargs.get("sliding_window"),
            getattr(module, "is_causal", True),
        )
        if (bias := kwargs.get("position_bias")) is not None:
            # What has no place among the tokens is at no distance from any.
            kwargs["position_bias"] = torch.nn.functional.pad(bias, (ship_prefix[0].shape[2], 0))
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **kwargs
    )
    return out


def is_cross_attention(module: nn.Module) -> bool:
    """Whether a stack that writes meets another one's states here: T5 builds the two attentions of
    a block alike, but for this."""
    attention: Any = module
    return getattr(attention, "is_decoder", False) is True and not attention.is_causal


_LONGEST_BY_PRODUCTS = 256
"""Keys of a row up to which `by_products` is quicker than SDPA, forward and backward: on a Xeon
with AMX 4 times at 55 keys, 1.5 times at 256, and slower from 512 on."""


def _is_slow_in_sdpa(query: Tensor) -> bool:
    """Whether torch's fused attention takes longer than plain products would: its backward pass in
    16 bits on a CPU makes one small product for each row, head and block."""
    return (
        query.device.type == "cpu"
        and query.element_size() == 2
        and query.shape[2] <= _LONGEST_BY_PRODUCTS
        and torch.is_grad_enabled()
        and query.requires_grad
    )


def by_products(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """Causal attention by two batched products and a softmax, (E, S, A, F of a value).

    The query heads that share a key head lie end to end as rows of one product, so that keys and
    values are not repeated. Keeps the weights (E, A, S, S) for the backward pass.

    Args:
        query: (E, A, S, F).
        key, value: (E, G, S, F); a value's F may be another.
        scaling: of the scores; None: 1 / sqrt(F).
    """
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    out: Tensor = _ByProducts.apply(query, key, value, scaling)
    return out


class _ByProducts(torch.autograd.Function):
    """One node where the operations would be twelve, and the future is hidden in place. Queries and
    scores lie as (E x G, query heads of a key head x S, ...), keys and values as (E x G, S, F)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        num_rows, num_heads, length, head_size = query.shape
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        # Scaled before the product: F numbers a token instead of S.
        scaled = torch.mul(query, scaling, out=query.new_empty(query.shape))
        queries = scaled.view(len(keys), -1, head_size)
        scores = torch.bmm(queries, keys.mT)
        by_head = scores.view(num_rows * num_heads, length, length)
        by_head.masked_fill_(_future(length, query.device), -torch.inf)
        weights = scores.softmax(-1)
        out = torch.bmm(weights, values)
        ctx.save_for_backward(queries, keys, values, weights)
        ctx.scaling = scaling
        # DeepSeek's values are not as wide as its keys.
        return out.view(num_rows, num_heads, length, value.shape[3]).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, weights = ctx.saved_tensors
        num_rows, length, _, value_size = grad.shape
        grad_out = grad.transpose(1, 2).reshape(len(values), -1, value_size)
        grad_value = torch.bmm(weights.mT, grad_out)
        grad_weights = torch.bmm(grad_out, values.mT)
        # Zero where the future is hidden, as the weights are.
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, grad.dtype)
        grad_key = torch.bmm(grad_scores.mT, queries)
        grad_query = torch.bmm(grad_scores, keys).mul_(ctx.scaling)
        shape = num_rows, -1, length
        return (
            grad_query.view(*shape, queries.shape[2]),
            grad_key.view(*shape, queries.shape[2]),
            grad_value.view(*shape, value_size),
            None,
        )


def packed_in_rows(
    attend: Callable[..., Tensor],
    states: Sequence[Tensor],
    rows: RowGroups,
) -> Tensor:
    """What `attend` gives for packed tokens, (1, N, A, F), group by group of rows.

    Padding comes after a row's tokens and attention is causal: no token sees any. What is computed
    in its place is dropped.

    Args:
        attend: query (rows, A, width, F), key and value, and which sequences the rows are, to
            (rows, width, A, F).
        states: packed query (1, A, N, F), key and value (1, G, N, F).
        rows: where each packed token goes.
    """
    counts = [count for count, _ in rows.groups]
    # Split, not sliced: the gradient of slices would be a whole tensor of zeros for each.
    groups = zip(*(_groups(one, rows) for one in states), strict=True)
    outs = [
        attend(*group, row_E) for group, row_E in zip(groups, rows.row_E.split(counts), strict=True)
    ]
    out_XAF = torch.cat([out.flatten(0, 1) for out in outs])
    return out_XAF[None] if rows.are_equal else out_XAF.index_select(0, rows.place_N)[None]


def _groups(states: Tensor, rows: RowGroups) -> list[Tensor]:
    """Packed states (1, heads, N, F) as (rows, heads, width, F) of each group, zero in the
    padding."""
    sizes = [count * width for count, width in rows.groups]
    # Squeezed, not indexed: the gradient of an index is a copy within a tensor of zeros.
    packed = states.squeeze(0).transpose(0, 1)
    if rows.are_equal:
        return [packed.unflatten(0, rows.groups[0]).transpose(1, 2)]
    padded = packed.new_zeros(sum(sizes), *packed.shape[1:]).index_copy(0, rows.place_N, packed)
    return [
        part.unflatten(0, group).transpose(1, 2)
        for part, group in zip(padded.split(sizes), rows.groups, strict=True)
    ]


def _causal(length: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """True where one of the last `length` of `num_keys` tokens sees a key, (1, 1, S, keys)."""
    mask = torch.ones(length, num_keys, dtype=torch.bool, device=device).tril(num_keys - length)
    if sliding_window is not None:  # the token itself is one of the window
        mask = mask.triu(num_keys - length - sliding_window + 1)
    return mask[None, None]


def _future(length: int, device: torch.device) -> Tensor:
    """True where a key comes after the token, (S, S)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def _none_if_empty(mask: Tensor | None, module: nn.Module, knows_ends: bool) -> Tensor | None:
    """See `no_mask`; for `no_mask_of_packed`, raise UserError unless attention knows the ends."""
    if mask is None or mask.numel():
        return mask
    if len(mask) and not knows_ends:
        raise UserError(
            f"model: {type(module).__name__}: the blocks of this base do not hand on where a "
            "packed sequence ends, and samples would see each other; take another base"
        )
    return None


_CHANGES_NOTHING = {
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "is_causal",
    "output_attentions",
    "position_ids",
    "sliding_window",
    "use_cache",
    "ship_prefix",
    "ship_cross_prefix",
    "ship_rows",
}
"""What our functions take into account, or what is of no account to them."""


def _refuse_unknown(
    module: nn.Module, kwargs: Mapping[str, Any], known: Sequence[str] = ()
) -> None:
    """Let no attention run that is another than the base's: a family may hand down what changes
    it, such as sinks (`s_aux`).

    Args:
        module: the attention that calls.
        kwargs: what it hands down.
        known: what the caller takes into account besides.

    Raises:
        UserError: there is more.
    """
    unknown = sorted(
        name
        for name, value in kwargs.items()
        if name not in (*_CHANGES_NOTHING, *known) and value is not None and value is not False
    )
    if unknown:
        raise UserError(
            f"model.attention: {type(module).__name__} asks for attention with "
            f"{', '.join(unknown)}, which ship_ds's functions do not know; set it to flash, or use "
            "another base"
        )


AttentionInterface.register(SDPA, sdpa_forward)
AttentionMaskInterface.register(SDPA, sdpa_mask)
AttentionInterface.register(VARLEN, varlen_forward)
AttentionMaskInterface.register(VARLEN, varlen_mask)
