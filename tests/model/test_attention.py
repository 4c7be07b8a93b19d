"""Which attention is chosen, and torch's variable-length kernel behind transformers' interface.

The kernel needs CUDA: here a reference with its signature, one masked SDPA a sequence, stands in
for it.
"""

import inspect
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from ship_ds.errors import UserError
from ship_ds.model import attention
from ship_ds.model.adapters.prefix import PrefixAdapter
from ship_ds.model.adapters.sites import wrap_sites
from ship_ds.model.attention import FLASH, SDPA, VARLEN, resolve
from ship_ds.model.batch import TokenBatch
from ship_ds.model.encoder_decoder import EncoderDecoder
from ship_ds.model.language_model import language_model
from tests.model.models import (
    EOS,
    FAMILIES,
    HIDDEN,
    greedy_rows,
    label_logits,
    random_lora,
    random_rows,
    tiny_lm,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
T4, A100, H100 = (7, 5), (8, 0), (9, 0)
UNCAPPED = ("llama", "qwen2", "qwen3", "mistral")


@pytest.fixture
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of a capability, with flash_attn 2 or without, whatever this machine has."""
    capability, has_flash = request.param
    monkeypatch.setattr(attention, "_capability", lambda index: capability)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: has_flash)


@pytest.mark.parametrize(
    ("choice", "device", "dtype", "card", "caps", "expected"),
    [
        ("auto", CPU, BF16, (A100, True), False, SDPA),
        ("sdpa", CPU, FP32, (A100, False), False, SDPA),
        ("auto", CPU, FP32, (A100, False), True, "eager"),
        ("auto", CUDA, BF16, (A100, True), False, FLASH),
        ("auto", CUDA, FP16, (H100, True), False, FLASH),
        ("auto", CUDA, FP32, (A100, True), False, SDPA),
        ("auto", CUDA, FP32, (H100, False), False, SDPA),
        ("auto", CUDA, BF16, (T4, True), False, SDPA),
        ("auto", CUDA, FP16, (T4, False), False, SDPA),
        ("auto", CUDA, BF16, (H100, False), False, VARLEN),
        ("auto", CUDA, BF16, (A100, False), True, "eager"),
        ("auto", CUDA, BF16, (A100, True), True, FLASH),
        ("auto", CUDA, FP32, (A100, True), True, "eager"),
        ("varlen", CUDA, BF16, (A100, True), False, VARLEN),
        ("flash", CUDA, BF16, (A100, True), False, FLASH),
        ("sdpa", CUDA, BF16, (A100, True), False, SDPA),
    ],
    indirect=["card"],
)
def test_choice_resolves(
    choice: Any, device: torch.device, dtype: torch.dtype, card: None, caps: bool, expected: str
) -> None:
    assert resolve(choice, device, dtype, caps) == expected


@pytest.mark.parametrize("card", [(H100, True), (H100, False)], indirect=True)
def test_an_attention_with_a_bias_goes_to_no_kernel_for_lengths(card: None) -> None:
    """As T5's, on a card that has all of them."""
    by_lengths = EncoderDecoder.goes_by_lengths
    assert resolve("auto", CUDA, BF16, goes_by_lengths=by_lengths) == SDPA
    assert resolve("sdpa", CUDA, BF16, goes_by_lengths=by_lengths) == SDPA
    with pytest.raises(UserError, match=r"^model\.attention=varlen: this model adds a bias"):
        resolve("varlen", CUDA, BF16, goes_by_lengths=by_lengths)
    with pytest.raises(UserError, match=r"^model\.attention=flash: this model adds a bias"):
        resolve("flash", CUDA, BF16, goes_by_lengths=by_lengths)


@pytest.mark.parametrize(
    ("choice", "device", "dtype", "card", "caps", "message"),
    [
        ("varlen", CPU, BF16, (A100, True), False, "model.attention=varlen: needs CUDA"),
        ("flash", CPU, BF16, (A100, True), False, "needs CUDA"),
        ("flash", CUDA, FP32, (A100, True), False, "needs bf16 or fp16, .* is in float32"),
        ("varlen", CUDA, FP32, (H100, True), False, "needs bf16 or fp16"),
        ("varlen", CUDA, FP16, (T4, True), False, "capability 8.0, and this one has 7.5"),
        ("flash", CUDA, BF16, (A100, False), False, "flash_attn 2 is not installed"),
        ("varlen", CUDA, BF16, (A100, False), True, "soft-caps"),
        ("sdpa", CPU, FP32, (A100, False), True, "soft-caps"),
    ],
    indirect=["card"],
)
def test_choice_that_cannot_run_is_one_line(
    choice: Any, device: torch.device, dtype: torch.dtype, card: None, caps: bool, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        resolve(choice, device, dtype, caps)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("implementation", [SDPA, VARLEN])
def test_attention_with_more_than_ours_knows_is_refused(implementation: str) -> None:
    function = AttentionInterface()[implementation]
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UserError, match="Linear asks for attention with s_aux"):
        function(torch.nn.Linear(1, 1), states, states, states, None, s_aux=torch.zeros(2))


class Kernel:
    """varlen_attn by one masked SDPA a sequence; counts its calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        **options: Any,
    ) -> Tensor:
        inspect.signature(varlen_attn).bind(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options
        )
        self.num_calls += 1
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        ends = cu_seq_q.tolist()
        assert (
            cu_seq_q.dtype == torch.int32
            and isinstance(max_q, int)
            and ends[0] == 0
            and ends[-1] == len(query) == len(key)
        )
        assert max(b - a for a, b in itertools.pairwise(ends)) <= max_q
        assert options["enable_gqa"] == (query.shape[1] != key.shape[1])
        left, right = options["window_size"]
        assert right == 0
        parts = []
        for start, end in itertools.pairwise(ends):
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
            visible = (distance >= 0) & ((distance <= left) if left >= 0 else torch.tensor(True))
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, visible, scale=options["scale"], enable_gqa=True
            )
            parts.append(out.transpose(0, 1))
        return torch.cat(parts)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "kernel_runs", lambda device, dtype: True)
    return kernel


def _batch() -> TokenBatch:
    return TokenBatch.build(random_rows([9, 4, 7, 12]), random_rows([2, 5, 1, 3], 5), 0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", UNCAPPED)
def test_kernel_gives_the_stock_logits_and_gradients(
    family: str, packed: bool, kernel: Kernel
) -> None:
    results = []
    for implementation in ("sdpa", SDPA, VARLEN):
        model = tiny_lm(family, implementation).requires_grad_(False)
        adapter = random_lora(wrap_sites(model, ("q_proj", "v_proj")), 2)
        logits, labels = label_logits(
            model, _batch(), None, adapter, packed=packed, num_tasks=2, checkpointing=True
        )
        torch.nn.functional.cross_entropy(logits, labels).backward()
        results.append((logits, *(a.grad for a, _ in adapter.factors.values())))
    stock, sdpa, kernel_results = results
    if not packed:  # the very same calls; packed tokens go by rows, stock ones by a mask of all
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(sdpa, stock, strict=True))
    for ours in (sdpa, kernel_results):
        for one, theirs in zip(ours, stock, strict=True):
            torch.testing.assert_close(one, theirs, rtol=1e-4, atol=2e-5)
    assert kernel.num_calls == 4  # two layers, and each once more in the backward pass


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_kernel_takes_values_that_are_narrower_than_keys(
    scaling: float | None, kernel: Kernel
) -> None:
    """DeepSeek's latent attention."""
    shapes = [(3, 6, 5, 12), (3, 2, 5, 12), (3, 2, 5, 8)]
    states = [torch.randn(shape, requires_grad=True) for shape in shapes]
    grad = torch.randn(3, 5, 6, 8)
    stock = torch.nn.functional.scaled_dot_product_attention(
        *states, is_causal=True, scale=scaling, enable_gqa=True
    ).transpose(1, 2)
    ours, _ = attention.varlen_forward(torch.nn.Linear(1, 1), *states, None, scaling=scaling)
    assert kernel.num_calls == 1
    torch.testing.assert_close(ours, stock)
    torch.testing.assert_close(*(torch.autograd.grad(out, states, grad) for out in (ours, stock)))


def test_kernel_finds_the_sequences_from_the_positions_alone(kernel: Kernel) -> None:
    ids = torch.tensor([random_rows([9])[0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    ours = tiny_lm("llama", VARLEN)(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(
        ours, tiny_lm("llama")(input_ids=ids, position_ids=positions, use_cache=False).logits
    )
    assert kernel.num_calls == 2


@pytest.mark.parametrize("family", UNCAPPED)
def test_generation_with_padding_and_cache_leaves_the_kernel_alone(
    family: str, kernel: Kernel
) -> None:
    prompts = TokenBatch.build(random_rows([9, 4, 7]), None, 0)
    assert greedy_rows(tiny_lm(family, VARLEN), prompts, None, None, EOS, 8) == greedy_rows(
        tiny_lm(family), prompts, None, None, EOS, 8
    )
    assert kernel.num_calls == 0


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_without_cuda_the_same_model_goes_through_sdpa(packed: bool) -> None:
    ours, _ = label_logits(tiny_lm("mistral", VARLEN), _batch(), packed=packed)
    torch.testing.assert_close(ours, label_logits(tiny_lm("mistral"), _batch(), packed=packed)[0])


def test_attention_dropout_is_refused(kernel: Kernel) -> None:
    model = tiny_lm("llama", VARLEN).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match="no attention dropout"):
        label_logits(model, _batch(), packed=True)


def _gradients(model: Any, packed: bool, soft: Tensor, adapter: Any) -> list[Tensor]:
    """Label logits of ragged rows in fp64, and the gradient of everything that could be trained."""
    batch = TokenBatch.build(
        random_rows([9, 4, 7, 12, 2, 30]), random_rows([2, 5, 1, 3, 4, 6], 5), 0, 3
    )
    states = list(adapter.states.values()) if adapter is not None else []
    leaves = [*model.parameters(), soft, *states]
    for leaf in leaves:
        leaf.requires_grad_().grad = None
    logits, labels = language_model(model).score(batch, adapter, 2, soft=soft, packed=packed)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    return [logits.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]


@pytest.mark.parametrize("implementation", [SDPA, VARLEN])
@pytest.mark.parametrize("family", UNCAPPED)
def test_packed_tokens_by_rows_are_the_padded_rows_to_rounding(
    family: str, implementation: str
) -> None:
    """Virtual tokens, a prefix a row, sliding windows; groups of several lengths."""
    model = tiny_lm(family, implementation).double()
    wrap_sites(model, ())
    draw = torch.Generator().manual_seed(3)
    soft = torch.randn(6, 3, HIDDEN, generator=draw, dtype=torch.float64)
    states = torch.randn(2, 2, 2, 4, 16, generator=draw, dtype=torch.float64)
    lm = language_model(model)
    assert lm.packs
    prefix = PrefixAdapter({path: states.clone() for path in lm.blocks()})
    for adapter in (None, prefix):
        padded, packed = (_gradients(model, how, soft, adapter) for how in (False, True))
        for ours, theirs in zip(packed, padded, strict=True):
            assert float(theirs.abs().max()) > 0
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("value_size", [8, 12])
@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_attention_by_products_is_the_fused_one(num_groups: int, value_size: int) -> None:
    """And its gradients; values may be of another size than keys, as DeepSeek's are."""
    shapes = [(3, 6, 5, 8), (3, num_groups, 5, 8), (3, num_groups, 5, value_size)]
    query, key, value = (torch.randn(shape, requires_grad=True) for shape in shapes)
    grad = torch.randn(3, 5, 6, value_size)
    for scaling in (None, 0.3):
        fused = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
        products = attention.by_products(query, key, value, scaling)
        torch.testing.assert_close(products, fused)
        gradients = [
            torch.autograd.grad(out, (query, key, value), grad) for out in (products, fused)
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_products_take_the_place_of_slow_attention_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits with gradients on a CPU, and never where nothing is trained."""
    calls: list[int] = []

    def counted(query: Tensor, *args: Any) -> Tensor:
        calls.append(query.shape[2])
        return by_products(query, *args)

    by_products = attention.by_products
    monkeypatch.setattr(attention, "by_products", counted)
    model = tiny_lm("llama", SDPA).to(dtype)
    wrap_sites(model, ())
    batch = TokenBatch.build(random_rows([9, 4]), random_rows([2, 5], 5), 0, 3)
    label_logits(model, batch, packed=True)[0].float().sum().backward()
    assert bool(calls) == (dtype == BF16)
    calls.clear()
    with torch.no_grad():
        label_logits(model, batch, packed=True)
    assert not calls


@pytest.fixture
def softmax_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's attention weights are of fp32 in an fp64 model (transformers' eager softmax), and
    padding sums them in another order, which AVX2 rounds otherwise."""
    softmax = torch.nn.functional.softmax

    def of_the_scores(scores: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        return softmax(scores, dim, dtype=torch.promote_types(scores.dtype, dtype))

    monkeypatch.setattr(torch.nn.functional, "softmax", of_the_scores)


@pytest.mark.usefixtures("softmax_in_fp64")
@pytest.mark.parametrize("family", FAMILIES)
def test_last_states_are_those_of_each_text_alone(family: str) -> None:
    lm = language_model(tiny_lm(family).double())
    rows = random_rows([9, 4, 7, 12, 2])
    states = lm.last_states(TokenBatch.build(rows, None, 0))
    for row, state in zip(rows, states, strict=True):
        alone = lm.hidden(TokenBatch.build([row], None, 0))[0, -1]
        torch.testing.assert_close(state, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("softmax_in_fp64")
@pytest.mark.parametrize("lengths", [[9, 4, 7, 12, 2], [5, 5, 5]])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_each_text_alone_and_zero_in_the_padding(
    family: str, lengths: list[int]
) -> None:
    lm = language_model(tiny_lm(family).double())
    rows = random_rows(lengths)
    batch = TokenBatch.build(rows, None, 0)
    states = lm.states(batch)
    assert states.shape == (len(rows), max(lengths), HIDDEN)
    assert not states[~batch.real_ES].any()
    for row, own in zip(rows, states, strict=True):
        alone = lm.hidden(TokenBatch.build([row], None, 0))[0]
        torch.testing.assert_close(own[: len(row)], alone, rtol=1e-10, atol=1e-10)
    by_embeddings = lm.states(batch, lm.embed(batch))
    torch.testing.assert_close(by_embeddings, states, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", UNCAPPED)
@torch.no_grad()
def test_real_kernel_on_cuda(family: str) -> None:
    prompts, targets = random_rows([9, 4, 7, 12]), random_rows([2, 5, 1, 3], 5)
    batch = TokenBatch.build(prompts, targets, 0, device="cuda")
    expected, _ = label_logits(tiny_lm(family).cuda().bfloat16(), batch)
    ours, _ = label_logits(tiny_lm(family, VARLEN).cuda().bfloat16(), batch, packed=True)
    torch.testing.assert_close(ours.float(), expected.float(), rtol=0.05, atol=0.15)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_on_cuda_never_waits_for_the_gpu(packed: bool) -> None:
    """Batch to the GPU, label logits under an adapter, loss and backward: torch raises where the
    host would have to wait."""
    model = tiny_lm("llama", VARLEN).cuda().bfloat16()
    adapter = random_lora(wrap_sites(model, ("q_proj", "o_proj", "down_proj")), 2)
    # Leaves on the GPU: a gradient on its way back to the host would be waited for.
    factors = {
        path: (a.detach().cuda().requires_grad_(), b.detach().cuda().requires_grad_())
        for path, (a, b) in adapter.factors.items()
    }
    soft = torch.randn(4, 3, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    adapter = replace(adapter, factors=factors)

    def step() -> Tensor:
        prompts, targets = random_rows([9, 4, 7, 12]), random_rows([2, 5, 1, 3], 5)
        batch = TokenBatch.build(prompts, targets, 0, 3, "cuda")
        logits, labels = label_logits(model, batch, soft, adapter, packed=packed, num_tasks=2)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        loss.backward()
        return loss.detach()

    first = step()  # allocates, and compiles what there is to compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
        texts = TokenBatch.build([[3, 4], [5]], None, 0, 0, "cuda")
        states, read = language_model(model).hidden(texts), language_model(model).states(texts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(first) and states.shape == read.shape == (2, 2, HIDDEN)
    torch.testing.assert_close(first, second)
