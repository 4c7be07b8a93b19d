"""T5 against the stock model: what the port promises holds for two stacks as well."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, MT5Config, MT5ForConditionalGeneration

from ship_ds.config import FusionHypernetworkConfig, PrefixHypernetworkConfig
from ship_ds.model import nf4, streaming
from ship_ds.model.adapters.adapter import States, Target, build_hypernetwork
from ship_ds.model.adapters.prefix import PrefixAdapter
from ship_ds.model.adapters.sites import wrap_sites
from ship_ds.model.attention import SDPA
from ship_ds.model.batch import TokenBatch
from ship_ds.model.encoder_decoder import EncoderDecoder, start_token
from ship_ds.model.generation import greedy
from ship_ds.model.language_model import language_model
from ship_ds.model.loading import load_lm
from ship_ds.model.nf4_linear import Nf4Linear, use_nf4_linears
from ship_ds.model.search import beam_search
from tests.model.models import (
    EOS,
    HIDDEN,
    VOCABULARY,
    greedy_rows,
    label_logits,
    random_lora,
    random_rows,
    tiny_t5,
)

VERSIONS = ("1.0", "1.1")
NUM_VIRTUAL = 3
TARGETS = {"1.0": ("q", "v", "wi", "wo"), "1.1": ("q", "k", "wi_1", "wo")}
PROMPTS, ANSWERS = [9, 4, 7, 6], [2, 5, 1, 3]


def _rows() -> list[tuple[list[int], list[int]]]:
    return list(zip(random_rows(PROMPTS), random_rows(ANSWERS, 5), strict=True))


def _batch() -> TokenBatch:
    return TokenBatch.build(random_rows(PROMPTS), random_rows(ANSWERS, 5), 0, NUM_VIRTUAL)


def _soft() -> Tensor:
    return torch.randn(4, NUM_VIRTUAL, HIDDEN, generator=torch.Generator().manual_seed(9))


def _stock_logits(model: Any, soft_1PH: Tensor, prompt: list[int], answer: list[int]) -> Tensor:
    """transformers' own, of one row without padding."""
    embedded = model.get_input_embeddings()(torch.tensor([prompt]))
    embedded = torch.cat([soft_1PH.to(embedded.dtype), embedded], 1)
    logits: Tensor = model(inputs_embeds=embedded, labels=torch.tensor([answer])).logits[0]
    return logits


def _stock_losses(version: str, dtype: torch.dtype) -> Tensor:
    """Log-probabilities (K, V) of all rows' answers, each row by itself, in fp64's numbers."""
    stock: Any = tiny_t5(version).to(dtype)
    stock.set_attn_implementation("eager")
    rows = enumerate(_rows())
    logits = [_stock_logits(stock, _soft()[e : e + 1], *row) for e, row in rows]
    return torch.cat(logits).log_softmax(-1).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_loss_is_the_stock_models(version: str, dtype: torch.dtype) -> None:
    """To fp64's last digits: whatever is masked, shifted or scaled otherwise shows. In fp32 by no
    more than twice what the stock model rounds by, which differs from processor to processor."""
    model = tiny_t5(version).to(dtype)
    logits, labels = label_logits(model, _batch(), _soft().to(dtype))
    exact = _stock_losses(version, torch.float64)
    rounding = (_stock_losses(version, dtype) - exact).abs().max()
    bound = 1e-12 if dtype == torch.float64 else 2 * float(rounding)
    torch.testing.assert_close(logits.log_softmax(-1).double(), exact, rtol=0, atol=bound)
    assert labels.tolist() == [token for _, answer in _rows() for token in answer]
    moved = label_logits(model, _batch(), _soft().to(dtype) * 1.01)[0]
    assert float((moved - logits).detach().abs().max()) > 1e-3, "virtual tokens say nothing"


def test_a_hidden_label_is_another_token_to_what_is_written_after_it() -> None:
    """Its first token is hidden in each row: the first label is predicted as before, and the next
    ones as the stock model does that reads the other token there."""
    model, batch = tiny_t5("1.1").to(torch.float64), _batch()
    first_K = torch.tensor([i == 0 for n in ANSWERS for i in range(n)])
    seen = label_logits(model, batch, _soft().double())[0]
    hidden, labels = label_logits(model, batch.hiding(first_K, 7), _soft().double())
    assert labels.tolist() == batch.labels_K.tolist()
    torch.testing.assert_close(hidden[first_K], seen[first_K], rtol=0, atol=1e-12)
    others = [[7, *answer[1:]] for _, answer in _rows()]
    read_7 = TokenBatch.build(random_rows(PROMPTS), others, 0, NUM_VIRTUAL)
    torch.testing.assert_close(
        hidden, label_logits(model, read_7, _soft().double())[0], rtol=0, atol=1e-12
    )
    assert float((hidden - seen)[~first_K].detach().abs().max()) > 1e-3


def test_version_1_0_scales_what_its_tied_output_layer_reads() -> None:
    old, new = (language_model(tiny_t5(version)) for version in VERSIONS)
    states = torch.randn(5, HIDDEN)
    tied = states @ old.module.shared.weight.T / HIDDEN**0.5
    torch.testing.assert_close(old.head(states), tied, rtol=1e-5, atol=1e-5)
    own = states @ new.module.lm_head.weight.T
    torch.testing.assert_close(new.head(states), own, rtol=1e-5, atol=1e-5)


def _merged(version: str, adapter: Any, task: int) -> Any:
    model = tiny_t5(version).double()
    with torch.no_grad():
        for path, (a_TRI, b_TOR) in adapter.factors.items():
            model.get_submodule(path).weight += adapter.scaling * b_TOR[task] @ a_TRI[task]
    return model


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_label_logits_under_an_adapter_are_the_merged_models(
    version: str, checkpointing: bool
) -> None:
    """In fp64: unscaled attention makes much of a rounding."""
    model = tiny_t5(version).double()
    drawn = random_lora(wrap_sites(model, TARGETS[version]), 2)
    adapter = replace(
        drawn,
        factors={
            path: (a.detach().double().requires_grad_(), b.detach().double().requires_grad_())
            for path, (a, b) in drawn.factors.items()
        },
    )
    assert any(".EncDecAttention." in path for path in adapter.factors)
    assert {path.split(".")[0] for path in adapter.factors} == {"encoder", "decoder"}
    logits, labels = label_logits(
        model, _batch(), _soft().double(), adapter, num_tasks=2, checkpointing=checkpointing
    )
    expected = [
        _stock_logits(_merged(version, adapter, e // 2), _soft()[e : e + 1], *row)
        for e, row in enumerate(_rows())
    ]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-10, atol=1e-10)
    nn.functional.cross_entropy(logits, labels).backward()
    for a_TRI, _ in adapter.factors.values():
        assert a_TRI.grad is not None and float(a_TRI.grad.abs().max()) > 0


def _attended(
    queries_AYF: Tensor, keys_ASF: Tensor, values_ASF: Tensor, bias_AYS: Tensor
) -> Tensor:
    return (queries_AYF @ keys_ASF.mT + bias_AYS).softmax(-1) @ values_ASF


@torch.no_grad()
@pytest.mark.parametrize("place", ["encoder.block.1", "decoder.block.1", "decoder.block.1.layer.1"])
def test_a_prefix_is_met_where_it_belongs_and_nowhere_else(place: str) -> None:
    """By hand: keys at no distance from any token beside the attention's own, in one row."""
    model: Any = tiny_t5()
    plain = copy.deepcopy(model)
    wrap_sites(model, ("q",))
    states = torch.randn(1, 2, 4, 3, 16, generator=torch.Generator().manual_seed(3))
    adapter = PrefixAdapter({place: states})
    seen: dict[str, Tensor] = {}
    part = "EncDecAttention" if place.endswith("layer.1") else "SelfAttention"
    layer = plain.get_submodule(place if place.endswith("layer.1") else f"{place}.layer.0")
    attention = getattr(layer, part)

    def by_hand(module: Any, arguments: Any, given: dict[str, Any], out: Any) -> Any:
        query_input, mask = arguments[0], given["mask"]
        source = given.get("key_value_states")
        source = query_input if source is None else source
        heads = lambda x: x.unflatten(-1, (4, 16)).transpose(1, 2)[0]  # noqa: E731
        keys = torch.cat([states[0, 0], heads(module.k(source))], 1)
        values = torch.cat([states[0, 1], heads(module.v(source))], 1)
        bias = out[1][0]
        if mask is not None:
            bias = bias.masked_fill(~mask[0], -torch.inf)
        elif module.is_causal:
            length = bias.shape[-1]
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            bias = bias.masked_fill(future, -torch.inf)
        bias = nn.functional.pad(bias, (3, 0))
        made = _attended(heads(module.q(query_input)), keys, values, bias)
        seen["out"] = module.o(made.transpose(0, 1).flatten(1)[None])
        return (seen["out"], *out[1:])

    attention.register_forward_hook(by_hand, with_kwargs=True)
    batch = TokenBatch.build(random_rows([7]), random_rows([5], 5), 0)
    expected = label_logits(plain, batch)[0]
    assert "out" in seen
    found = label_logits(model, batch, adapter=adapter)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((label_logits(model, batch)[0] - found).abs().max()) > 0.01


@torch.no_grad()
def test_what_reads_sees_all_of_a_text_beside_a_prefix_without_a_mask_too() -> None:
    model: Any = tiny_t5()
    wrap_sites(model, ("q",))
    states = torch.randn(1, 2, 4, 3, 16, generator=torch.Generator().manual_seed(3))
    given = {
        "inputs_embeds": torch.randn(1, 6, HIDDEN, generator=torch.Generator().manual_seed(4)),
        "ship_adapter": PrefixAdapter({"encoder.block.1": states}),
    }
    everything = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    masked = model.encoder(**given, attention_mask=everything).last_hidden_state
    torch.testing.assert_close(model.encoder(**given).last_hidden_state, masked)


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_greedy_is_transformers_greedy(version: str) -> None:
    model: Any = tiny_t5(version)
    rows = random_rows(PROMPTS)
    ours = greedy_rows(model, TokenBatch.build(rows, None, 0), None, None, EOS, 10)
    for row, tokens in zip(rows, ours, strict=True):
        stock = model.generate(torch.tensor([row]), max_new_tokens=10, do_sample=False)[0].tolist()
        stock = stock[1:]
        assert tokens == (stock[: stock.index(EOS) + 1] if EOS in stock else stock)
    assert len({tuple(row) for row in ours}) > 2


@pytest.mark.parametrize(
    ("settings", "token"),
    [
        ({"decoder_start_token_id": 3, "pad_token_id": 1}, 3),
        ({"decoder_start_token_id": 0, "pad_token_id": 1}, 0),
        ({"decoder_start_token_id": None, "pad_token_id": 1}, 1),
        ({"pad_token_id": 1}, 1),
        ({"pad_token_id": None}, 0),
    ],
)
def test_answers_begin_after_the_start_token_or_padding(
    settings: dict[str, int | None], token: int
) -> None:
    assert start_token(SimpleNamespace(**settings)) == token


@torch.no_grad()
def test_a_stream_says_what_the_whole_answer_would() -> None:
    """Token by token with its cache, and in one forward."""
    model = tiny_t5()
    lm = language_model(model)
    adapter = random_lora(wrap_sites(model, TARGETS["1.1"]), 2)
    soft = _soft()
    prompts = TokenBatch.build(random_rows(PROMPTS), None, 0, NUM_VIRTUAL)
    answers = random_rows([4] * 4, 5)
    whole = TokenBatch.build(random_rows(PROMPTS), answers, 0, NUM_VIRTUAL)
    expected = lm.score(whole, adapter, 2, soft=soft)[0].unflatten(0, (4, 4))
    stream = lm.stream(prompts, adapter, soft=soft)
    stream.reserve(3)
    for y in range(4):
        torch.testing.assert_close(stream.logits_EV, expected[:, y], rtol=1e-4, atol=1e-4)
        if y < 3:
            stream.advance(torch.tensor([row[y] for row in answers]))


@torch.no_grad()
def test_beams_under_adapters_keep_their_rows() -> None:
    model, rows = tiny_t5(), random_rows(PROMPTS)
    adapter = random_lora(wrap_sites(model, TARGETS["1.1"]), 2)
    lm = language_model(model)
    together = beam_search(lm.stream(TokenBatch.build(rows, None, 0), adapter), 3, EOS, 8)
    for e, row in enumerate(rows):
        one = adapter.rows(torch.tensor([e // 2]))
        alone = beam_search(lm.stream(TokenBatch.build([row], None, 0), one), 3, EOS, 8)[0]
        assert [beam.tokens for beam in alone] == [beam.tokens for beam in together[e]]


@torch.no_grad()
def test_a_sharded_models_tokens_go_the_way_of_its_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same modules in the same order, or ranks that take turns would hang; the same answers,
    of unequally many rows a task too."""
    model, rows = tiny_t5(), random_rows(PROMPTS)
    adapter = random_lora(wrap_sites(model, TARGETS["1.1"]), 2)
    lm = language_model(model)
    prompts = TokenBatch.build(rows, None, 0)
    expected = greedy(lm.stream(prompts, adapter), EOS, 8)
    monkeypatch.setattr(EncoderDecoder, "is_sharded", True)
    called: list[str] = []
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda *_, path=path: called.append(path))
    stream = lm.stream(prompts, adapter)
    read, called[:] = list(called), []
    stream.select([0, 2, 3])
    stream.advance(stream.logits_EV.argmax(-1))
    assert called == read and len(read) > 40
    called.clear()
    lm.logits(TokenBatch.of_lengths(1, 1, 0, device="cpu"))
    assert called == read, "what a rank without work goes through"
    assert greedy(lm.stream(prompts, adapter), EOS, 8) == expected
    assert len({len(row) for row in expected}) > 1, "no row left before the others"


def test_fused_states_are_met_by_cross_attention_alone() -> None:
    """HINT's place for the encoded instruction; a prefix is met in both stacks as well."""
    lm = language_model(tiny_t5())
    cross = ("decoder.block.0.layer.1", "decoder.block.1.layer.1")
    assert lm.fusing() == cross
    assert lm.attentions() == {
        **{path: path for path in lm.blocks()},
        **{path: path.removesuffix(".layer.1") for path in cross},
    }
    target = replace(Target.of(lm, {}), state_size=5)
    hypernetwork = build_hypernetwork(FusionHypernetworkConfig(width=8), 4, target)
    read = States(torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.bool))
    made = hypernetwork(torch.randn(2, 4), read)
    assert tuple(made.tensors()) == cross
    assert {one.shape for one in made.tensors().values()} == {(2, 2, 4, 3, 16)}
    # The two models' blocks have one share of z each, and its cross-attention the block's.
    config = PrefixHypernetworkConfig(length=2, width=8, latent="by_layer")
    prefix = build_hypernetwork(config, 4, target)
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.normal_()
        before, latent = prefix(torch.zeros(1, 4)).tensors(), torch.zeros(1, 4)
        latent[0, 3] = 1  # of the last block
        after = prefix(latent).tensors()
    changed = {place for place in before if not torch.equal(before[place], after[place])}
    assert changed == {"decoder.block.1", "decoder.block.1.layer.1"}


def test_it_runs_on_the_meta_device_and_says_what_it_lacks() -> None:
    with torch.device("meta"):
        model = tiny_t5("1.0")
        adapter = random_lora(wrap_sites(model, ("q",)), 2)
    lm = language_model(model)
    assert isinstance(lm, EncoderDecoder) and lm.context_length is None and not lm.packs
    reason = lm.missing("packing")
    assert reason is not None and "\n" not in reason
    assert lm.missing("adapters") is None and lm.missing("prefix") is None
    model.set_attn_implementation("eager")
    assert "cannot attend to a prefix" in str(lm.missing("prefix"))
    model.set_attn_implementation(SDPA)
    logits, _ = lm.score(TokenBatch.of_lengths(4, 7, 3), adapter, 2)
    assert logits.is_meta and logits.shape == (12, VOCABULARY)
    assert lm.hidden(TokenBatch.of_lengths(4, 7, 0)).shape == (4, 7, HIDDEN)
    assert lm.logits(TokenBatch.of_lengths(4, 7, 0, 2), soft=None).shape == (4, 7, VOCABULARY)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@torch.no_grad()
def test_a_folder_is_read_as_transformers_reads_it(
    version: str, quantisation: Any, tmp_path: Path
) -> None:
    """Tied or not, and in NF4 by our own loader: the bits of transformers' loading."""
    tiny_t5(version).save_pretrained(tmp_path)
    ours: Any = load_lm(str(tmp_path), quantisation, torch.float32, device=torch.device("cpu"))
    settings = AutoConfig.from_pretrained(tmp_path)
    assert settings.scale_decoder_outputs == (version == "1.0")
    assert ours.config._attn_implementation == SDPA
    assert (ours.lm_head.weight is ours.shared.weight) == (version == "1.0")
    batch = TokenBatch.build(random_rows(PROMPTS), random_rows(ANSWERS, 5), 0)
    made, stock = (label_logits(one, batch)[0] for one in (ours, tiny_t5(version)))
    if quantisation == "none":
        assert torch.equal(made, stock)
        return
    assert streaming.why_whole(tmp_path, ours) is None
    whole: Any = type(ours).from_pretrained(
        tmp_path, quantization_config=nf4.config(torch.float32), attn_implementation=SDPA
    )
    use_nf4_linears(whole, torch.device("cpu"), "whole")
    assert torch.equal(label_logits(whole.eval(), batch)[0], made)
    packed = {path for path, one in ours.named_modules() if isinstance(one, Nf4Linear)}
    names = {path.rpartition(".")[2] for path in packed}
    assert names >= {"q", "k", "v", "o"} and not names & {"wo", "lm_head"}
    assert float((made - stock).abs().max()) > 0.01


def test_mt5_comes_in_by_a_plugin(tmp_path: Path) -> None:
    import tests.toys.encoder_decoder  # noqa: F401 (registers it)

    torch.manual_seed(0)
    config = MT5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    stock: Any = MT5ForConditionalGeneration(config).eval()
    stock.save_pretrained(tmp_path)
    lm = language_model(load_lm(str(tmp_path), "none", torch.float32, device=torch.device("cpu")))
    assert isinstance(lm, EncoderDecoder)
    soft = _soft()[..., :16]
    logits = lm.score(_batch(), soft=soft)[0]
    expected = [_stock_logits(stock, soft[e : e + 1], *row) for e, row in enumerate(_rows())]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert float(logits.detach().std()) > 0.01
