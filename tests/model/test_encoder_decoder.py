"""The toy T5 against the stock model: what the port promises holds for two stacks as well."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from ship_ds.config import DecoderConfig, LoraHypernetworkConfig, ModelConfig, TaskLlmConfig
from ship_ds.data.sampler import TaskDraw
from ship_ds.data.task import Example
from ship_ds.model.adapters.sites import wrap_sites
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.batch import TokenBatch
from ship_ds.model.language_model import language_model
from ship_ds.model.loading import load_tokenizer
from ship_ds.model.search import beam_search
from tests.model.models import EOS, VOCABULARY, greedy_rows, label_logits, random_lora, random_rows
from tests.toys.encoder_decoder import EncoderDecoder

SIZE, NUM_VIRTUAL = 32, 3
TARGETS = ("q", "v", "wo")
PROMPTS, ANSWERS = [9, 4, 7, 6], [2, 5, 1, 3]


def tiny_t5(seed: int = 0, vocabulary: int = VOCABULARY) -> Any:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=SIZE,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        initializer_factor=2.0,
        pad_token_id=0,
        eos_token_id=EOS,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def _merged(adapter: Any, task: int) -> Any:
    model = tiny_t5()
    with torch.no_grad():
        for path, (a_TRI, b_TOR) in adapter.factors.items():
            model.get_submodule(path).weight += adapter.scaling * b_TOR[task] @ a_TRI[task]
    return model


def _batch() -> TokenBatch:
    return TokenBatch.build(random_rows(PROMPTS), random_rows(ANSWERS, 5), 0, NUM_VIRTUAL)


def _soft() -> torch.Tensor:
    return torch.randn(4, NUM_VIRTUAL, SIZE, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_label_logits_under_an_adapter_are_the_merged_models(checkpointing: bool) -> None:
    model = tiny_t5()
    adapter = random_lora(wrap_sites(model, TARGETS), 2)
    assert any(".EncDecAttention." in path for path in adapter.factors)
    logits, labels = label_logits(
        model, _batch(), _soft(), adapter, num_tasks=2, checkpointing=checkpointing
    )
    expected = []
    for e, (prompt, answer) in enumerate(
        zip(random_rows(PROMPTS), random_rows(ANSWERS, 5), strict=True)
    ):
        merged = _merged(adapter, e // 2)
        embedded = merged.get_input_embeddings()(torch.tensor([prompt]))
        embedded = torch.cat([_soft()[e : e + 1], embedded], 1)
        expected.append(merged(inputs_embeds=embedded, labels=torch.tensor([answer])).logits[0])
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert labels.tolist() == [token for row in random_rows(ANSWERS, 5) for token in row]
    torch.nn.functional.cross_entropy(logits, labels).backward()
    for a_TRI, _ in adapter.factors.values():
        assert a_TRI.grad is not None and float(a_TRI.grad.abs().max()) > 0


@torch.no_grad()
def test_greedy_is_transformers_greedy() -> None:
    model, rows = tiny_t5(), random_rows(PROMPTS)
    ours = greedy_rows(model, TokenBatch.build(rows, None, 0), None, None, EOS, 10)
    for row, tokens in zip(rows, ours, strict=True):
        stock = model.generate(torch.tensor([row]), max_new_tokens=10, do_sample=False)[0].tolist()
        stock = stock[1:]
        assert tokens == (stock[: stock.index(EOS) + 1] if EOS in stock else stock)
    assert len({tuple(row) for row in ours}) > 2


@torch.no_grad()
def test_beams_under_adapters_keep_their_rows() -> None:
    model, rows = tiny_t5(), random_rows(PROMPTS)
    adapter = random_lora(wrap_sites(model, TARGETS), 2)
    lm = language_model(model)
    together = beam_search(lm.stream(TokenBatch.build(rows, None, 0), adapter), 3, EOS, 8)
    for e, row in enumerate(rows):
        one = adapter.rows(torch.tensor([e // 2]))
        alone = beam_search(lm.stream(TokenBatch.build([row], None, 0), one), 3, EOS, 8)[0]
        assert [beam.tokens for beam in alone] == [beam.tokens for beam in together[e]]


def test_it_runs_on_the_meta_device_and_says_what_it_lacks() -> None:
    with torch.device("meta"):
        model = tiny_t5()
        adapter = random_lora(wrap_sites(model, TARGETS), 2)
    lm = language_model(model)
    assert isinstance(lm, EncoderDecoder) and lm.context_length is None and not lm.packs
    reason = lm.missing("packing")
    assert reason is not None and "\n" not in reason and lm.missing("adapters") is None
    logits, _ = lm.score(TokenBatch.of_lengths(4, 7, 3), adapter, 2)
    assert logits.is_meta and logits.shape == (12, VOCABULARY)
    assert lm.hidden(TokenBatch.of_lengths(4, 7, 0)).shape == (4, 7, SIZE)
    assert lm.states(TokenBatch.of_lengths(4, 7, 0)).shape == (4, 7, SIZE)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A T5 with the embedded LM's tokenizer."""
    tokenizer = load_tokenizer("embedded")
    tokenizer.save_pretrained(tmp_path)
    tiny_t5(vocabulary=len(tokenizer)).save_pretrained(tmp_path)
    return str(tmp_path)


def test_ship_trains_and_answers_with_it_as_task_llm_and_decoder(folder: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        latent_size=16,
        task_llm=TaskLlmConfig(base=folder, quantisation="none"),
        decoder=DecoderConfig(base=folder, quantisation="none"),
        hypernetwork=LoraHypernetworkConfig(rank=2, width=8, targets=TARGETS),
    )
    ship = build_ship(config, LoadedWeights())
    with torch.no_grad():
        for name, parameter in ship.hypernetwork.named_parameters():
            if "to_b" in name:
                parameter.normal_(std=0.5)
    wordings = ["keep the numbers greater than 4", "put 7 at the front"]
    examples = (Example("3 9 5", "9 5"), Example("1 2", ""))
    draws = [TaskDraw(text, text, examples, examples[:1], True) for text in wordings]
    sums = ship(ship.collate(draws, 0, 0)).objectives
    sum(sums.values()).backward()
    for part in (ship.encoder.head, ship.hypernetwork, ship.decoder.from_latent):
        gradients = [parameter.grad for parameter in part.parameters()]
        assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)
    adapter = ship.adapt(ship.encode(wordings))
    questions = ship.task_batch(["3 9 5", "1 2", "8 8 1", "4"], None, [None] * 4)
    eos_id = ship.prompts.eos_id
    under, bare = (ship.task_llm.generate(one, questions, eos_id, 6) for one in (adapter, None))
    assert len(under) == 4 and under != bare
    assert len(ship.decode(ship.encode(wordings), 5)) == 2
